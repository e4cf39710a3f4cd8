"""Validated settings: what one weight is asked to do (`SiteConfig`) and what one compilation is asked to do (`BackendOptions`).

Nothing here looks at a tensor's values. Both are frozen and hashable, because what is compiled is keyed by them.
"""

from __future__ import annotations

import dataclasses
import hashlib
import inspect
from collections.abc import Callable, Iterable, Mapping
from typing import Any, Literal, TypeAlias, TypeVar

import torch

from .checks import boolean, nearest, one_of
from .distributed.layout import Layout
from .errors import ConfigError
from .keywords import KEYWORDS, PROJECT, STORED, AxisChoice, NonFinite, OnRefresh, ProjectionKind, Scores, Selection, completed

UserPass: TypeAlias = Callable[..., int]
"""``pass_(gm, context) -> changes``; changes an ``fx.GraphModule`` in place."""

COMPILERS = ("inductor", "aot_eager")
MODES = ("default", "reduce-overhead", "max-autotune", "max-autotune-no-cudagraphs")


T = TypeVar("T", bound=type)


def hashed_once(cls: T) -> T:
    """A frozen dataclass whose instances compute their hash once: they are keys in every call of a compiled region."""
    compute: Any = cls.__hash__

    def hash_once(self: Any) -> int:
        known: int | None = self.__dict__.get("_hash")
        if known is None:
            known = compute(self)
            object.__setattr__(self, "_hash", known)
        return known

    def state(self: Any) -> dict[str, Any]:  # in another process, strings hash to other numbers
        return {name: value for name, value in self.__dict__.items() if name != "_hash"}

    type.__setattr__(cls, "__hash__", hash_once)
    type.__setattr__(cls, "__getstate__", state)
    return cls


@hashed_once
@dataclasses.dataclass(frozen=True)
class SiteConfig:
    """The optimizer's request for one weight. Hashable: part of the key of compiled graphs.

    Attributes:
        rank: number of rows (columns) that move at a time; a float is a fraction of the weight's size along the axis.
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
        block: how many neighbouring rows (columns) are chosen together.
        layout: how the weight is spread over processes; None on one.
    """

    rank: int | float
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
    block: int = 1
    layout: Layout | None = None

    @property
    def counted(self) -> bool:
        """Whether the step itself counts the updates of the moments, beside them: by row, or because some are skipped."""
        return self.checked or self.on_refresh == "carry"

    @property
    def exchanges(self) -> bool:
        """Whether a step calls collectives."""
        return self.rule.exchanges or self.crossed is not None

    @property
    def crossed(self) -> Layout | None:
        """The layout, where the gradient and the state are spread otherwise than the weight; None for any other weight."""
        return self.layout if self.layout is not None and self.layout.crossed is not None else None

    @property
    def chosen_by(self) -> str:
        """The use that a refresh makes of the full gradient: a selection of rows, see `math.selection.select`, or ``galore``."""
        return f"{self.selection}/{self.block}" if self.projection == "grass" else self.projection

    @property
    def step_alone(self) -> SiteConfig:
        """The same as far as a step between refreshes goes; configurations for which this is equal share compiled steps."""
        on_refresh: OnRefresh = "carry" if self.on_refresh == "carry" else "reset"
        common = dataclasses.replace(self, selection="top", scores="exact", share_index=False, block=1, layout=self.crossed)
        return dataclasses.replace(common, on_refresh=on_refresh)


@dataclasses.dataclass(frozen=True)
class GroupOptions:
    """The keywords of a parameter group that are ours rather than torch's, after validation."""

    rank: int | float | None
    update_proj_gap: int
    axis: AxisChoice
    on_refresh: OnRefresh
    scale: float
    exclude: tuple[str, ...]
    stochastic_rounding: bool
    state_dtype: torch.dtype | None
    seed: int
    selection: Selection
    stagger: int
    scores: Scores
    nonfinite: NonFinite
    projection: ProjectionKind
    share_index: bool
    block: int

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
        """The request of these keywords for one weight; ``rank`` must not be None."""
        assert self.rank is not None
        common = {field.name for field in dataclasses.fields(SiteConfig)} & {field.name for field in dataclasses.fields(self)}
        asked = {name: getattr(self, name) for name in common if name != "axis"}
        return SiteConfig(**asked, axis=axis, decays=decays, rule=rule, checked=self.checked)


