"""Tensor parallelism, alone and under ``fully_shard``: ranks train as one process does on the joined batch."""

from __future__ import annotations

import contextlib
import dataclasses
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import Replicate, Shard, distribute_tensor
from torch.distributed.tensor.parallel import (
    ColwiseParallel,
    PrepareModuleInput,
    RowwiseParallel,
    SequenceParallel,
    loss_parallel,
    parallelize_module,
)

import grass_compile
from grass_compile import ConfigError, NonFiniteError, StateError

from ..pairs import every_value
from .compare import SHAPES, compare, how
from .llama import llama
from .ranks import Ranks, result_of
from .training import (
    Trained,
    Training,
    batches,
    load_and_go_on,
    partly_eager,
    save_and_go_on,
    step_of,
    train,
    whole,
    with_a_penalty,
)


def parallel(keywords: tuple[tuple[str, Any], ...] = (), **rest: Any) -> Training:
    return Training(keywords, **{"place": "model", "tensor": 2, **rest})


@every_value(selection=["uniform", "top", "norm"], mode=[True, "auto", False], place=["model", "blocks"])
def test_two_ranks_are_one_process(ranks: Ranks, selection: str, mode: Any, place: str) -> None:
    """Columns of what is sharded by rows and rows of what is sharded by columns. No gradient is sent: on a regular step whether
    each is finite, on a refresh the scores, which say that too."""
    found = compare(ranks, parallel(how(selection=selection, step_in_backward=mode), place=place))
    assert found.fused == (mode is not False)
    scores = 0 if selection == "uniform" else sum(min(shape) for shape in SHAPES) - len(SHAPES)
    assert found.refresh["_c10d_functional"] - found.regular["_c10d_functional"] == scores


FEATURES = [
    parallel(optimizer="Muon"),
    parallel(how(max_grad_norm=0.05, selection="top"), micro=2),
    pytest.param(parallel(how(selection="top", block=4)), marks=pytest.mark.exhaustive),
    pytest.param(parallel(how(selection="top", scores="estimate", block=2)), marks=pytest.mark.exhaustive),
    pytest.param(
        parallel(how(nonfinite="propagate", on_refresh="reset", selection="top"), checkpoint=True), marks=pytest.mark.exhaustive
    ),
    parallel(how(share_index=True, stagger=True, exclude=["*.0.query.weight", "*embedding*", "lm_head*"])),
    pytest.param(parallel(how(selection="top"), compiler="inductor"), marks=[pytest.mark.inductor, pytest.mark.exhaustive]),
]


@pytest.mark.parametrize("training", FEATURES, ids=lambda t: f"{t.optimizer}-{dict(t.how)}-{t.compiler}")
def test_features(ranks: Ranks, training: Training) -> None:
    compare(ranks, training)


FOUR = [
    parallel(how(selection="top"), mesh=(2,), world=4, place="blocks"),
    pytest.param(
        parallel(how(step_in_backward=False, selection="norm"), mesh=(2,), world=4, place="blocks"), marks=pytest.mark.exhaustive
    ),
    pytest.param(parallel(optimizer="Muon", mesh=(2,), world=4, place="blocks"), marks=pytest.mark.exhaustive),
    pytest.param(parallel(tensor=4, world=4), marks=pytest.mark.exhaustive),
]


@pytest.mark.parametrize("training", FOUR, ids=lambda t: f"{t.optimizer}-{t.mesh}-{t.tensor}")
def test_four_ranks(four: Ranks, training: Training) -> None:
    """Tensor parallelism under ``fully_shard``, which takes the parts apart once more; and four parts."""
    compare(four, training)


def crossed(keywords: tuple[tuple[str, Any], ...] = (), **rest: Any) -> Training:
    return parallel(keywords, **{"mesh": (2,), "world": 4, "place": "blocks", "crossed": True, **rest})


CROSSED = [
    crossed(how(selection="top")),
    crossed(how(selection="norm", step_in_backward=False, max_grad_norm=0.05), micro=2, hidden=26),
    crossed(how(scores="estimate", selection="top", on_refresh="reset"), optimizer="SGD"),
    pytest.param(crossed(how(on_refresh="carry"), optimizer="Muon"), marks=pytest.mark.exhaustive),
    crossed(how(selection="top"), fsdp=how(dim=1)),
    pytest.param(crossed(how(selection="top"), mesh=(2, 1)), marks=pytest.mark.exhaustive),
    pytest.param(crossed(how(selection="top"), mesh=(1, 2)), marks=pytest.mark.exhaustive),
    pytest.param(crossed(compiler="inductor"), marks=[pytest.mark.inductor, pytest.mark.exhaustive]),
]


