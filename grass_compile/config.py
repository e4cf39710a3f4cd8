"""Validated settings: what one weight is asked to do (`SiteConfig`) and what one compilation is asked to do (`BackendOptions`).

Nothing here looks at a tensor's values. Both are frozen and hashable, because what is compiled is keyed by them.
"""

from __future__ import annotations

import dataclasses
import difflib
import hashlib
import inspect
import math
import numbers
from collections.abc import Callable, Iterable, Mapping
from typing import Any, Literal, TypeAlias

import torch

from .errors import ConfigError

Axis = Literal["rows", "columns"]
AxisChoice = Literal["rows", "columns", "auto"]
OnRefresh = Literal["reset", "carry", "keep"]
Selection = Literal["top", "norm", "uniform"]
ProjectionKind = Literal["grass", "galore", "gaussian"]
Scores = Literal["exact", "sampled", "estimate"]
NonFinite = Literal["raise", "skip", "propagate"]

UserPass: TypeAlias = Callable[..., int]
"""``pass_(gm, context) -> changes``; changes an ``fx.GraphModule`` in place."""

SELECTIONS = ("top", "norm", "uniform")
PROJECTIONS = ("grass", "galore", "gaussian")
SCORES = ("exact", "sampled", "estimate")
AXES = ("rows", "columns", "auto")
ON_REFRESH = ("reset", "carry", "keep")
NONFINITE = ("raise", "skip", "propagate")
COMPILERS = ("inductor", "aot_eager")
STATE_DTYPES = (None, torch.float32, torch.bfloat16, torch.float64)
MODES = ("default", "reduce-overhead", "max-autotune", "max-autotune-no-cudagraphs")


@dataclasses.dataclass(frozen=True)
class SiteConfig:
    """What the optimizer asks of one weight. Hashable: part of the key of what is compiled.

    Attributes:
        rank: number of rows (columns) that move at a time.
        axis: ``rows`` are out-features, ``columns`` are in-features, ``auto`` lets the cost model decide.
        on_refresh: what happens to the moments when new rows are chosen.
        decays: whether the decoupled weight decay touches the whole weight on every step.
        scale: the paper's alpha, a factor on the update.
        rule: the update rule; a frozen, hashable object.
        stochastic_rounding: whether bf16 weights and moments are rounded stochastically.
        state_dtype: dtype of the moments; None for at least fp32.
        selection: how new rows are chosen.
        scores: what new rows are chosen by.
        checked: whether a step whose gradient is not finite is skipped.
        projection: ``grass`` selects rows, ``galore`` projects onto singular vectors, ``gaussian`` onto random vectors.
        share_index: whether weights that read the same activations choose their columns together.
    """

    rank: int
    axis: AxisChoice
    on_refresh: OnRefresh
    decays: bool
    scale: float
    rule: Any
    stochastic_rounding: bool = False
    state_dtype: torch.dtype | None = None
    selection: Selection = "top"
    scores: Scores = "exact"
    checked: bool = False
    projection: ProjectionKind = "grass"
    share_index: bool = False

    @property
    def counted(self) -> bool:
        """Whether the step itself counts the updates of the moments, beside them: by row, or because some are skipped."""
        return self.checked or self.on_refresh == "carry"

    @property
    def chosen_by(self) -> str:
        """What a refresh makes of the full gradient: a selection of rows, or ``galore``."""
        return self.selection if self.projection == "grass" else self.projection

    @property
    def step_alone(self) -> SiteConfig:
        """The same as far as a step between refreshes goes; configurations for which this is equal share compiled steps."""
        on_refresh: OnRefresh = "carry" if self.on_refresh == "carry" else "reset"
        return dataclasses.replace(self, on_refresh=on_refresh, selection="top", scores="exact", share_index=False)


