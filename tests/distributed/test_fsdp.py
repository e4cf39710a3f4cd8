"""``fully_shard`` (FSDP2, HSDP): ranks that own a part of each weight train as one process does on the joined batch."""

from __future__ import annotations

import contextlib
import dataclasses
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
import torch.nn.functional as F
from torch.distributed.checkpoint.state_dict import StateDictOptions, get_state_dict, set_model_state_dict
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import CPUOffloadPolicy, fully_shard

import grass_compile
from grass_compile import ConfigError, NonFiniteError

from ..pairs import every_value
from .compare import COMPACT, SCORES, SHAPES, compare, how
from .ranks import Ranks, result_of
from .training import (
    HIDDEN,
    RANK,
    Decoder,
    Outcome,
    Trained,
    Training,
    batches,
    load_and_go_on,
    micro_batches,
    partly_eager,
    save_and_go_on,
    step_of,
    train,
    with_a_penalty,
)


def sharded(*args: Any, **keywords: Any) -> Training:
    return Training(*args, **{"place": "blocks", "mesh": (2,), **keywords})


DENSE = len(list(Decoder().parameters())) - len(SHAPES)
"""Numbers sent beside: whether the gradient of each dense parameter is finite on all ranks. Compact ones have a flag each too,
but on a refresh."""


@every_value(axis=["columns", "rows"], selection=["uniform", "top", "norm"], mode=[True, "auto", False])
def test_two_ranks_are_one_process(ranks: Ranks, axis: str, selection: str, mode: Any) -> None:
    """And what goes into the reduce-scatters of a regular step is exactly the compact gradients."""
    keywords = how(axis=axis, selection=selection, step_in_backward=mode)
    found = compare(ranks, sharded(keywords, fsdp=how(dim=int(axis == "rows"))))
    assert found.fused == (mode is not False)
    regular, full = COMPACT[axis] + len(SHAPES) + DENSE, sum(m * n for m, n in SHAPES) + SCORES[axis] + DENSE
    assert found.regular["_c10d_functional"] == regular
    assert found.refresh["_c10d_functional"] == (regular if selection == "uniform" else full)


FEATURES = [
    pytest.param(sharded(place="around"), marks=pytest.mark.exhaustive),
    pytest.param(sharded(place="model"), marks=pytest.mark.exhaustive),
    pytest.param(sharded(hidden=25), marks=pytest.mark.exhaustive),
    sharded(how(selection="top", on_refresh="reset"), hidden=25),
    pytest.param(sharded(how(axis="auto")), marks=pytest.mark.exhaustive),
    sharded(how(selection="top", block=4), hidden=24),
    pytest.param(sharded(how(axis="rows", block=4), fsdp=how(dim=1)), marks=pytest.mark.exhaustive),
    sharded(how(stagger=True, rank=5), fsdp=how(reshard_after_forward=False)),
    sharded(how(step_in_backward=True), checkpoint=True),
    pytest.param(sharded(how(nonfinite="propagate")), marks=pytest.mark.exhaustive),
    pytest.param(sharded(how(share_index=True)), marks=pytest.mark.exhaustive),
    pytest.param(sharded(how(max_grad_norm=0.05), hidden=25), marks=pytest.mark.exhaustive),
    sharded(clip=0.05, hidden=25),
    sharded(how(step_in_backward=True), micro=2, hidden=25),
    pytest.param(sharded(micro=2, clip=0.05, place="around"), marks=pytest.mark.exhaustive),
    pytest.param(sharded(optimizer="Lion"), marks=pytest.mark.exhaustive),
    pytest.param(sharded(optimizer="SGD"), marks=pytest.mark.exhaustive),
    sharded(optimizer="Muon", hidden=25),
    pytest.param(
        sharded(how(axis="rows", step_in_backward=True, rank=12), optimizer="Muon", fsdp=how(dim=1)), marks=pytest.mark.exhaustive
    ),
    sharded(how(max_grad_norm=0.05, selection="top"), optimizer="Muon", micro=2),
    pytest.param(sharded(optimizer="adopted", place="around"), marks=pytest.mark.exhaustive),
    pytest.param(sharded(how(axis="rows"), optimizer="adopted", fsdp=how(dim=1), micro=2), marks=pytest.mark.exhaustive),
    pytest.param(sharded(optimizer="adopted", clip=0.05, hidden=25), marks=pytest.mark.exhaustive),
]