@pytest.mark.parametrize("training", CROSSED, ids=lambda t: f"{t.optimizer}-{dict(t.how)}")
def test_shards_along_both_dimensions(four: Ranks, training: Training) -> None:
    """``fully_shard`` as it is by default over ``RowwiseParallel``: the state is spread along the other dimension."""
    compare(four, training)


def explained_crossed() -> tuple[str, int, int]:
    """What is said of a weight of which each rank has a quarter, and how much it exchanges and keeps."""
    run = Trained(crossed())
    report = grass_compile.explain(run.model, batches(1)[0][:, :-1], optimizer=run.optimizer)
    row = report["layers.0.down.weight"]
    return row.reason, row.sent_bytes, row.state_bytes


def test_what_is_said_of_both_dimensions(four: Ranks) -> None:
    """``[16, 24]`` at rank 4: 4 x 12 numbers of a gradient are reduced, 4 x 6 of an update gathered, and 2 x 4 x 6 kept."""
    for reason, sent, kept in result_of(four(explained_crossed)):
        assert "in 2 x 2 parts along both dimensions, its state along dimension 1" in reason
        assert (sent, kept) == (4 * (4 * 12 + 4 * 6), 4 * 2 * 4 * 6)


def read_on_all(training: Training) -> None:
    """A script that looks at the gradient of a weight whose rows are elsewhere."""
    run = Trained(training)
    run.run(batches(1)[0][:, :-1]).square().mean().backward()
    run.model.layers[0].down.weight.grad.to_local().abs()


@pytest.mark.parametrize(
    ("function", "said"),
    [
        (read_on_all, "layers.0.down.weight: fully_shard and tensor"),
        pytest.param(with_a_penalty, "comes from outside", marks=pytest.mark.exhaustive),
        (partly_eager, "comes from outside"),
    ],
)
def test_gradients_of_both_dimensions_that_are_refused(four: Ranks, function: Any, said: str) -> None:
    for error in four(function, crossed(how(step_in_backward=False))):
        assert isinstance(error, StateError) and said in str(error) and "shard_placement_fn" in str(error)


@pytest.mark.parametrize("mesh", [pytest.param((), marks=pytest.mark.exhaustive), (2,)])
def test_checkpoint(ranks: Ranks, four: Ranks, mesh: tuple[int, ...], tmp_path: Path) -> None:
    """From two ranks that share each batch to four of which two share each, and the other way round; bit for bit to the same."""
    groups = {(): ranks, (2,): four}
    training = parallel(how(selection="top"), place="blocks", mesh=mesh, world=groups[mesh].size)
    go_on(training, groups[mesh], [(dataclasses.replace(training, mesh=m, world=g.size), g) for m, g in groups.items()], tmp_path)


def test_checkpoint_along_both_dimensions(ranks: Ranks, four: Ranks, tmp_path: Path) -> None:
    """To the same, and from tensor parallelism alone."""
    training = crossed(how(selection="top"))
    go_on(training, four, [(training, four)], tmp_path / "same")
    go_on(dataclasses.replace(training, crossed=False, mesh=(), world=2), ranks, [(training, four)], tmp_path / "other")


@pytest.mark.exhaustive
def test_checkpoint_from_both_dimensions(ranks: Ranks, four: Ranks, tmp_path: Path) -> None:
    """To four ranks with both shards along one dimension, and to tensor parallelism alone."""
    training = crossed(how(selection="top"))
    one = dataclasses.replace(training, crossed=False)
    go_on(training, four, [(one, four), (dataclasses.replace(one, mesh=(), world=2), ranks)], tmp_path)


def go_on(training: Training, group: Ranks, others: list[tuple[Training, Ranks]], folder: Path) -> None:
    """Save, and go on from there in others; bit for bit in the same."""
    expected = result_of(group(save_and_go_on, training, str(folder), 4))[0]
    for target, ranks in others:
        found = result_of(ranks(load_and_go_on, target, str(folder), 4))[0]
        for name, weight in expected.items():
            tolerance = 0 if target == training else 1e-5
            torch.testing.assert_close(
                found[name], weight, rtol=tolerance, atol=tolerance, msg=lambda text, name=name: f"{name}: {text}"
            )


