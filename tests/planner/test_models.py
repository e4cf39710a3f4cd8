"""Models by name, by file, by function."""

from __future__ import annotations

import json
import sys
from pathlib import Path

import pytest
import torch
from torch import nn
from torch._subclasses.fake_tensor import FakeTensor, FakeTensorMode

from grass_compile import ConfigError
from grass_compile.planner.models import NAMES, as_fake, load

pytest.importorskip("transformers", reason="builds its models")

BILLIONS = {
    "llama-60m": 0.058, "llama-130m": 0.134, "llama-350m": 0.368, "llama-1b": 1.339,  # GaLore's code counts these
    "llama-7b": 6.74, "llama-13b": 13.02, "llama-30b": 32.5, "llama-65b": 65.2,  # LLaMA's paper: 6.7, 13.0, 32.5, 65.2
    "llama-3.1-8b": 8.03, "llama-3.1-70b": 70.6,
    "gemma-2b": 2.51, "gemma-7b": 8.54,
    "qwen3-8b": 8.19,
}  # fmt: skip


@pytest.mark.parametrize("name", NAMES)
def test_built_in_names_have_the_sizes_of_their_papers(name: str) -> None:
    model = load(name, torch.bfloat16, False)
    assert all(parameter.is_meta for parameter in model.parameters())
    assert sum(parameter.numel() for parameter in model.parameters()) / 1e9 == pytest.approx(BILLIONS[name], rel=6e-3)


def test_a_configuration_by_file_and_by_folder(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text(json.dumps(NAMES["llama-60m"]))
    for path in (tmp_path, tmp_path / "config.json"):
        assert sum(p.numel() for p in load(str(path), None, False).parameters()) == 58073600


def raises() -> nn.Module:
    raise RuntimeError("no such luck")


def leaves() -> nn.Module:
    sys.exit(0)


def returns_a_number() -> int:
    return 3


BAD = {
    "no-such-model": "neither a built-in name",
    "no_such_module:f": "raised ModuleNotFoundError",
    f"{__name__}:raises": "no such luck",
    f"{__name__}:leaves": "raised SystemExit",
    f"{__name__}:returns_a_number": "returned int",
}


@pytest.mark.parametrize("name", BAD)
def test_names_that_say_nothing(name: str) -> None:
    with pytest.raises(ConfigError, match=BAD[name]):
        load(name, None, False)


@pytest.mark.parametrize(
    ("content", "says"),
    [
        ("{", "is not JSON"),
        ("[1]", "holds list"),
        ('{"model_type": "nonsense"}', "does not know"),
        ('{"model_type": "llama", "hidden_size": "x"}', "cannot build"),
    ],
)
def test_configurations_that_say_nothing(content: str, says: str, tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text(content)
    with pytest.raises(ConfigError, match=says):
        load(str(tmp_path), None, False)


def test_checkpointing_needs_a_model_that_knows_it() -> None:
    with pytest.raises(ConfigError, match="gradient_checkpointing_enable"):
        load(nn.Linear(3, 3), None, True)  # type: ignore[arg-type]


class Table(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.linear = nn.Linear(4, 4)
        self.also = self.linear.weight
        self.tables = [torch.ones(3), {"cos": torch.ones(5)}]


def test_a_copy_without_memory_has_what_a_module_holds_beside_parameters() -> None:
    model = Table()
    with FakeTensorMode():
        shadow = as_fake(model, torch.bfloat16)
    assert shadow.also is shadow.linear.weight and shadow.also.dtype == torch.bfloat16  # type: ignore[union-attr]
    assert all(isinstance(tensor, FakeTensor) for tensor in (shadow.tables[0], shadow.tables[1]["cos"]))  # type: ignore[index]
    assert model.linear.weight.dtype == torch.float32 and torch.equal(model.tables[0], torch.ones(3))  # type: ignore[arg-type]