@pytest.mark.parametrize(
    "training", FEATURES, ids=lambda t: f"{t.optimizer}-{t.place}-{dict(t.how)}-{t.micro}-{t.clip}-{t.hidden}-{t.checkpoint}"
)
def test_features(ranks: Ranks, training: Training) -> None:
    compare(ranks, training)


@pytest.mark.parametrize("mesh", [(2,), pytest.param((2, 2), marks=pytest.mark.exhaustive)])
def test_an_unmodified_script(mesh: tuple[int, ...], request: pytest.FixtureRequest) -> None:
    """Of what is projected, it sends compact gradients from its second step on, and whether each is finite."""
    group: Ranks = request.getfixturevalue("ranks" if mesh == (2,) else "four")
    found = compare(group, sharded(how(selection="top"), optimizer="adopted", mesh=mesh, world=group.size))
    if mesh == (2,):
        assert found.regular["_c10d_functional"] == COMPACT["columns"] + len(SHAPES)


@pytest.mark.inductor
@pytest.mark.exhaustive
@pytest.mark.parametrize("selection", ["uniform", "top"])
def test_inductor(ranks: Ranks, selection: str) -> None:
    compare(ranks, sharded(how(selection=selection, step_in_backward=True), compiler="inductor", hidden=25, steps=4))


@every_value(mesh=[(2, 2), (4,)], selection=["uniform", "top"])
def test_four_ranks(four: Ranks, mesh: tuple[int, ...], selection: str) -> None:
    """Parts that have replicas (HSDP), and four parts of unequal length."""
    found = compare(four, sharded(how(selection=selection), world=4, mesh=mesh, hidden=26))
    assert found.fused


def test_mixed_precision(ranks: Ranks) -> None:
    """Compute in bf16, reduce and keep in fp32: the parts move, and end near those of a run in fp32."""
    training = sharded(fsdp=how(dtype=torch.bfloat16))
    outcomes: list[Outcome] = result_of(ranks(train, training))
    alone = train(training, distributed=False)
    start = dict(Decoder().named_parameters())
    for name in alone.rows:
        found, exact = outcomes[0].weights[name], alone.weights[name]
        assert found.dtype == torch.float32
        assert (found - exact).norm() < 0.2 * (exact - start[name].detach()).norm(), name


def train_from_meta(training: Training) -> dict[str, torch.Tensor]:
    """Made without memory, sharded, given memory and then its first weights, as models are that fit on no single rank."""
    torch.manual_seed(0)
    first = Decoder().state_dict()
    with torch.device("meta"):
        run = Trained(training, make_optimizer=False)
    run.model.to_empty(device="cpu")
    set_model_state_dict(run.model, first, options=StateDictOptions(full_state_dict=True, broadcast_from_rank0=True))
    run.make_optimizer()
    for tokens in batches(training.steps):
        step_of(run, tokens)
    return run.weights()


@pytest.mark.parametrize("mesh", [(2,), pytest.param((1, 2), marks=pytest.mark.exhaustive)])
def test_a_model_that_is_made_on_meta(ranks: Ranks, mesh: tuple[int, ...]) -> None:
    training = sharded(how(selection="top"), mesh=mesh)
    alone = train(training, distributed=False)
    for found in result_of(ranks(train_from_meta, training)):
        for name, weight in alone.weights.items():
            torch.testing.assert_close(found[name], weight, rtol=1e-5, atol=1e-5, msg=lambda text, n=name: f"{n}: {text}")


def save_while_training(training: Training, folder: str, at: int) -> dict[str, torch.Tensor]:
    """Save in the background, and go on at once. The thread that saves needs a group of its own."""
    run, data, saving, group = Trained(training), batches(training.steps), None, dist.new_group(backend="gloo")
    for step, tokens in enumerate(data):
        if step == at:
            weights, state = get_state_dict(run.model, run.optimizer)
            saving = dcp.async_save({"weights": weights, "state": state}, checkpoint_id=folder, process_group=group)
        step_of(run, tokens)
    assert saving is not None
    saving.result()
    return run.weights()