@pytest.mark.parametrize("function", [with_a_penalty, partly_eager])
def test_gradients_from_outside(ranks: Ranks, function: Any) -> None:
    training = parallel(how(selection="top"), place="blocks")
    expected = function(training, distributed=False)
    for found in result_of(ranks(function, training)):
        for name, weight in expected.items():
            torch.testing.assert_close(found[name], weight, rtol=1e-5, atol=1e-5, msg=lambda text, n=name: f"{n}: {text}")


def not_finite_on_one(training: Training) -> dict[str, bool]:
    """A step in which the gradient of one rank's part is not finite; whether each weight has moved."""
    run = Trained(training)
    step_of(run, batches(1)[0])
    before = {name: parameter.clone() for name, parameter in run.weights().items()}
    parameter = dict(run.model.named_parameters())["layers.0.up.weight"]
    loss = run.run(batches(1)[0][:, :-1]).square().mean()
    first = parameter.to_local()[0, 0]
    loss = loss + (first - first.detach()) * (torch.inf if dist.get_rank() == 0 else 0.0)
    loss.backward()
    with contextlib.suppress(NonFiniteError):
        run.optimizer.step()
    return {name: not torch.equal(weight, before[name]) for name, weight in run.weights().items()}


def test_all_ranks_skip_the_same_steps(ranks: Ranks) -> None:
    first, second = result_of(ranks(not_finite_on_one, parallel(place="blocks")))
    assert first == second and not first["layers.0.up.weight"] and first["layers.1.up.weight"]


@pytest.mark.parametrize(
    ("training", "said"),
    [
        (parallel(how(axis="rows")), "layers.0.query.weight: each rank owns a part of it along dimension 0, so axis='rows'"),
        (parallel(optimizer="AdamW8bit"), "AdamW8bitRule looks at whole rows"),
    ],
    ids=str,
)
def test_keywords_that_do_not_go_with_parts(ranks: Ranks, training: Training, said: str) -> None:
    for error in ranks(train, training):
        assert isinstance(error, ConfigError) and said in str(error)


def explained_replicated() -> str:
    """What is said of a weight that all ranks have the same of, as a ``DTensor``."""
    model = nn.Sequential(nn.Linear(8, 8, bias=False))
    mesh = init_device_mesh("cpu", (2,))
    model[0].weight = nn.Parameter(distribute_tensor(model[0].weight.detach(), mesh, [Replicate()]))
    optimizer = grass_compile.AdamW(model.named_parameters(), rank=2)
    inputs = distribute_tensor(torch.ones(4, 8), mesh, [Replicate()])
    return grass_compile.explain(model, inputs, optimizer=optimizer)["0.weight"].reason


def test_a_weight_that_is_not_in_parts_stays_dense(ranks: Ranks) -> None:
    for reason in result_of(ranks(explained_replicated)):
        assert "it is a DTensor with placements (R); one is projected only if" in reason


# ------------------------------------------------------------------------------------- what is not in parts beside


class Inner(nn.Module):
    """The inner layers of a block."""

    def __init__(self) -> None:
        super().__init__()
        self.norm, self.up, self.down = nn.LayerNorm(16), nn.Linear(16, 24), nn.Linear(24, 16, bias=False)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x + self.down(self.up(self.norm(x)).relu())  # type: ignore[no-any-return]


def trained(model: nn.Module, inputs: torch.Tensor, reads: bool = False, **keywords: Any) -> dict[str, torch.Tensor]:
    """Four steps, after each of which a gradient may be read; the weights, and the rows by the names of the weights."""
    named = list(model.named_parameters())
    down = [pair for pair in named if pair[0].endswith("down.weight")]
    rest = [pair for pair in named if pair[0] not in dict(down)]
    of_down = {"rank": keywords.pop("rank_of_down", 4), "axis": "rows"}
    optimizer = grass_compile.AdamW(
        [{"params": rest}, {"params": down, **of_down}] if down else rest, **{"rank": 4, "eps": 1e-6, **keywords}
    )
    compiled = torch.compile(model, backend="grass", options={"compiler": "aot_eager"})
    for _ in range(4):
        compiled(inputs).square().sum().backward()
        if reads:
            named[2][1].grad.abs()
        optimizer.step()
        optimizer.zero_grad()
    if dist.is_initialized():
        optimizer.check_agreement()
    rows = {f"{name}: rows": optimizer.state[p]["index"] for name, p in named if "index" in optimizer.state[p]}
    return {name: whole(parameter).clone() for name, parameter in named} | rows


