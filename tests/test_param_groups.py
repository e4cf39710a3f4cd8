"""`grass_compile.param_groups`: every parameter in one group, the right one, and training as the groups say."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import nn
from transformers import BertConfig, BertForMaskedLM, GPT2Config, GPT2LMHeadModel, LlamaConfig, LlamaForCausalLM

import grass_compile
from grass_compile import ConfigError

SMALL = dict(hidden_size=32, intermediate_size=48, num_hidden_layers=2, num_attention_heads=2, vocab_size=50)


def llama() -> nn.Module:
    return LlamaForCausalLM(LlamaConfig(**SMALL, use_cache=False))


def gpt2() -> nn.Module:
    return GPT2LMHeadModel(GPT2Config(n_embd=32, n_layer=2, n_head=2, vocab_size=50, n_positions=16))


def bert() -> nn.Module:
    return BertForMaskedLM(BertConfig(**SMALL, max_position_embeddings=16))


def names(group: dict[str, Any]) -> set[str]:
    return {name for name, _ in group["params"]}


@pytest.mark.parametrize("make", [llama, gpt2, bert])
def test_every_parameter_is_in_one_group(make: Any) -> None:
    model = make()
    groups = grass_compile.param_groups(model, lr=2e-3, dense_lr=1e-3)
    ids = [id(p) for group in groups for _, p in group["params"]]
    assert len(ids) == len(set(ids)) and set(ids) == {id(p) for p in model.parameters()}
    *projected, rest = groups
    assert rest["rank"] is None and rest["lr"] == 1e-3
    blocks = {name for name, p in model.named_parameters() if p.ndim == 2 and any(f".{i}." in name for i in range(2))}
    assert blocks <= set.union(*map(names, projected)) and not any("emb" in name for group in projected for name in names(group))


def test_queries_and_keys() -> None:
    linear, queries, _ = grass_compile.param_groups(llama(), lr=2e-3)
    assert names(queries) == {f"model.layers.{i}.self_attn.{x}_proj.weight" for i in range(2) for x in "qk"}
    assert (linear["lr"], queries["lr"]) == (2e-3, 4e-3)
    _, queries, rest = grass_compile.param_groups(bert(), lr=torch.tensor(2e-3), query_key_factor=3.0)
    assert names(queries) == {f"bert.encoder.layer.{i}.attention.self.{x}.weight" for i in range(2) for x in ("query", "key")}
    assert float(queries["lr"]) == pytest.approx(6e-3) and float(rest["lr"]) == pytest.approx(2e-3)
    assert len(grass_compile.param_groups(gpt2(), lr=1e-3)) == 2  # q, k and v in one weight
    model = nn.ModuleDict({"q": nn.Linear(4, 4), "wk": nn.Linear(4, 4), "mask": nn.Linear(4, 4)})
    _, queries, _ = grass_compile.param_groups(model, lr=1e-3)
    assert names(queries) == {"q.weight", "wk.weight"}
    (linear, _) = grass_compile.param_groups(model, lr=1e-3, query_key=())
    assert names(linear) == {"q.weight", "wk.weight", "mask.weight"}


def test_embeddings_stay_out_whatever_their_name() -> None:
    model = nn.ModuleDict({"table": nn.Embedding(9, 8), "up": nn.Linear(8, 16), "head": nn.Linear(8, 9)})
    model["head"].weight = model["table"].weight  # tied
    linear, rest = grass_compile.param_groups(model, lr=1e-3)
    assert names(linear) == {"up.weight"} and names(rest) == {"table.weight", "up.bias", "head.bias"}


def test_a_compiled_model_has_the_same_groups() -> None:
    model = llama()
    keywords: dict[str, Any] = dict(lr=1e-3, exclude=("model.layers.0.mlp.up_proj.weight",))
    plain = grass_compile.param_groups(model, **keywords)
    model.model.layers[0].compile(backend="grass")
    wrapped = grass_compile.param_groups(torch.compile(model, backend="grass"), **keywords)
    assert [[id(p) for _, p in group["params"]] for group in wrapped] == [[id(p) for _, p in group["params"]] for group in plain]
    assert "model.layers.0.mlp.up_proj.weight" in names(plain[-1])


def test_keywords_replace_those_chosen() -> None:
    linear, _, rest = grass_compile.param_groups(llama(), lr=1e-3, axis="rows", rank=4, exclude=("*down*",))
    assert (linear["axis"], linear["rank"]) == ("rows", 4)
    assert "lm_head.weight" in names(linear) and "model.layers.0.mlp.down_proj.weight" in names(rest)
    optimizer = grass_compile.AdamW([linear, rest], rank=8)
    assert [group["rank"] for group in optimizer.param_groups] == [4, None]
    linear, *_ = grass_compile.param_groups(llama(), lr=1e-3, projection="galore")
    assert grass_compile.AdamW([linear], rank=8).param_groups[0]["on_refresh"] == "keep"


@pytest.mark.parametrize("name", ["AdamW", "Muon"])
def test_what_explain_says_is_projected(name: str) -> None:
    """Also a head that the optimizer's own ``exclude`` would leave dense."""
    model = llama()
    groups = grass_compile.param_groups(model, lr=1e-3, rank=8, exclude=("*embed*", "*v_proj*"))
    wanted = set.union(*map(names, groups[:-1]))
    optimizer = getattr(grass_compile, name)(groups)
    ids = torch.randint(50, (2, 8), generator=torch.Generator().manual_seed(0))
    report = grass_compile.explain(model, input_ids=ids, labels=ids, optimizer=optimizer)
    assert {row.name for row in report.rows if row.projected} == wanted and "lm_head.weight" in wanted
    assert {row.axis for row in report.rows if row.projected} == {"columns"}