@dataclasses.dataclass(frozen=True)
class GroupOptions:
    """The keywords of a parameter group that are ours rather than torch's, after validation."""

    rank: int | None
    update_proj_gap: int
    axis: AxisChoice
    on_refresh: OnRefresh
    scale: float
    exclude: tuple[str, ...]
    stochastic_rounding: bool = False
    state_dtype: torch.dtype | None = None
    seed: int = 0
    selection: Selection = "top"
    stagger: int = 1
    scores: Scores = "exact"
    nonfinite: NonFinite = "raise"
    projection: ProjectionKind = "grass"
    share_index: bool = False

    @property
    def checked(self) -> bool:
        """Whether a step whose gradient is not finite is skipped."""
        return self.nonfinite != "propagate"

    @property
    def blind(self) -> bool:
        """Whether what a refresh takes depends on no gradient: it is drawn before, and a refresh is a regular step."""
        return self.projection == "gaussian" or self.selection == "uniform"

    @property
    def proposes_anytime(self) -> bool:
        """Whether every step's graph can choose new rows, and is told when to."""
        return self.scores == "estimate"

    def site(self, axis: AxisChoice, decays: bool, rule: Any) -> SiteConfig:
        """What these keywords ask of one weight; ``rank`` must not be None."""
        assert self.rank is not None
        return SiteConfig(
            rank=self.rank, axis=axis, on_refresh=self.on_refresh, decays=decays, scale=self.scale, rule=rule,
            stochastic_rounding=self.stochastic_rounding, state_dtype=self.state_dtype, selection=self.selection,
            scores=self.scores, checked=self.checked, projection=self.projection, share_index=self.share_index,
        )  # fmt: skip


def nearest(word: str, words: Iterable[str]) -> str:
    """A "did you mean" for messages: `` Did you mean 'x'?`` or the full list when nothing is near."""
    words = list(words)
    close = difflib.get_close_matches(str(word), words, n=1)
    return f" Did you mean {close[0]!r}?" if close else f" Valid: {', '.join(map(repr, words))}."


def one_of(what: str, value: object, valid: tuple[str, ...]) -> Any:
    """Return ``value`` if it is one of ``valid``, else raise `ConfigError` naming the nearest valid one."""
    if not isinstance(value, str) or value not in valid:
        raise ConfigError(f"{what}={value!r} is not known.{nearest(str(value), valid)}")
    return value


def positive_int(what: str, value: object) -> int:
    """Return ``value`` as an int if it is a whole number of at least 1 (``True`` is not a number here)."""
    if isinstance(value, bool) or not isinstance(value, numbers.Integral) or int(value) < 1:
        raise ConfigError(f"{what} must be a whole number of at least 1, got {value!r}.")
    return int(value)


def finite(what: str, value: object) -> float:
    """Return ``value`` as a float if it is a finite number."""
    if isinstance(value, bool) or not isinstance(value, numbers.Real) or not math.isfinite(float(value)):
        raise ConfigError(f"{what} must be a finite number, got {value!r}.")
    return float(value)


def name_patterns(what: str, value: Any) -> tuple[str, ...]:
    """Return ``value`` as a tuple if it is a list of name patterns; a string, whose letters would each be one, is none."""
    patterns = tuple(value) if isinstance(value, Iterable) and not isinstance(value, str) else (None,)
    if not all(isinstance(pattern, str) for pattern in patterns):
        raise ConfigError(f"{what} must be a list of name patterns such as ['*lm_head*'], got {value!r}.")
    return patterns