STAGGER_SLOTS = 4
"""Parts of an interval over which ``stagger=True`` spreads the refreshes, where each part is a graph to compile."""


def parse_group(group: Mapping[str, Any]) -> GroupOptions:
    """Validate our keywords of one parameter group, which has a value for each (`completed`).

    Raises:
        ConfigError: a value is out of range, unknown, or belongs to a feature that this version does not have; or two of them
            contradict each other.
    """
    values = {keyword.name: keyword.check(keyword.name, group[keyword.name]) for keyword in STORED}
    _check_dense_projection(values)
    _check_scores(values)
    options = GroupOptions(**{field.name: values[field.name] for field in dataclasses.fields(GroupOptions)})
    if isinstance(options.stagger, bool):
        options = dataclasses.replace(options, stagger=_slots(options))
    return options


def _slots(options: GroupOptions) -> int:
    """In how many parts of the interval refreshes fall: as many as it has steps, where no part is a graph to compile."""
    if not options.stagger:
        return 1
    return options.update_proj_gap if options.blind or options.proposes_anytime else STAGGER_SLOTS


def _check_scores(values: Mapping[str, Any]) -> None:
    """Refuse scores that nothing goes by, and shared columns by scores that cannot be summed.

    Raises:
        ConfigError: naming the keywords.
    """
    if values["scores"] != "exact" and values["selection"] == "uniform":
        raise ConfigError(
            f"scores={values['scores']!r} is for selection='top' and 'norm'; selection='uniform' looks at no scores. Leave "
            "scores out, or name one of these selections."
        )
    if values["share_index"] and values["scores"] == "exact" and values["selection"] != "uniform":
        raise ConfigError(
            "share_index=True chooses the columns of several weights by the sum of their scores; exact ones would need all of "
            "their full gradients at once. Use selection='uniform', or scores='sampled' or 'estimate'."
        )


def _check_dense_projection(values: Mapping[str, Any]) -> None:
    """Refuse keywords about selected rows, which a dense projection does not have.

    Raises:
        ConfigError: naming the keyword.
    """
    projection = values["projection"]
    if projection == "grass":
        return
    for key, only in (("selection", "top"), ("share_index", False), ("scores", "exact"), ("block", 1)):
        if values[key] != only:
            raise ConfigError(
                f"{key}={values[key]!r} is about which rows are selected; projection={projection!r} selects none. Leave {key} "
                "out, or use projection='grass'."
            )
    if values["on_refresh"] == "carry":
        raise ConfigError(
            f"on_refresh='carry' lets rows that stay selected keep their moments; projection={projection!r} selects none. Use "
            "on_refresh='reset', or 'keep'."
        )


@hashed_once
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
        project: for an unmodified script, what to ask of the weights that its own ``torch.optim`` optimizer holds: ``rank``
            and, beside it, other `grass_compile.keywords`; None without ``rank``.
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
        """The part of the keys of compile caches that stands for the user's passes."""
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
        for key, keyword in PROJECT.items():
            if key in given and not keyword.unmodified:
                raise ConfigError(
                    f"options[{key!r}] needs a grass optimizer: with options={{'rank': ...}} the weights move in the step() of "
                    "your own. Leave it out, or use grass_compile.AdamW."
                )
        known = [field.name for field in dataclasses.fields(cls) if field.name != "project"]
        known += [keyword.name for keyword in KEYWORDS if keyword.unmodified]
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
        return cls(
            compiler=one_of("options['compiler']", given.get("compiler", "inductor"), COMPILERS),
            disable_passes=disabled,
            strict=boolean("options['strict']", given.get("strict", False)),
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
        ConfigError: ``rank`` is missing, or one is invalid.
    """
    if not given:
        return None
    if given.get("rank") is None:
        raise ConfigError(f"options {sorted(given)} say how to project weights, but options['rank'] is missing.")
    return parse_group(completed(given))