def test_a_checkpoint_that_is_saved_while_training_goes_on(ranks: Ranks, tmp_path: Path) -> None:
    """What is loaded is the state at the time of the call, bit for bit."""
    training, folder = sharded(how(selection="top")), str(tmp_path / "checkpoint")
    expected = result_of(ranks(save_while_training, training, folder, 4))[0]
    found = result_of(ranks(load_and_go_on, training, folder, 4))[0]
    assert [name for name, weight in expected.items() if not torch.equal(found[name], weight)] == []


def explained(training: Training) -> tuple[str, Any, Any]:
    """What `explain` says of a weight, and of all bytes."""
    run = Trained(training)
    report = grass_compile.explain(run.model, batches(1)[0][:, :-1], optimizer=run.optimizer)
    return report["layers.0.up.weight"].reason, report.sent_bytes, report["layers.0.up.weight"].state_bytes


def test_explain_says_how_weights_are_spread(ranks: Ranks) -> None:
    full = sum(m * n for m, n in SHAPES)
    for reason, sent, state in result_of(ranks(explained, sharded())):
        assert "in 2 parts along dimension 0" in reason
        assert (sent.dense, sent.compact) == (4 * full, 4 * COMPACT["columns"])
        assert state == 2 * 4 * HIDDEN // 2 * RANK


# ----------------------------------------------------------------------------------------- from outside of the regions


def one_reads(training: Training, distributed: bool = True) -> dict[str, torch.Tensor]:
    """The first rank looks at its part of a gradient in each step, so that its steps wait; and all evaluate in between."""
    run = Trained(training, distributed)
    for tokens in batches(6):
        with torch.no_grad():
            run.run(tokens[:, :-1])
        (part,) = micro_batches(tokens, 1, distributed, training.world, training.tensor)
        F.cross_entropy(run.run(part[:, :-1]).flatten(0, 1), part[:, 1:].flatten()).backward()
        if distributed and dist.get_rank() == 0:
            run.model.layers[0].up.weight.grad.to_local().abs().max().item()
        run.optimizer.step()
        run.optimizer.zero_grad()
    return run.weights()


@every_value(function=[with_a_penalty, partly_eager], selection=["uniform", "top"], mode=[True, False])
def test_gradients_from_outside(ranks: Ranks, function: Any, selection: str, mode: bool) -> None:
    training = sharded(how(step_in_backward=mode, selection=selection, update_proj_gap=4), hidden=25)
    expected = function(training, distributed=False)
    for found in result_of(ranks(function, training)):
        for name, weight in expected.items():
            torch.testing.assert_close(found[name], weight, rtol=1e-5, atol=1e-5, msg=lambda text, n=name: f"{n}: {text}")


@pytest.mark.parametrize("selection", [pytest.param("uniform", marks=pytest.mark.exhaustive), "top"])
def test_a_rank_that_logs(ranks: Ranks, selection: str) -> None:
    training = sharded(how(step_in_backward="auto", selection=selection), hidden=25)
    expected = one_reads(training, distributed=False)
    for found in result_of(ranks(one_reads, training)):
        for name, weight in expected.items():
            torch.testing.assert_close(found[name], weight, rtol=1e-5, atol=1e-5, msg=lambda text, n=name: f"{n}: {text}")


# ------------------------------------------------------------------------------------------------------ checkpoints


@pytest.mark.parametrize("mesh", [pytest.param((2,), marks=pytest.mark.exhaustive), ()])
def test_checkpoint_goes_to_another_layout(ranks: Ranks, four: Ranks, tmp_path: Path, mesh: tuple[int, ...]) -> None:
    """From two ranks that own parts to four, to parts with replicas, and to ranks that have the whole; and from these."""
    training = sharded(hidden=26, mesh=mesh)
    folder = str(tmp_path / "checkpoint")
    expected = result_of(ranks(save_and_go_on, training, folder, 4))[0]
    others = [(ranks, (2,), 2), (ranks, (), 2), (four, (4,), 4), (four, (2, 2), 4)]
    for group, layout, world in others:
        target = dataclasses.replace(training, mesh=layout, world=world)
        found = result_of(group(load_and_go_on, target, folder, 4))[0]
        for name, weight in expected.items():
            torch.testing.assert_close(found[name], weight, rtol=1e-5, atol=1e-5, msg=lambda text, n=name: f"{n}: {text}")
        if layout == mesh:
            assert all(torch.equal(found[name], weight) for name, weight in expected.items())


