"""``share_index=True``: weights that read the same activations choose their columns together and save one gathered copy."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, fx, nn

import grass_compile
from grass_compile import ConfigError, ops
from grass_compile.ops import scores
from grass_compile.passes import pipeline
from grass_compile.passes.fx_utils import outputs
from tests.harness import Attention, batch

from .. import paper

RANK, GAP = 4, 3
SHARED = ("q.weight", "k.weight", "v.weight")


class Run:
    def __init__(self, compiler: str = "aot_eager", queries: dict[str, Any] | None = None, **keywords: Any) -> None:
        torch.manual_seed(1)
        self.model = Attention()
        scores = "exact" if keywords.get("selection") == "uniform" else "sampled"
        own = dict(rank=RANK, axis="columns", scores=scores, update_proj_gap=GAP, share_index=True, seed=5, lr=1e-2)
        first, *others = self.model.named_parameters()
        groups: list[Any] = [{"params": others}, {"params": [first], **(queries or {})}]
        self.optimizer = paper.AdamW(self.model.named_parameters() if queries is None else groups, **{**own, **keywords})
        self.compiled = torch.compile(self.model, backend="grass", options={"compiler": compiler})

    def train(self, begin: int, end: int, micro: int = 1) -> None:
        for step in range(begin, end):
            for part in range(micro - 1):
                with self.optimizer.accumulate():
                    self.compiled(batch(1000 * (part + 1) + step)).square().sum().backward()
            self.compiled(batch(step)).square().sum().backward()
            self.optimizer.step()
            self.optimizer.zero_grad()

    def index(self, name: str) -> list[int]:
        found: list[int] = self.optimizer.state[self.model.get_parameter(name)]["index"].tolist()
        return found

    @property
    def agree(self) -> bool:
        return len({tuple(self.index(name)) for name in SHARED}) == 1


def eager_steps(run: Run, steps: int, carry: bool) -> list[dict[str, list[int]]]:
    """Train a copy eagerly by the formulas: columns by the summed energies of all who read them, Adam on these. Gives the columns
    of each step, and moves ``run.model``'s twin, which it returns as the last entry."""
    model = copy.deepcopy(run.model)
    names = [name for name, _ in model.named_parameters()]
    m, v, count = ({name: torch.zeros_like(p) for name, p in model.named_parameters()} for _ in range(3))
    index = {name: list(range(RANK)) for name in names}
    history = []
    seen: dict[str, tuple[Tensor, Tensor]] = {}

    def watch(name: str) -> Any:
        def hook(module: nn.Module, args: tuple[Tensor, ...], output: Tensor) -> None:
            output.register_hook(lambda grad: seen.update({name: (grad.flatten(0, -2), args[0].detach().flatten(0, -2))}))

        return hook

    for name, module in model.named_children():
        module.register_forward_hook(watch(name))
    for step in range(steps):
        model(batch(step)).square().sum().backward()
        history.append({name: list(columns) for name, columns in index.items()})
        with torch.no_grad():
            for name, p in model.named_parameters():
                assert p.grad is not None
                for column in index[name]:
                    m[name][:, column].mul_(0.9).add_(p.grad[:, column], alpha=0.1)
                    v[name][:, column].mul_(0.999).addcmul_(p.grad[:, column], p.grad[:, column], value=0.001)
                    count[name][:, column] += 1
                    n = count[name][:, column].double()
                    m_hat, v_hat = m[name][:, column] / (1 - 0.9**n), v[name][:, column] / (1 - 0.999**n)
                    p[:, column] -= 1e-2 * (m_hat / (v_hat.sqrt() + 1e-8)).float()
                p.grad = None
        if step == 0 or (step + 1) % GAP == 0:
            energy = {}
            for name, (grad_out, x) in seen.items():
                sample = grad_out[:: scores.STRIDE].t() @ x[:: scores.STRIDE]
                energy[name.removesuffix(".weight")] = sample.square().sum(0)
            together = sum(energy[name[0]] for name in SHARED)
            for name in names:
                wanted = together if name in SHARED else energy[name[0]]
                assert isinstance(wanted, Tensor)
                columns = sorted(wanted.argsort(descending=True)[:RANK].tolist())
                for tensor in (m[name], v[name], count[name]):
                    for column in range(tensor.shape[1]):
                        if column not in columns or column not in index[name] or not carry:
                            tensor[:, column] = 0
                index[name] = columns
    run.twin = model  # type: ignore[attr-defined]
    return history