def unequal_parts() -> dict[str, torch.Tensor]:
    """Three rows on two ranks, of which one could not be projected alone."""
    model = nn.Sequential(nn.Linear(16, 3))
    parallelize_module(model, init_device_mesh("cpu", (2,)), {"0": ColwiseParallel(output_layouts=Replicate())})
    return trained(model, torch.ones(4, 16), rank=2, selection="top")


def test_ranks_with_unequal_parts_agree_on_what_is_projected(ranks: Ranks) -> None:
    first, second = result_of(ranks(unequal_parts))
    assert first.keys() == second.keys() == {"0.weight", "0.bias"}


def drawn_seeds() -> dict[str, torch.Tensor]:
    """A plain block before one in parts, and a seed that each rank draws for itself."""
    model = nn.Sequential(Inner(), Inner())
    parallelize_module(model, init_device_mesh("cpu", (2,)), {"1.up": ColwiseParallel(), "1.down": RowwiseParallel()})
    torch.manual_seed(dist.get_rank())
    return trained(model, torch.ones(4, 16))


def test_weights_that_are_not_in_parts_have_the_same_rows_everywhere(ranks: Ranks) -> None:
    first, second = result_of(ranks(drawn_seeds))
    assert sum(name.endswith("rows") for name in first) == 4
    for name, tensor in first.items():
        assert torch.equal(tensor, second[name]), name


def sequence_parallel(reads: bool) -> dict[str, torch.Tensor]:
    """Gradients of the norm that are sums of which each rank has a part; the first rank may read a gradient in each step."""
    model = nn.Sequential(Inner())
    plan = {
        "0": PrepareModuleInput(input_layouts=Replicate(), desired_input_layouts=Shard(1), use_local_output=True),
        "0.norm": SequenceParallel(use_local_output=True),
        "0.up": ColwiseParallel(input_layouts=Shard(1)),
        "0.down": RowwiseParallel(output_layouts=Shard(1)),
    }
    parallelize_module(model, init_device_mesh("cpu", (2,)), plan)
    return trained(model, torch.ones(2, 4, 16), reads=reads and dist.get_rank() == 0, seed=1)


def test_a_rank_that_logs_under_sequence_parallelism(ranks: Ranks) -> None:
    expected = result_of(ranks(sequence_parallel, False))[0]
    for found in result_of(ranks(sequence_parallel, True)):
        for name, tensor in expected.items():
            torch.testing.assert_close(found[name], tensor, rtol=1e-5, atol=1e-5)


def clipped(nonfinite: str, mode: bool, distributed: bool = True) -> dict[str, torch.Tensor]:
    """One norm of gradients of which some are in parts and others are not."""
    torch.manual_seed(0)
    model = nn.Sequential(Inner())
    if distributed:
        plan = {"0.down": RowwiseParallel(input_layouts=Replicate())}
        parallelize_module(model, init_device_mesh("cpu", (2,)), plan)
    how = dict(nonfinite=nonfinite, step_in_backward=mode, max_grad_norm=0.01, rank_of_down=None, seed=1)
    return trained(model, torch.ones(4, 16), **how)


@every_value(nonfinite=["propagate", "skip"], mode=[True, False])
def test_one_norm_of_what_is_in_parts_and_what_is_not(ranks: Ranks, nonfinite: str, mode: bool) -> None:
    expected = clipped(nonfinite, mode, distributed=False)
    for found in result_of(ranks(clipped, nonfinite, mode)):
        for name, tensor in expected.items():
            torch.testing.assert_close(found[name], tensor, rtol=1e-5, atol=1e-5)


# --------------------------------------------------------------------------------------- a model of Hugging Face


