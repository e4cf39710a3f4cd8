"""The GPU's numbers without a GPU: training by generated Triton in the interpreter, against eager torch in fp64."""

from __future__ import annotations

import importlib.util

import pytest
import torch
from torch import Tensor, nn

import grass_compile

from .interpreted import train_by

pytestmark = [
    pytest.mark.inductor,
    pytest.mark.skipif(importlib.util.find_spec("triton") is None, reason="needs triton, to generate code for a GPU"),
    pytest.mark.skipif(torch.version.cuda is not None, reason="a build of torch for GPUs asks its own driver"),
    pytest.mark.skipif(torch.__version__ < "2.13", reason="runs what torch 2.13 and its Triton generate"),
]

transformers = pytest.importorskip("transformers", reason="builds its models")

WIDTH, VOCABULARY, RANK, STEPS = 24, 50, 6, 3

LLAMA = {
    "hidden_size": WIDTH,
    "intermediate_size": 40,
    "num_hidden_layers": 1,
    "num_attention_heads": 2,
    "num_key_value_heads": 1,
    "vocab_size": VOCABULARY,
    "use_cache": False,
}
GPT2 = {
    "n_embd": WIDTH, "n_layer": 1, "n_head": 2, "vocab_size": VOCABULARY, "n_positions": 32, "use_cache": False,
    "bos_token_id": 1, "eos_token_id": 1, "resid_pdrop": 0.0, "embd_pdrop": 0.0, "attn_pdrop": 0.0,
}  # fmt: skip


def model_of(name: str) -> nn.Module:
    """A block with what stands around it in a language model."""
    if name == "gpt2":
        return transformers.GPT2LMHeadModel(transformers.GPT2Config(**GPT2))  # type: ignore[no-any-return]
    return transformers.LlamaForCausalLM(transformers.LlamaConfig(**LLAMA))  # type: ignore[no-any-return]


def train(compiler: str, name: str, rule: str, axis: str, selection: str, dtype: str, lengths: str) -> list[Tensor]:
    """Weights after steps of which the first and the third choose rows; ``lengths`` of the sequences, one for each step."""
    torch.manual_seed(0)
    model = model_of(name).to(getattr(torch, dtype)).train()
    optimizer = getattr(grass_compile, rule)(
        model.named_parameters(),
        lr=1e-2,
        rank=RANK,
        axis=axis,
        selection=selection,
        update_proj_gap=2,
        seed=0,
        step_in_backward=True,
    )
    compiled = torch.compile(model, backend="grass", options={"compiler": compiler})
    for step, length in enumerate(lengths.split()):
        tokens = torch.randint(VOCABULARY, (2, int(length)), generator=torch.Generator().manual_seed(step))
        compiled(input_ids=tokens, labels=tokens).loss.backward()
        optimizer.step()
        optimizer.zero_grad()
    return [parameter.detach().double() for parameter in model.parameters()]


CASES = [
    ("llama", "AdamW", "columns", "uniform", "float32", "13 13 13"),
    ("gpt2", "AdamW", "rows", "top", "bfloat16", "13 13 13"),
    pytest.param(("llama", "Muon", "columns", "uniform", "float32", "13 13 13"), marks=pytest.mark.exhaustive),
]


@pytest.mark.parametrize("case", CASES, ids=lambda case: "-".join(case).replace(" ", "_"))
def test_training_by_interpreted_triton(case: tuple[str, ...]) -> None:
    """All weights together are as near to fp64 as eager torch's in the same dtype, by a factor of two; and kernels did run."""
    *first, dtype, lengths = case
    exact, eager = (torch.cat([w.flatten() for w in train("aot_eager", *first, kind, lengths)]) for kind in ("float64", dtype))
    found, ran = train_by(train, "inductor", *case)
    own = torch.cat([weight.flatten() for weight in found])
    assert len(ran) > 5
    assert (own - exact).norm() <= 2 * (eager - exact).norm() + 1e-7 * exact.norm()