@pytest.mark.parametrize("parts", [2, pytest.param(4, marks=pytest.mark.exhaustive)])
def test_checkpoint_of_an_unmodified_script(ranks: Ranks, four: Ranks, tmp_path: Path, parts: int) -> None:
    """Its optimizer is one of torch's; bit for bit from two parts to two, and near that to four."""
    training = sharded(how(selection="top"), optimizer="adopted", hidden=26)
    folder, group = str(tmp_path / "checkpoint"), ranks if parts == 2 else four
    expected = result_of(ranks(save_and_go_on, training, folder, 4))[0]
    target = dataclasses.replace(training, mesh=(parts,), world=parts)
    tolerance = 0 if parts == 2 else 1e-5
    for found in result_of(group(load_and_go_on, target, folder, 4)):
        for name, weight in expected.items():
            torch.testing.assert_close(
                found[name], weight, rtol=tolerance, atol=tolerance, msg=lambda text, n=name: f"{n}: {text}"
            )


# ----------------------------------------------------------------------------------------------------- what is refused


def spoil(gradient: torch.Tensor) -> torch.Tensor:
    """Infinite in its first feature."""
    gradient = gradient.clone()
    gradient[..., 0] = float("inf")
    return gradient


def overflow_in_one_part(training: Training, after: int = 1) -> tuple[str, bool]:
    """After some steps, a gradient is infinite on one rank, in one row that rank 0 owns; what is said, and whether that weight
    has stayed."""
    run = Trained(training)
    for tokens in batches(after):
        step_of(run, tokens)
    before = run.weights()
    if dist.get_rank() == 1:
        run.model.lm_head.register_forward_pre_hook(lambda module, args: args[0].register_hook(spoil) and None)
    try:
        step_of(run, batches(2)[1])
        said = ""
    except NonFiniteError as error:
        said = str(error)
    after = run.weights()
    return said, torch.equal(before["layers.1.down.weight"], after["layers.1.down.weight"])


@pytest.mark.parametrize("mode", [True, False])
def test_all_ranks_skip_the_same_steps(ranks: Ranks, mode: bool) -> None:
    for said, stayed in result_of(ranks(overflow_in_one_part, sharded(how(step_in_backward=mode, nonfinite="raise")))):
        assert "not finite" in said and stayed


@pytest.mark.parametrize("after", [0, 1])
def test_all_ranks_skip_the_same_steps_of_an_unmodified_script(ranks: Ranks, after: int) -> None:
    """In its first step too, which forms full gradients, and from then on."""
    training = sharded(how(nonfinite="raise", selection="top"), optimizer="adopted")
    for said, stayed in result_of(ranks(overflow_in_one_part, training, after)):
        assert "not finite" in said and stayed


def overflow_while_adding(training: Training) -> tuple[str, bool]:
    """The same in the second of two micro-batches, which only adds to the rows that the first has chosen."""
    run = Trained(training)
    before = run.weights()
    first, second = (part.chunk(2)[dist.get_rank()] for part in batches(1)[0].chunk(2))
    for part in (first, second):
        if part is second and dist.get_rank() == 1:
            run.model.lm_head.register_forward_pre_hook(lambda module, args: args[0].register_hook(spoil) and None)
        with run.optimizer.accumulate() if part is first else contextlib.nullcontext():
            F.cross_entropy(run.run(part[:, :-1]).flatten(0, 1), part[:, 1:].flatten()).backward()
    try:
        run.optimizer.step()
        said = ""
    except NonFiniteError as error:
        said = str(error)
    run.optimizer.zero_grad()
    run.optimizer.check_agreement()
    return said, torch.equal(before["layers.1.down.weight"], run.weights()["layers.1.down.weight"])