def parse_group(group: Mapping[str, Any]) -> GroupOptions:
    """Validate our keywords of one parameter group.

    Raises:
        ConfigError: a value is out of range, unknown, or belongs to a feature that this version does not have.
    """
    rank = None if group["rank"] is None else positive_int("rank", group["rank"])
    selection = one_of("selection", group["selection"], SELECTIONS)
    on_refresh = one_of("on_refresh", group["on_refresh"], ON_REFRESH)
    stagger = group["stagger"]
    if not isinstance(stagger, bool):
        stagger = positive_int("stagger", stagger)
    for key in ("step_in_backward", "stochastic_rounding", "share_index"):
        if not isinstance(group[key], bool):
            raise ConfigError(f"{key} must be True or False, got {group[key]!r}.")
    scores = one_of("scores", group["scores"], SCORES)
    if selection == "uniform":
        scores = "exact"  # there is nothing to score, and nothing to propose
    if group["share_index"] and scores == "exact" and selection != "uniform":
        raise ConfigError(
            "share_index=True chooses the columns of several weights by the sum of their scores; exact ones would need all of "
            "their full gradients at once. Use scores='sampled' or 'estimate'."
        )
    projection = one_of("projection", group["projection"], PROJECTIONS)
    if projection != "grass":
        _check_dense_projection(projection, group)
    if group["max_grad_norm"] is not None and finite("max_grad_norm", group["max_grad_norm"]) <= 0:
        raise ConfigError(f"max_grad_norm must be above 0, got {group['max_grad_norm']!r}.")
    if group["state_dtype"] not in STATE_DTYPES:
        raise ConfigError(f"state_dtype must be one of {STATE_DTYPES}, got {group['state_dtype']!r}.")
    if isinstance(group["seed"], bool) or not isinstance(group["seed"], numbers.Integral):
        raise ConfigError(f"seed must be a whole number, got {group['seed']!r}.")
    options = GroupOptions(
        rank=rank,
        update_proj_gap=positive_int("update_proj_gap", group["update_proj_gap"]),
        axis=one_of("axis", group["axis"], AXES),
        on_refresh=on_refresh,
        scale=finite("scale", group["scale"]),
        exclude=name_patterns("exclude", group["exclude"]),
        stochastic_rounding=group["stochastic_rounding"],
        state_dtype=group["state_dtype"],
        seed=int(group["seed"]),
        selection=selection,
        stagger=1 if isinstance(stagger, bool) else stagger,
        scores=scores,
        nonfinite=one_of("nonfinite", group["nonfinite"], NONFINITE),
        projection=projection,
        share_index=group["share_index"],
    )
    if stagger is True:
        slots = options.update_proj_gap if options.blind or options.proposes_anytime else STAGGER_SLOTS
        options = dataclasses.replace(options, stagger=slots)
    return options


def _check_dense_projection(projection: str, group: Mapping[str, Any]) -> None:
    """Refuse keywords that are about selected rows, of which a dense projection has none.

    Raises:
        ConfigError: naming the keyword.
    """
    for key, only in (("selection", "top"), ("share_index", False), ("scores", "exact")):
        if group[key] != only:
            raise ConfigError(
                f"{key}={group[key]!r} is about which rows are selected; projection={projection!r} selects none. Leave {key} "
                "out, or use projection='grass'."
            )
    if group["on_refresh"] == "carry":
        raise ConfigError(
            f"on_refresh='carry' lets rows that stay selected keep their moments; projection={projection!r} selects none. Use "
            "on_refresh='reset', or 'keep'."
        )


STAGGER_SLOTS = 4
"""Parts of an interval over which ``stagger=True`` spreads the refreshes, where each part is a graph to compile."""

DEFAULT_EXCLUDE = ("*lm_head*", "*embed*")

PROJECT: dict[str, Any] = dict(
    rank=None, update_proj_gap=200, selection="top", axis="auto", on_refresh="reset", scale=1.0,
    exclude=DEFAULT_EXCLUDE, step_in_backward=True, max_grad_norm=None, stochastic_rounding=False,
    state_dtype=None, seed=0, stagger=False, scores="exact", nonfinite="raise", projection="grass",
    share_index=False,
)  # fmt: skip
"""The keywords of a grass optimizer that are ours rather than torch's, with their defaults."""


