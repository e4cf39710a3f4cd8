"""The keywords of a grass optimizer that are ours rather than torch's: what is said of one is said here, and nowhere else.

`ProjectKeywords` is the table as editors and type checkers read it; `KEYWORDS` is the same table as the program reads it. From
these come the signatures of all optimizers, validation, ``options={...}`` of the backend and the table of docs/options.md.
"""

from __future__ import annotations

import dataclasses
import functools
import types
from collections.abc import Callable, Mapping, Sequence
from typing import Annotated, Any, Literal, TypedDict, Union, get_args, get_origin, get_type_hints

import torch

from . import checks
from .checks import nearest
from .errors import ConfigError

Axis = Literal["rows", "columns"]
AxisChoice = Literal["rows", "columns", "auto"]
OnRefresh = Literal["reset", "carry", "keep"]
Selection = Literal["top", "norm", "uniform"]
ProjectionKind = Literal["grass", "galore", "gaussian"]
Scores = Literal["exact", "sampled", "estimate"]
NonFinite = Literal["raise", "skip", "propagate"]

AXES = ("rows", "columns", "auto")

DEFAULT_EXCLUDE = ("*lm_head*", "*embed*")


class _Same:
    """Stands for "the same as otherwise"."""


@dataclasses.dataclass(frozen=True)
class Keyword:
    """One keyword.

    Attributes:
        default: what it is if nobody says.
        check: ``check(name, value)`` returns the value as it will be used, or raises `ConfigError`.
        doc: one line for the docs.
        whole: whether it belongs to the optimizer as a whole rather than to a parameter group.
        live: whether it may be changed in ``param_groups`` during training, with effect from the next forward on.
        unmodified: whether the backend takes it too, for a script that keeps its own ``torch.optim`` optimizer.
        dense: the default with a dense projection, where that is another.
        name: its name.
        type: its type, as it is written in `ProjectKeywords`.
    """

    default: Any
    check: Callable[[str, Any], Any]
    doc: str
    whole: bool = False
    live: bool = False
    unmodified: bool = True
    dense: Any = _Same
    name: str = ""
    type: str = ""

    def default_for(self, projection: object) -> Any:
        """The default, given the value of ``projection``."""
        return self.default if self.dense is _Same or projection == "grass" else self.dense


def _choice(*valid: str) -> Callable[[str, Any], Any]:
    return functools.partial(checks.one_of, valid=valid)


PRESETS: Mapping[str, Mapping[str, Any]] = {
    # The paper's recipe, which learned worst of all that was tried (docs/choosing.md).
    "paper": {"selection": "top", "on_refresh": "reset", "axis": "rows", "stagger": False, "update_proj_gap": 200},
}
"""Named sets of defaults."""


def _preset(what: str, value: Any) -> str | None:
    return None if value is None else checks.one_of(what, value, tuple(PRESETS))


class ProjectKeywords(TypedDict, total=False):
    """The keywords of every optimizer of this package, beside those of torch; docs/options.md says more about each."""

    rank: Annotated[
        int | float | None,
        Keyword(
            128, checks.rank, "r, how many columns (rows) move at a time; a float: that fraction of the width; `None`: dense"
        ),
    ]
    update_proj_gap: Annotated[
        int,
        Keyword(50, checks.positive_int, "steps between refreshes; the first backward is always a refresh", live=True),
    ]
    selection: Annotated[
        Selection,
        Keyword(
            "uniform",
            _choice("top", "norm", "uniform"),
            'a refresh draws blindly (`"uniform"`), draws by the norms (`"norm"`), or takes the largest (`"top"`)',
            dense="top",
        ),
    ]
    axis: Annotated[
        AxisChoice,
        Keyword(
            "columns",
            _choice(*AXES),
            '`"columns"` (in-features; saves activation memory too), `"rows"` (out-features), or `"auto"`, the cheaper',
            dense="auto",
        ),
    ]
    on_refresh: Annotated[
        OnRefresh,
        Keyword(
            "carry",
            _choice("reset", "carry", "keep"),
            "the moments: columns that stay selected keep theirs, all start from zero, or the old hand theirs to the new",
            dense="keep",
        ),
    ]
    stagger: Annotated[
        bool | int,
        Keyword(
            True,
            checks.bool_or_count,
            "weights refresh at steps of their own, or in so many parts of the gap",
            live=True,
        ),
    ]
    scale: Annotated[
        float, Keyword(1.0, checks.finite, "a factor on the update of projected weights (the paper's alpha)", live=True)
    ]
    exclude: Annotated[
        Sequence[str],
        Keyword(DEFAULT_EXCLUDE, checks.name_patterns, "name patterns (as in a shell) of weights that stay dense"),
    ]
    step_in_backward: Annotated[
        bool | Literal["auto"],
        Keyword(
            "auto",
            checks.bool_or_auto,
            "whether the weights move in `loss.backward()` or wait for `opt.step()`",
            whole=True,
            live=True,
            unmodified=False,
        ),
    ]
    max_grad_norm: Annotated[
        float | None,
        Keyword(
            None,
            checks.max_norm,
            "clip all gradients, compact and dense, by their common norm",
            whole=True,
            live=True,
            unmodified=False,
        ),
    ]
    nonfinite: Annotated[
        NonFinite,
        Keyword(
            "raise",
            _choice("raise", "skip", "propagate"),
            "a gradient that is infinite or NaN: its step is skipped and an error raised, skipped, or taken as in torch",
            whole=True,
            live=True,
        ),
    ]
    stochastic_rounding: Annotated[
        bool, Keyword(False, checks.boolean, "round bf16 weights and moments at random, so that small updates are not lost")
    ]
    state_dtype: Annotated[
        torch.dtype | None, Keyword(None, checks.state_dtype, "dtype of the moments; `None`: float32 at least")
    ]
    seed: Annotated[
        int | None,
        Keyword(None, checks.seed, "of drawn columns, random projections and rounding; `None` draws one, which is saved"),
    ]
    scores: Annotated[
        Scores,
        Keyword(
            "exact",
            _choice("exact", "sampled", "estimate"),
            'what `"norm"` and `"top"` go by; only `"exact"` ever forms a full gradient',
        ),
    ]
    share_index: Annotated[
        bool, Keyword(False, checks.boolean, "weights that read the same activations (q, k, v; gate, up) choose columns together")
    ]
    block: Annotated[
        int,
        Keyword(1, checks.positive_int, "columns are chosen so many neighbours at a time, which a GPU's memory moves together"),
    ]
    projection: Annotated[
        ProjectionKind,
        Keyword(
            "grass",
            _choice("grass", "galore", "gaussian"),
            "columns or rows; `r` singular vectors of the gradient at the last refresh; `r` random vectors",
        ),
    ]
    preset: Annotated[
        Literal["paper"] | None,
        Keyword(None, _preset, "other defaults: what is given beside it goes before it"),
    ]