def test_training_moves_columns_at_the_rates_of_their_groups() -> None:
    """AdamW's first step moves each element of a chosen column by the rate, and no other."""
    model = llama()
    groups = grass_compile.param_groups(model, lr=1e-3, dense_lr=5e-4, rank=8)
    parameters = [list(group["params"]) for group in groups]
    before = {name: p.detach().clone() for name, p in model.named_parameters()}
    optimizer = grass_compile.AdamW(groups, weight_decay=0.0)
    compiled = torch.compile(model, backend="grass", options={"compiler": "aot_eager", "strict": True})
    ids = torch.randint(50, (4, 16), generator=torch.Generator().manual_seed(0))
    compiled(input_ids=ids, labels=ids).loss.backward()
    optimizer.step()
    for named, rate in zip(parameters, (1e-3, 2e-3, 5e-4), strict=True):
        for name, p in named:
            moved = (p.detach() - before[name]).abs()
            assert float(moved.max()) == pytest.approx(rate, rel=1e-2), name
            if rate != 5e-4:
                assert int(moved.any(dim=0).sum()) == 8, name


def test_refusals() -> None:
    with pytest.raises(ConfigError, match="Sequential has no linear weight that could be projected"):
        grass_compile.param_groups(nn.Sequential(nn.Embedding(4, 4), nn.LayerNorm(4)), lr=1e-3)
    with pytest.raises(ConfigError, match=r"param_groups: axes='rows' is not one of its keywords. Did you mean 'axis'\?"):
        grass_compile.param_groups(nn.Linear(4, 4), lr=1e-3, axes="rows")
    for factor in (0, float("nan"), "2"):
        with pytest.raises(ConfigError, match="query_key_factor must be"):
            grass_compile.param_groups(nn.Linear(4, 4), lr=1e-3, query_key_factor=factor)
    for key in ("query_key", "exclude"):  # of a string, the star alone would match every name
        with pytest.raises(ConfigError, match=f"{key} must be a list of name patterns"):
            grass_compile.param_groups(nn.Linear(4, 4), lr=1e-3, **{key: "*q*"})
    with pytest.raises(ConfigError, match=r"needs a torch\.nn\.Module, got generator"):
        grass_compile.param_groups(nn.Linear(4, 4).parameters(), lr=1e-3)  # type: ignore[arg-type]