@dataclasses.dataclass(frozen=True)
class BackendOptions:
    """``options={...}`` of ``torch.compile(model, backend="grass", options={...})``.

    Attributes:
        compiler: ``inductor`` generates code; ``aot_eager`` runs the rewritten graphs op by op, for debugging.
        disable_passes: exact names of passes to leave out (see `grass_compile.passes.pipeline.PASSES`).
        strict: raise `GraphError` when a weight that the optimizer wants projected is not.
        mode: as ``torch.compile(mode=...)``.
        inductor: Inductor config patches, handed through; a sorted tuple of items so that it can be hashed.
        joint_passes: functions ``pass_(gm, context) -> changes`` over each joint graph, before ours
            (see `grass_compile.passes.pipeline`); the same every time that they see a graph.
        backward_passes: the same over each finished backward graph, before it is verified.
        project: for an unmodified script, what to ask of the weights that its own ``torch.optim`` optimizer holds: the keywords
            `PROJECT` (``rank`` and, beside it, others of a grass optimizer's); None without ``rank``.
    """

    compiler: Literal["inductor", "aot_eager"] = "inductor"
    disable_passes: tuple[str, ...] = ()
    strict: bool = False
    mode: str = "default"
    inductor: tuple[tuple[str, Any], ...] = ()
    project: GroupOptions | None = None
    joint_passes: tuple[UserPass, ...] = dataclasses.field(default=(), repr=False)
    backward_passes: tuple[UserPass, ...] = dataclasses.field(default=(), repr=False)

    @property
    def passes_key(self) -> str:
        """What stands for the user's passes in the keys of compile caches."""
        return ";".join(source_key(pass_) for pass_ in (*self.joint_passes, *self.backward_passes))

    @classmethod
    def parse(cls, options: Mapping[str, Any] | None, mode: str | None, passes: Iterable[str]) -> BackendOptions:
        """Validate the options that reached the backend.

        Args:
            options: the user's mapping, or None.
            mode: the ``mode`` that ``torch.compile`` was given, or None.
            passes: the names that ``disable_passes`` may hold.

        Raises:
            ConfigError: an unknown key, compiler, mode or pass name; the nearest valid one is named.
        """
        given = dict(options or {})
        known = [*(field.name for field in dataclasses.fields(cls) if field.name != "project"), *PROJECT]
        for key in given:
            if key not in known:
                raise ConfigError(f"options[{key!r}] is not known.{nearest(str(key), known)}")
        disabled = given.get("disable_passes", ())
        disabled = (disabled,) if isinstance(disabled, str) else tuple(disabled)
        for name in disabled:
            one_of("options['disable_passes']", name, tuple(passes))
        patches = given.get("inductor") or {}
        if not isinstance(patches, Mapping):
            raise ConfigError(f"options['inductor'] must be a dict of Inductor config values, got {patches!r}.")
        strict = given.get("strict", False)
        if not isinstance(strict, bool):
            raise ConfigError(f"options['strict'] must be True or False, got {strict!r}.")
        return cls(
            compiler=one_of("options['compiler']", given.get("compiler", "inductor"), COMPILERS),
            disable_passes=disabled,
            strict=strict,
            mode=one_of("mode", given.get("mode") or mode or "default", MODES),
            inductor=tuple(sorted(patches.items())),
            joint_passes=_parse_passes("joint_passes", given),
            backward_passes=_parse_passes("backward_passes", given),
            project=_parse_project({key: given[key] for key in PROJECT if key in given}),
        )


def _parse_passes(key: str, given: Mapping[str, Any]) -> tuple[UserPass, ...]:
    """The user's own passes.

    Raises:
        ConfigError: one of them is no function.
    """
    asked = given.get(key) or ()
    passes = tuple(asked) if isinstance(asked, (list, tuple)) else (asked,)
    for pass_ in passes:
        if not callable(pass_) or not hasattr(pass_, "__name__"):
            raise ConfigError(f"options[{key!r}] must be functions pass_(gm, context) -> changes, got {pass_!r}.")
    return passes


def source_key(function: Callable[..., Any]) -> str:
    """A function's module, qualified name and the hash of its source; of its code where there is no source."""
    try:
        source = inspect.getsource(function).encode()
    except (OSError, TypeError):
        code = getattr(function, "__code__", None)
        source = repr(code and (code.co_code, code.co_consts, code.co_names)).encode()
    return f"{function.__module__}.{function.__qualname__}:{hashlib.sha256(source).hexdigest()[:16]}"


def _parse_project(given: Mapping[str, Any]) -> GroupOptions | None:
    """The keywords that the backend takes in place of a grass optimizer.

    Raises:
        ConfigError: there is no ``rank`` among them, or one is invalid.
    """
    if not given:
        return None
    if given.get("rank") is None:
        raise ConfigError(f"options {sorted(given)} say how to project weights, but options['rank'] is missing.")
    return parse_group({**PROJECT, **given})
