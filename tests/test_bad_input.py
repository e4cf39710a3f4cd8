"""Bad arguments: a `ConfigError` that says what, where and what to do."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import nn

import grass_compile
from grass_compile import ConfigError

from . import forms

BAD = [
    ({"rank": 0}, "rank must be a whole number of at least 1, a fraction of the width between 0 and 1, or None, got 0"),
    ({"rank": -3}, "a fraction of the width between 0 and 1, or None, got -3"),
    ({"rank": 2.5}, r"a fraction of the width between 0 and 1, or None, got 2\.5"),
    ({"rank": True}, "rank must be a whole number"),
    ({"rank": 1.0}, r"a fraction of the width between 0 and 1, or None, got 1\.0"),
    ({"rank": "full"}, "rank='full' is not available in this version"),
    ({"preset": "papers"}, "preset='papers' is not known. Did you mean 'paper'"),
    ({"scores": "estimate"}, "selection='uniform' looks at no scores"),
    ({"amsgrad": True}, "AdamW: amsgrad=True is not available"),
    ({"maximize": True}, "AdamW: maximize=True is not available"),
    ({"rnk": 3}, "AdamW: rnk=3 is not one of its keywords. Did you mean 'rank'"),
    ({"update_proj_gap": 0}, "update_proj_gap must be a whole number of at least 1"),
    ({"axis": "row"}, "axis='row' is not known. Did you mean 'rows'"),
    ({"selection": "tops"}, "selection='tops' is not known. Did you mean 'top'"),
    ({"on_refresh": "cary"}, "Did you mean 'carry'"),
    ({"scale": float("nan")}, "scale must be a finite number"),
    ({"exclude": "*head*"}, "exclude must be a list of name patterns"),
    ({"stagger": 0}, "stagger must be a whole number of at least 1, got 0"),
    ({"stagger": 1.5}, r"stagger must be a whole number of at least 1, got 1\.5"),
    ({"max_grad_norm": 0}, "max_grad_norm must be above 0, got 0"),
    ({"max_grad_norm": -1.0}, r"max_grad_norm must be above 0, got -1\.0"),
    ({"max_grad_norm": float("inf")}, "max_grad_norm must be a finite number, got inf"),
    ({"max_grad_norm": "x"}, "max_grad_norm must be a finite number, got 'x'"),
    ({"step_in_backward": "no"}, "step_in_backward must be 'auto', True or False, got 'no'"),
    ({"state_dtype": torch.int8}, r"state_dtype must be one of .*, got torch\.int8"),
    ({"seed": "x"}, "seed must be a whole number"),
    ({"seed": 1.5}, "seed must be a whole number"),
    ({"stochastic_rounding": "yes"}, "stochastic_rounding must be True or False, got 'yes'"),
    ({"lr": -1.0}, "AdamW: Invalid learning rate"),
    ({"betas": (1.0, 0.9)}, "AdamW: Invalid beta"),
]


@pytest.mark.parametrize(("keywords", "message"), BAD)
def test_bad_keyword(keywords: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        grass_compile.AdamW(nn.Linear(4, 4).named_parameters(), **keywords)


def test_config_error_is_a_value_error() -> None:
    assert issubclass(ConfigError, ValueError) and issubclass(ConfigError, grass_compile.GrassError)


def test_unknown_group_keyword() -> None:
    with pytest.raises(ConfigError, match="unknown keywords"):
        grass_compile.AdamW([{"params": list(nn.Linear(4, 4).parameters()), "ranks": 3}])


def test_parameter_twice() -> None:
    layer = nn.Linear(4, 4)
    with pytest.raises(ConfigError, match="w2: it is in the optimizer twice"):
        grass_compile.AdamW([("w1", layer.weight), ("w2", layer.weight)])
    with pytest.raises(ConfigError, match="in the optimizer twice"):
        grass_compile.AdamW([{"params": [layer.weight]}, {"params": [layer.weight, layer.bias]}])


def test_sparse_and_complex_weights() -> None:
    sparse = nn.Parameter(torch.eye(4).to_sparse())
    with pytest.raises(ConfigError, match="s: sparse weights are not supported"):
        grass_compile.AdamW([("s", sparse)])
    with pytest.raises(ConfigError, match="c: complex weights are not supported"):
        grass_compile.AdamW([("c", nn.Parameter(torch.ones(4, 4, dtype=torch.complex64)))])


@pytest.mark.parametrize(("key", "values"), [("step_in_backward", (True, False)), ("max_grad_norm", (None, 1.0))])
def test_what_belongs_to_the_optimizer_cannot_differ_between_groups(key: str, values: tuple[Any, Any]) -> None:
    layer = nn.Linear(4, 4)
    groups = [{"params": [layer.weight], key: values[0]}, {"params": [layer.bias], key: values[1]}]
    with pytest.raises(ConfigError, match=f"{key} differs between parameter groups"):
        grass_compile.AdamW(groups)
    optimizer = grass_compile.AdamW([groups[0]])
    with pytest.raises(ConfigError, match=f"{key} differs between parameter groups"):
        optimizer.add_param_group(groups[1])
    assert len(optimizer.param_groups) == 1


def test_compact_grad_of_a_stranger() -> None:
    optimizer = grass_compile.AdamW(nn.Linear(4, 4).named_parameters())
    with pytest.raises(ConfigError, match="this optimizer does not hold that parameter"):
        optimizer.compact_grad(nn.Parameter(torch.ones(4, 4)))


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"compilr": "inductor"}, r"options\['compilr'\] is not known. Did you mean 'compiler'"),
        ({"compiler": "eager"}, r"options\['compiler'\]='eager' is not known"),
        ({"disable_passes": ["rewrit"]}, "Did you mean 'rewrite'"),
        ({"strict": "yes"}, "must be True or False"),
        ({"mode": "fast"}, "mode='fast' is not known"),
        ({"inductor": 3}, "must be a dict of Inductor config values"),
        ({"rank": 0}, "rank must be a whole number of at least 1, a fraction of the width between 0 and 1, or None, got 0"),
        ({"rank": 4, "max_grad_norm": 1.0}, r"options\['max_grad_norm'\] needs a grass optimizer"),
        ({"rank": 4, "step_in_backward": False}, r"options\['step_in_backward'\] needs a grass optimizer"),
        ({"rank": 4, "preset": "papr"}, "Did you mean 'paper'"),
        ({"axis": "rows"}, r"options \['axis'\] say how to project weights, but options\['rank'\] is missing"),
        ({"rank": 4, "axis": "row"}, "axis='row' is not known. Did you mean 'rows'"),
    ],
)
def test_bad_backend_option(options: dict[str, Any], message: str) -> None:
    compiled = torch.compile(forms.LinearBias(), backend="grass", options=options)
    with pytest.raises(ConfigError, match=message):
        compiled(forms.batch(torch.float32))