@pytest.mark.parametrize(
    ("compiler", "fused", "on_refresh"),
    [
        ("aot_eager", True, "reset"),
        ("aot_eager", False, "carry"),
        pytest.param("aot_eager", True, "carry", marks=pytest.mark.exhaustive),
        pytest.param("aot_eager", False, "reset", marks=pytest.mark.exhaustive),
        pytest.param("inductor", True, "carry", marks=[pytest.mark.inductor, pytest.mark.exhaustive]),
        pytest.param("inductor", False, "reset", marks=[pytest.mark.inductor, pytest.mark.exhaustive]),
        pytest.param("inductor", True, "reset", marks=[pytest.mark.inductor, pytest.mark.exhaustive]),
        pytest.param("inductor", False, "carry", marks=[pytest.mark.inductor, pytest.mark.exhaustive]),
    ],
)
def test_against_the_formulas(compiler: str, fused: bool, on_refresh: str) -> None:
    run = Run(compiler, on_refresh=on_refresh, step_in_backward=fused, weight_decay=0.0, eps=1e-8)
    history = eager_steps(run, 8, on_refresh == "carry")
    for step, expected in enumerate(history):
        run.train(step, step + 1)
        if step + 1 < len(history):
            assert {name: run.index(name) for name in expected} == history[step + 1]
    for one, other in zip(run.model.parameters(), run.twin.parameters(), strict=True):  # type: ignore[attr-defined]
        torch.testing.assert_close(one, other, rtol=2e-4, atol=2e-5)


def saved(monkeypatch: pytest.MonkeyPatch, **keywords: Any) -> tuple[int, int]:
    """Of a regular step's forward, which is finished last: the bytes it saves, and how many gathers it runs."""
    forwards: list[fx.GraphModule] = []
    finish = pipeline.finish_forward

    def watched(gm: fx.GraphModule, plan: pipeline.Plan, refresh: tuple[bool, ...]) -> fx.GraphModule:
        made = finish(gm, plan, refresh)
        forwards.append(made)
        return made

    monkeypatch.setattr(pipeline, "finish_forward", watched)
    Run(**keywords).train(0, 2)
    values = [node.meta["val"] for node in outputs(forwards[-1]) if isinstance(node, fx.Node)]
    gathers = len(forwards[-1].graph.find_nodes(op="call_function", target=ops.gather))
    return sum(value.nbytes for value in values if isinstance(value, Tensor)), gathers


@pytest.mark.parametrize("how", ["sampled", "estimate"])
def test_one_gather_serves_all(how: str, monkeypatch: pytest.MonkeyPatch) -> None:
    alone, together = saved(monkeypatch, share_index=False, scores=how), saved(monkeypatch, scores=how)
    assert (alone[1], together[1]) == (4, 2)
    assert alone[0] - together[0] >= 2 * 33 * RANK * 4, "two gathered copies less are saved"


@pytest.mark.parametrize("keywords", [dict(selection="norm"), dict(stagger=3), dict(selection="uniform")])
def test_draws_agree(keywords: dict[str, Any]) -> None:
    run = Run(**keywords)
    seen = set()
    for step in range(8):
        run.train(step, step + 1)
        assert run.agree
        seen.add(tuple(run.index("q.weight")))
    assert len(seen) > 2