@pytest.mark.parametrize("selection", ["top", pytest.param("uniform", marks=pytest.mark.exhaustive)])
def test_all_ranks_skip_what_adds_up(ranks: Ranks, selection: str) -> None:
    for said, stayed in result_of(ranks(overflow_while_adding, sharded(how(nonfinite="raise", selection=selection)))):
        assert "not finite" in said and stayed


def overflow_in_the_rest(training: Training) -> tuple[str, list[int]]:
    """A gradient of the head that is infinite in one part; what is said, and how many steps each parameter has taken."""
    run = Trained(training)
    step_of(run, batches(1)[0])
    run.model.lm_head.register_full_backward_hook(lambda module, inputs, outputs: None)
    loss = run.run(batches(1)[0].chunk(2)[dist.get_rank()][:, :-1])
    loss.register_hook(lambda gradient: torch.cat([gradient[..., :1] * float("inf"), gradient[..., 1:]], -1))
    loss.square().sum().backward()
    try:
        run.optimizer.step()
        said = ""
    except NonFiniteError as error:
        said = str(error)
    return said, [int(run.optimizer.state[p]["step"].max()) for p in run.model.lm_head.parameters()]


def test_all_ranks_skip_a_dense_parameter(ranks: Ranks) -> None:
    (first, steps), (second, others) = result_of(ranks(overflow_in_the_rest, sharded(how(nonfinite="raise"))))
    assert "lm_head.weight" in first and first == second and steps == others == [1]


def asked_later(training: Training) -> str:
    """A factor that is given to FSDP2 after a first step."""
    run = Trained(training)
    step_of(run, batches(1)[0])
    for layer in run.model.layers:
        layer.set_gradient_divide_factor(3.0)
    try:
        step_of(run, batches(1)[0])
    except ConfigError as error:
        return str(error)
    return ""


def test_what_is_asked_of_fsdp_later_is_refused(ranks: Ranks) -> None:
    assert all("set_gradient_divide_factor" in said for said in result_of(ranks(asked_later, sharded())))


def another_optimizer(training: Training) -> bool:
    """A second optimizer takes over while the first lives."""
    run = Trained(training)
    step_of(run, batches(1)[0])
    first, run.optimizer = run.optimizer, grass_compile.AdamW(run.model.named_parameters(), rank=RANK, seed=1)
    for tokens in batches(4):
        step_of(run, tokens)
    return first is not run.optimizer and "index" in run.optimizer.state[run.model.layers[0].up.weight]


def test_another_optimizer_takes_over(ranks: Ranks) -> None:
    assert all(result_of(ranks(another_optimizer, sharded())))


def offloaded() -> None:
    model = Decoder()
    for layer in model.layers:
        layer.compile(backend="grass", options={"compiler": "aot_eager"})
        fully_shard(layer, mesh=init_device_mesh("cpu", (2,)), offload_policy=CPUOffloadPolicy(pin_memory=False))
    optimizer = grass_compile.AdamW(model.named_parameters(), rank=RANK)
    model(batches(1)[0][:, :-1]).sum().backward()
    optimizer.step()


def refused() -> str:
    """What is said of something that is not supported."""
    try:
        offloaded()
    except ConfigError as error:
        return str(error)
    return ""


def test_what_is_not_supported_is_refused_by_name(ranks: Ranks) -> None:
    assert all("CPUOffloadPolicy" in found for found in result_of(ranks(refused)))


@pytest.mark.parametrize(
    ("training", "said"),
    [
        (sharded(optimizer="AdamW8bit"), "layers.0.value.weight: AdamW8bitRule looks at whole rows"),
        (sharded(how(projection="galore")), "layers.0.value.weight: projection='galore' is not supported"),
        (sharded(how(axis="rows")), "layers.0.query.weight: each rank owns a part of it along dimension 0, so axis='rows'"),
        (sharded(how(axis="rows"), optimizer="adopted"), "query.weight: each rank owns a part of it along dimension 0"),
        (sharded(how(projection="galore"), optimizer="adopted"), "query.weight: projection='galore' is not supported"),
    ],
    ids=str,
)
def test_keywords_that_do_not_go_with_parts(ranks: Ranks, training: Training, said: str) -> None:
    for error in ranks(train, training):
        assert isinstance(error, ConfigError) and said in str(error)
