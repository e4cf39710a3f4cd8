"""The Triton that Inductor generates for an H200 from the graphs that our passes make, with no GPU present.

Two gated MLPs of a transformer train for two steps: the first chooses rows (columns), the second uses them. So there
are four graphs for each axis, in the order refresh forward, refresh backward, regular forward, regular backward; then the
compact step of a weight, which the backwards call.
"""

from __future__ import annotations

import dataclasses
import importlib.util
import itertools
import math
import re

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from grass_compile.backend import kernels
from grass_compile.config import BackendOptions, SiteConfig
from grass_compile.keywords import Axis
from grass_compile.math.layout import SHARED_HYPER
from grass_compile.optim.rules import AdamWRule

from .. import paper
from .described import Generated, generate
from .parsed import parse

pytestmark = [
    pytest.mark.inductor,
    pytest.mark.skipif(importlib.util.find_spec("triton") is None, reason="needs triton, to generate code for a GPU"),
    pytest.mark.skipif(torch.version.cuda is not None, reason="a build of torch for GPUs asks its own driver"),
    pytest.mark.skipif(torch.__version__ < "2.13", reason="reads what torch 2.13 and its Triton generate"),
]

# No activation has as many elements as a weight, so that a buffer's size tells what it is for.
TOKENS, WIDTH, HIDDEN, RANK = 3072, 1024, 2048, 128
LAYERS = 2
WEIGHTS = 3 * LAYERS
WEIGHT_NUMEL = WIDTH * HIDDEN

ATOMIC = re.compile(r"^\s*(@!?%p\d+ )?(atom|red)\.", re.MULTILINE)
"""A PTX instruction that reads and writes memory in one."""


