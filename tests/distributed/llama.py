"""A small model of Hugging Face."""

from __future__ import annotations

from typing import Any

import torch

VOCABULARY, PROJECTED = 64, 14


def llama() -> Any:
    """Two layers of width 32."""
    import transformers

    torch.manual_seed(0)
    config = transformers.LlamaConfig(
        vocab_size=VOCABULARY, hidden_size=32, intermediate_size=48, num_hidden_layers=2, num_attention_heads=4, use_cache=False,
        max_position_embeddings=16, bos_token_id=0, eos_token_id=0,
    )  # fmt: skip
    return transformers.LlamaForCausalLM(config)