def plan_of(kind: str) -> list[tuple[str, dict[str, Any]]]:
    """What is made parallel, by the module that the names start from."""
    split, local = ColwiseParallel(), {"use_local_output": True}
    layer: dict[str, Any] = dict.fromkeys(("q_proj", "k_proj", "v_proj"), split)
    layer = {f"self_attn.{name}": how for name, how in layer.items()} | {"mlp.gate_proj": split, "mlp.up_proj": split}
    if kind != "sequence":
        joined = {"self_attn.o_proj": RowwiseParallel(), "mlp.down_proj": RowwiseParallel()}
        head = ColwiseParallel(output_layouts=Shard(-1), use_local_output=False) if kind == "loss" else split_whole()
        return [("model.layers", layer | joined), ("", {"lm_head": head})]
    joined = {name: RowwiseParallel(output_layouts=Shard(1)) for name in ("self_attn.o_proj", "mlp.down_proj")}
    whole_input = {"input_layouts": Shard(1), "desired_input_layouts": Replicate()}
    around = {
        "input_layernorm": SequenceParallel(**local),
        "post_attention_layernorm": SequenceParallel(**local),
        "self_attn": PrepareModuleInput(
            input_kwarg_layouts={"hidden_states": Shard(1)}, desired_input_kwarg_layouts={"hidden_states": Replicate()}, **local
        ),
        "mlp": PrepareModuleInput(**whole_input, **local),
    }
    first = PrepareModuleInput(input_layouts=Replicate(), desired_input_layouts=Shard(1), **local)
    last = {
        "model.norm": SequenceParallel(**local),
        "lm_head": ColwiseParallel(input_layouts=Shard(1), output_layouts=Replicate()),
    }
    return [("model.layers", layer | joined | around), ("", {"model.layers.0": first, **last})]


def split_whole() -> ColwiseParallel:
    return ColwiseParallel(output_layouts=Replicate())


def train_llama(kind: str, distributed: bool = True) -> tuple[dict[str, torch.Tensor], int]:
    """Seven steps, under ``fully_shard`` where there are four ranks; the weights, and how many of them are projected."""
    model, first = llama(), slice(None)
    if distributed:
        shards = dist.get_world_size() // 2
        mesh = init_device_mesh("cpu", (shards, 2), mesh_dim_names=("shards", "tensor"))
        for path, plan in plan_of(kind):
            for module in model.get_submodule(path) if path else [model]:
                parallelize_module(module, mesh["tensor"], plan)
        if shards > 1:
            first = slice(2 * mesh.get_local_rank("shards"), 2 * mesh.get_local_rank("shards") + 2)
            for layer in (*model.model.layers, model):
                fully_shard(layer, mesh=mesh["shards"])
    named = list(model.named_parameters())
    rowwise = [pair for pair in named if pair[0].endswith(("o_proj.weight", "down_proj.weight"))]
    groups = [{"params": [pair for pair in named if pair[0] not in dict(rowwise)]}, {"params": rowwise, "axis": "rows"}]
    optimizer = grass_compile.AdamW(
        groups, lr=1e-2, weight_decay=0.1, eps=1e-6, rank=8, selection="top", update_proj_gap=3, seed=5
    )
    compiled = torch.compile(model, backend="grass", options={"compiler": "aot_eager"})
    generator = torch.Generator().manual_seed(1)
    for _ in range(7):
        tokens = torch.randint(64, (4, 13), generator=generator)[first]
        with loss_parallel() if distributed and kind == "loss" else contextlib.nullcontext():
            logits = compiled(input_ids=tokens[:, :-1]).logits
            F.cross_entropy(logits.flatten(0, 1), tokens[:, 1:].flatten()).backward()
        optimizer.step()
        optimizer.zero_grad()
    projected = sum("index" in optimizer.state[parameter] for parameter in model.parameters())
    return {name: whole(parameter).clone() for name, parameter in model.named_parameters()}, projected


@pytest.mark.parametrize("kind", [*(pytest.param(kind, marks=pytest.mark.exhaustive) for kind in ("tensor", "loss")), "sequence"])
def test_a_model_of_hugging_face(ranks: Ranks, kind: str) -> None:
    """With the plans of tensor, sequence and loss parallelism that are in use."""
    _compare_llama(ranks, kind)


def test_a_model_of_hugging_face_under_fully_shard(four: Ranks) -> None:
    """As a script writes it: no word on what is sharded along which dimension."""
    _compare_llama(four, "tensor")


def _compare_llama(ranks: Ranks, kind: str) -> None:
    pytest.importorskip("transformers")
    alone, _ = train_llama(kind, distributed=False)
    for weights, projected in result_of(ranks(train_llama, kind)):
        assert projected == 14
        for name, weight in alone.items():
            torch.testing.assert_close(weights[name], weight, rtol=1e-5, atol=1e-5, msg=lambda text, name=name: f"{name}: {text}")