class GatedMLP(nn.Module):
    """The feed-forward half of a LLaMA layer."""

    def __init__(self) -> None:
        super().__init__()
        self.gate = nn.Linear(WIDTH, HIDDEN, bias=False)
        self.up = nn.Linear(WIDTH, HIDDEN, bias=False)
        self.down = nn.Linear(HIDDEN, WIDTH, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        return x + self.down(F.silu(self.gate(x)) * self.up(x))


def train(axis: Axis, scores: str = "exact") -> None:
    """Two steps in bf16; runs in a child process, where nothing of what is generated is launched."""
    model = nn.Sequential(*(GatedMLP() for _ in range(LAYERS))).to(torch.bfloat16)
    optimizer = paper.AdamW(model.named_parameters(), rank=RANK, axis=axis, scores=scores)
    compiled = torch.compile(model, backend="grass", options={"strict": True})
    x = torch.zeros(TOKENS, WIDTH, dtype=torch.bfloat16, requires_grad=True)
    for _ in range(2):
        compiled(x).float().square().mean().backward()
        optimizer.step()
        optimizer.zero_grad()


HYPER = (*AdamWRule.hyper_names, *SHARED_HYPER)
STEP = "torch.ops.grass_compile.step_.default"


@dataclasses.dataclass(frozen=True)
class Run:
    """The graphs of one axis."""

    axis: str
    graphs: list[Generated]

    @property
    def refresh(self) -> Generated:
        return self.graphs[1]

    @property
    def regular(self) -> Generated:
        return self.graphs[5]

    @property
    def step(self) -> Generated:
        (step,) = (graph for graph in self.graphs[2:4] if (HIDDEN, WIDTH) in {value.shape for value in graph.inputs.values()})
        return step


@pytest.fixture(scope="module", params=[pytest.param("rows", marks=pytest.mark.exhaustive), "columns"])
def run(request: pytest.FixtureRequest) -> Run:
    graphs = generate(train, request.param)
    assert [graph.is_backward for graph in graphs] == [False, True, False, False, False, True]  # with steps of two shapes
    return Run(request.param, graphs)


def sites(backward: Generated, axis: str) -> dict[str, tuple[str, str]]:
    """The inputs that hold ``exp_avg`` and ``exp_avg_sq``, by the input that holds their weight."""
    dim = 0 if axis == "rows" else 1
    matrices = {name: value for name, value in backward.inputs.items() if len(value.shape) == 2}
    weights = [name for name, value in matrices.items() if math.prod(value.shape) == WEIGHT_NUMEL]
    moments = [name for name, value in matrices.items() if value.dtype == "torch.float32" and value.shape[dim] == RANK]
    assert len(weights) == WEIGHTS and len(moments) == 2 * WEIGHTS
    found = dict(zip(weights, zip(moments[::2], moments[1::2], strict=True), strict=True))
    for weight, pair in found.items():
        assert {matrices[moment].shape[1 - dim] for moment in pair} == {matrices[weight].shape[1 - dim]}
    return found


def test_every_kernel_compiles_for_the_described_device(run: Run) -> None:
    for graph in run.graphs:
        assert set(graph.ptx) == set(parse(graph.code).kernels) != set()
        for name, ptx in graph.ptx.items():
            assert re.search(r"^\.target sm_90a?$", ptx, re.MULTILINE), name


def test_compact_product_reads_a_gathered_buffer_of_tokens_by_rank(run: Run) -> None:
    module = parse(run.regular.code)
    compact = [p for numel in {RANK * WIDTH, RANK * HIDDEN} for p in module.products(numel)]
    assert len(compact) == WEIGHTS
    for product in compact:
        left, right = product.arguments
        if run.axis == "rows":
            match = re.fullmatch(rf"reinterpret_tensor\((\w+), \({RANK}, {TOKENS}\), \(1, {RANK}\), 0\)", left)
            assert match, f"the gathered grad_out is not read transposed: {left}"
            gathered = match[1]
        else:
            gathered = right
        found = module.layouts.get(gathered) or run.regular.inputs[gathered].layout
        assert found == ((TOKENS, RANK), (RANK, 1))


def test_columns_save_the_gathered_input_instead_of_the_input(run: Run) -> None:
    saved = [value.shape for value in run.regular.inputs.values()]
    inputs = saved.count((TOKENS, WIDTH)) - 1  # the gradient of the output has this shape too
    if run.axis == "rows":
        assert (TOKENS, RANK) not in saved and inputs == LAYERS
    else:
        # The input of `down` may be gathered in the forward, or in the backward, which has what it is made of.
        assert saved.count((TOKENS, RANK)) in (2 * LAYERS, WEIGHTS) and inputs == 0


def test_regular_step_allocates_nothing_as_large_as_a_weight(run: Run) -> None:
    module = parse(run.regular.code)
    called = {launch.function for launch in module.launches} - set(module.kernels)
    assert called <= {"extern_kernels.mm", "extern_kernels.addmm", STEP}  # a copy could hide in another
    assert [name for name in module.layouts if module.numel(name) == WEIGHT_NUMEL] == []


@pytest.mark.parametrize("kind", ["regular", "refresh"])
def test_each_weight_moves_once_with_its_moments(run: Run, kind: str) -> None:
    backward = getattr(run, kind)
    module = parse(backward.code)
    steps = [launch for launch in module.launches if launch.function == STEP]
    for weight, moments in sites(backward, run.axis).items():
        (step,) = (launch for launch in steps if weight in launch.names)
        assert step.arguments[1] == weight and step.arguments[4].endswith(f", {moments[0]}, {moments[1]}]")
        assert module.launches.index(step) >= max(i for i, launch in enumerate(module.launches) if weight in launch.names)


def test_one_kernel_writes_a_weight_and_its_moments(run: Run) -> None:
    """Before it, a sum over the gradient, in two stages, is the square of its norm, tells whether that is finite, and counts;
    after it, the step counts."""
    module = parse(run.step.code)
    _, weight, _, _, square_sum, nonfinite, step, *moments = run.step.inputs
    assert {launch.function for launch in module.launches} <= set(module.kernels)
    _, check, launch, count = module.launches
    assert launch.written == {weight, *moments}
    assert {square_sum, nonfinite} <= check.written and step in count.written
    assert all(module.numel(name) < RANK for name in module.layouts), "nothing large is allocated"


def test_no_kernel_uses_atomics(run: Run) -> None:
    for graph in run.graphs:
        assert [name for name, kernel in parse(graph.code).kernels.items() if kernel.atomic] == []
        assert [name for name, ptx in graph.ptx.items() if ATOMIC.search(ptx)] == []


def test_refresh_needs_one_full_gradient_at_a_time(run: Run) -> None:
    module = parse(run.refresh.code)
    gradients = [name for product in module.products(WEIGHT_NUMEL) for name in product.written]
    assert len(gradients) == WEIGHTS
    spans = sorted((module.needed(name) for name in gradients), key=lambda span: span.start)
    for before, after in itertools.pairwise(spans):
        assert before.stop <= after.start, "a full gradient is still needed when the next is formed"


@pytest.mark.exhaustive
@pytest.mark.parametrize("axis", ["rows", "columns"])
def test_estimated_scores_need_no_other_graph(axis: str) -> None:
    """Whether new rows are due stands on the host, in an input of the one backward; no full gradient is formed."""
    forward, backward, *_ = generate(train, axis, "estimate")
    module = parse(backward.code)
    due = {name for name, value in backward.inputs.items() if value.dtype == "torch.bool" and value.shape == ()}
    proposals = [launch for launch in module.launches if launch.function == "torch.ops.grass_compile.propose_.default"]
    assert len(due) == len(proposals) == WEIGHTS
    assert due == {launch.arguments[3] for launch in proposals}
    assert module.products(WEIGHT_NUMEL) == []
    assert [name for name in module.layouts if module.numel(name) == WEIGHT_NUMEL] == []
    for graph in (forward, backward):
        assert set(graph.ptx) == set(parse(graph.code).kernels)


# ------------------------------------------------------------------------------------------------------- other update rules


def step_alone(name: str, axis: Axis, features: str) -> None:
    """An optimizer's step of one weight whose rows have so many features; the model itself is not compiled."""
    shape = (WIDTH, int(features)) if axis == "rows" else (int(features), WIDTH)
    model = nn.Linear(*shape[::-1], bias=False).to(torch.bfloat16)
    optimizer = getattr(paper, name)(model.named_parameters(), rank=RANK, axis=axis)
    compiled = torch.compile(model, backend="grass", options={"compiler": "aot_eager"})
    compiled(torch.zeros(8, shape[1], dtype=torch.bfloat16)).float().square().mean().backward()
    weight, state, rule = model.weight, optimizer.state[model.weight], optimizer.rule
    gradient = weight.detach().narrow(state["dim"], 0, RANK).clone()
    config = SiteConfig(rank=RANK, axis=axis, on_refresh="reset", decays=False, scale=1.0, rule=rule)
    hyper = torch.zeros(len(rule.hyper_names) + len(SHARED_HYPER))
    moments = [state[name] for name in rule.state_names]
    tensors = gradient, weight.detach(), hyper, state["index"], torch.zeros(1), *moments
    kernels.run(BackendOptions(), config, state["dim"], *tensors)


@pytest.mark.parametrize(  # full blocks, and a last one that is not
    ("axis", "features"), [pytest.param("rows", 2048, marks=pytest.mark.exhaustive), ("columns", 2000)]
)
def test_moments_of_8_bits_are_never_stored_in_full(axis: str, features: int) -> None:
    """They are decoded, updated and encoded in registers: no buffer of floating-point numbers is as large as the gradient."""
    (graph,) = generate(step_alone, "AdamW8bit", axis, str(features))
    module = parse(graph.code)
    found = re.findall(r"(\w+) = empty_strided_cuda\(.*, torch\.(\w+)\)", graph.code)
    large = {name: dtype for name, dtype in found if (module.numel(name) or 0) >= RANK * 1000}
    assert found and set(large.values()) <= {"int8", "uint8"}
    codes = [name for name, value in graph.inputs.items() if value.dtype in ("torch.int8", "torch.uint8")]
    assert len(codes) == 2 and all(module.writers(name) for name in codes)
    assert set(graph.ptx) == set(module.kernels)


RULES = {"Adafactor": "rows", "Apollo": "columns", "Lion": "rows", "Muon": "columns", "SGD": "columns", "Sketchy": "rows"}


@pytest.mark.parametrize(
    ("name", "axis"),
    [pytest.param(name, axis, marks=() if name == "Muon" else pytest.mark.exhaustive) for name, axis in RULES.items()],
)
def test_step_of_every_rule(name: str, axis: str) -> None:
    """It compiles for a GPU, adds to the weight in place without atomics, and makes nothing of the weight's size."""
    *before, graph = generate(step_alone, name, axis, str(HIDDEN))
    assert [parse(other.code).kernels.keys() for other in before] == [other.ptx.keys() for other in before]
    module = parse(graph.code)
    assert set(graph.ptx) == set(module.kernels)
    weight = next(key for key, value in graph.inputs.items() if math.prod(value.shape) == WEIGHT_NUMEL)
    (write,) = [launch for launch in module.launches if weight in launch.written]
    assert write.function in module.kernels and not module.kernels[write.function].atomic
    assert [ptx for ptx in graph.ptx.values() if ATOMIC.search(ptx)] == []
    assert [made for made in module.layouts if (module.numel(made) or 0) >= WEIGHT_NUMEL] == []