def _table() -> tuple[Keyword, ...]:
    hints, written = get_type_hints(ProjectKeywords, include_extras=True), get_type_hints(ProjectKeywords)
    return tuple(
        dataclasses.replace(hint.__metadata__[0], name=name, type=_spelled(written[name])) for name, hint in hints.items()
    )


def _spelled(hint: Any) -> str:
    """A type as the docs write it: a choice by its values."""
    if get_origin(hint) is Literal:
        return ", ".join(_code(value) for value in get_args(hint))
    if get_origin(hint) in (Union, types.UnionType):
        return ", ".join(_spelled(one) for one in get_args(hint))
    if hint is type(None):
        return "`None`"
    if isinstance(hint, type) and get_origin(hint) is None:
        return f"`{hint.__name__}`" if hint.__module__ == "builtins" else f"`{hint.__module__}.{hint.__name__}`"
    return "`" + str(hint).replace("collections.abc.", "") + "`"


def _code(value: Any) -> str:
    return "`" + repr(value).replace("'", '"') + "`"


KEYWORDS: tuple[Keyword, ...] = _table()
"""The table, in the order of the docs."""

PROJECT: Mapping[str, Keyword] = {keyword.name: keyword for keyword in KEYWORDS}
"""The same by name."""

STORED = tuple(keyword for keyword in KEYWORDS if keyword.name != "preset")
"""Those that a parameter group holds; a preset is spelled out when the group is made."""

COMMON = tuple(keyword.name for keyword in KEYWORDS if keyword.whole)
"""Those that belong to an optimizer as a whole."""


def completed(*given: Mapping[str, Any]) -> dict[str, Any]:
    """All keywords of one parameter group.

    Args:
        *given: what was given, the most particular first: what a group says goes before what its optimizer says, and in each
            a keyword goes before a preset.

    Returns:
        A value for each keyword of `STORED`; where nothing was given its default, which may depend on the projection.

    Raises:
        ConfigError: a preset is not known.
    """
    chosen: dict[str, Any] = {}
    for keywords in given:
        preset = _preset("preset", keywords.get("preset"))
        own = {name: keywords[name] for name in PROJECT if name in keywords}
        chosen = {**(PRESETS[preset] if preset else {}), **own, **chosen}
    projection = chosen.get("projection", PROJECT["projection"].default)
    return {keyword.name: chosen.get(keyword.name, keyword.default_for(projection)) for keyword in STORED}


def check_names(given: Mapping[str, Any], where: str) -> None:
    """Refuse what is not a keyword of ours.

    Args:
        given: keywords.
        where: who was given them, for the message.

    Raises:
        ConfigError: naming the first, and the nearest valid one.
    """
    for key, value in given.items():
        if key not in PROJECT:
            raise ConfigError(f"{where}: {key}={value!r} is not one of its keywords.{nearest(key, PROJECT)}")


def markdown() -> str:
    """The table of docs/options.md."""
    lines = ["| keyword | default | values | meaning | |", "| --- | --- | --- | --- | --- |"]
    for keyword in KEYWORDS:
        notes = [note for note, holds in (("whole optimizer", keyword.whole), ("live", keyword.live)) if holds]
        default = _code(keyword.default)
        if keyword.dense is not _Same:
            default += f"; {_code(keyword.dense)} with a dense projection"
        lines.append(f"| `{keyword.name}` | {default} | {keyword.type} | {keyword.doc} | {', '.join(notes)} |")
    return "\n".join(lines)