def test_groups_that_differ_in_their_rate_share() -> None:
    """As query projections have one of their own; each weight moves by its own."""
    run = Run(queries={"lr": 2e-2}, selection="uniform")
    before = {name: p.detach().clone() for name, p in run.model.named_parameters()}
    for step in range(8):
        run.train(step, step + 1)
        assert run.agree
        if step == 0:
            moved = {name: float((p.detach() - before[name]).abs().max()) for name, p in run.model.named_parameters()}
            assert moved["q.weight"] == pytest.approx(2e-2, rel=1e-3) and moved["k.weight"] == pytest.approx(1e-2, rel=1e-3)


@pytest.mark.parametrize(
    ("queries", "gathers"), [({"lr": 2e-2}, 2), ({"rank": 5}, 3), ({"update_proj_gap": 2}, 3), ({"seed": 6}, 3)]
)
def test_groups_that_choose_otherwise_do_not_share(
    queries: dict[str, Any], gathers: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert saved(monkeypatch, queries=queries, selection="uniform")[1] == gathers


def test_accumulation_keeps_them_together() -> None:
    run = Run(selection="norm", on_refresh="carry")
    run.train(0, 8, micro=3)
    assert run.agree


def test_resume_is_exact() -> None:
    first, second = Run(selection="norm", on_refresh="carry"), Run(selection="norm", on_refresh="carry")
    first.train(0, 4)
    second.model.load_state_dict(copy.deepcopy(first.model.state_dict()))
    second.optimizer.load_state_dict(copy.deepcopy(first.optimizer.state_dict()))
    first.train(4, 9)
    second.train(4, 9)
    assert all(torch.equal(a, b) for a, b in zip(first.model.parameters(), second.model.parameters(), strict=True))


def test_weight_that_falls_behind_chooses_alone_and_learns_rightly() -> None:
    """A weight that was frozen for a step has other columns due; taken for those of the group, its gradient would be wrong."""
    run = Run(update_proj_gap=2)
    run.train(0, 2)
    run.model.v.weight.requires_grad_(False)
    run.train(2, 4)
    run.model.v.weight.requires_grad_(True)
    run.train(4, 5)
    before = copy.deepcopy(run.model)
    columns = {name: run.index(name) for name in SHARED}
    assert columns["q.weight"] == columns["k.weight"]
    run.train(5, 6)
    before(batch(5)).square().sum().backward()
    for name in SHARED:
        moved = run.model.get_parameter(name).detach() - before.get_parameter(name).detach()
        assert sorted(moved.abs().sum(0).nonzero().flatten().tolist()) == columns[name]
    one, two = (run.optimizer.state[run.model.get_parameter(name)]["updates"] for name in ("q.weight", "v.weight"))
    assert one == two + 2


def test_state_of_a_run_that_did_not_share_is_brought_into_line() -> None:
    alone, run = Run(share_index=False, selection="norm", on_refresh="carry"), Run(selection="norm", on_refresh="carry")
    alone.train(0, 4)
    assert not alone.agree
    run.model.load_state_dict(alone.model.state_dict())
    state = alone.optimizer.state_dict()
    for group in state["param_groups"]:
        group["share_index"] = True
    run.optimizer.load_state_dict(state)
    run.train(4, 5)
    assert run.agree
    run.train(5, 9)
    assert run.agree


@pytest.mark.parametrize(
    ("keywords", "nonfinite"),
    [
        (dict(), "raise"),
        (dict(selection="uniform", scores="exact"), "propagate"),
        pytest.param(dict(), "propagate", marks=pytest.mark.exhaustive),
        pytest.param(dict(selection="uniform", scores="exact"), "raise", marks=pytest.mark.exhaustive),
    ],
)
def test_refreshes_at_a_time_of_their_own(keywords: dict[str, Any], nonfinite: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """A weight that follows refreshes when its leader does: in both modes alike, and without tracing anything again."""
    traced: list[pipeline.Plan] = []
    transform = pipeline.transform

    def watched(*args: Any, decide: Callable[..., pipeline.Plan], **kwargs: Any) -> Any:
        def noted(found: pipeline.Analysis) -> pipeline.Plan:
            traced.append(decide(found))
            return traced[-1]

        return transform(*args, decide=noted, **kwargs)

    monkeypatch.setattr(pipeline, "transform", watched)
    runs = [Run(step_in_backward=fused, stagger=3, update_proj_gap=6, nonfinite=nonfinite, **keywords) for fused in (True, False)]
    for run in runs:
        run.train(0, 20)
        assert len(traced) == 1 and run.agree  # two models of a class share it
        offsets = {name: run.optimizer._manager.records[run.model.get_parameter(name)].offset for name in (*SHARED, "o.weight")}
        assert len({offsets[name] for name in SHARED}) == 1 and offsets["o.weight"] != offsets["q.weight"]
    for one, other in zip(*(run.model.parameters() for run in runs), strict=True):
        torch.testing.assert_close(one, other, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("fused", [True, False])
def test_a_step_that_is_skipped_does_not_part_them(fused: bool) -> None:
    """Be it one that draws new columns: the others take them, and so does the weight whose gradient is not finite."""
    run = Run(selection="uniform", nonfinite="skip", step_in_backward=fused)
    for step in range(8):
        poisoned = step in (0, GAP, GAP + 1)
        with torch.no_grad():
            keep = run.model.k.weight[0, 0].clone()
            run.model.k.weight[0, 0] = float("inf") if poisoned else keep
        run.train(step, step + 1)
        with torch.no_grad():
            run.model.k.weight[0, 0] = keep
        updates = {run.optimizer.state[run.model.get_parameter(name)]["updates"] for name in SHARED}
        assert run.agree and updates == {step + 1}
    assert any(int(run.optimizer.state[run.model.get_parameter(name)]["nonfinite"]) for name in SHARED)


def test_rows_do_not_share(monkeypatch: pytest.MonkeyPatch) -> None:
    """Rows are outputs, of which each weight has its own."""
    run = Run(axis="rows")
    run.train(0, 3)
    assert not run.agree


def test_report_names_whom_a_weight_shares_with() -> None:
    run = Run()
    report = grass_compile.explain(run.model, batch(0), optimizer=run.optimizer)
    assert "shares its columns with q.weight" in report["k.weight"].reason
    assert "shares" not in report["o.weight"].reason


def test_exact_scores_are_refused() -> None:
    with pytest.raises(ConfigError, match=r"share_index=True .* Use selection='uniform', or scores='sampled' or 'estimate'"):
        Run(scores="exact")


def test_llama_shares_q_k_v_and_gate_up() -> None:
    """In Hugging Face's LLaMA: two groups per block."""
    transformers = pytest.importorskip("transformers")
    torch.manual_seed(0)
    config = transformers.LlamaConfig(
        vocab_size=64, hidden_size=32, intermediate_size=48, num_hidden_layers=2, num_attention_heads=2, use_cache=False
    )
    model = transformers.LlamaForCausalLM(config)
    optimizer = paper.AdamW(
        model.named_parameters(), rank=8, axis="columns", scores="estimate", share_index=True, update_proj_gap=2
    )
    compiled = torch.compile(model, backend="grass", options={"compiler": "aot_eager"})
    ids = torch.randint(64, (2, 9))
    for _ in range(3):
        compiled(input_ids=ids, labels=ids).loss.backward()
        optimizer.step()
        optimizer.zero_grad()
    for layer in model.model.layers:
        attention, mlp = layer.self_attn, layer.mlp
        for group in ((attention.q_proj, attention.k_proj, attention.v_proj), (mlp.gate_proj, mlp.up_proj)):
            assert len({tuple(optimizer.state[linear.weight]["index"].tolist()) for linear in group}) == 1
