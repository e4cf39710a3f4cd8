"""The models that can be planned: a built-in name, a Hugging Face configuration, a function that returns one, or a module."""

from __future__ import annotations

import contextlib
import copy
import importlib
import json
import os
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any
from unittest import mock

import torch
from torch import Tensor, nn

from ..errors import ConfigError


def _llama(width: int, ffn: int, layers: int, heads: int, vocabulary: int = 32000, **rest: Any) -> dict[str, Any]:
    return {
        "model_type": "llama",
        "hidden_size": width,
        "intermediate_size": ffn,
        "num_hidden_layers": layers,
        "num_attention_heads": heads,
        "vocab_size": vocabulary,
        **rest,
    }


NAMES: dict[str, dict[str, Any]] = {
    # GaLore's (arXiv 2403.03507), whose configurations the field trains from scratch.
    "llama-60m": _llama(512, 1376, 8, 8),
    "llama-130m": _llama(768, 2048, 12, 12),
    "llama-350m": _llama(1024, 2736, 24, 16),
    "llama-1b": _llama(2048, 5461, 24, 32),
    # LLaMA, arXiv 2302.13971
    "llama-7b": _llama(4096, 11008, 32, 32),
    "llama-13b": _llama(5120, 13824, 40, 40),
    "llama-30b": _llama(6656, 17920, 60, 52),
    "llama-65b": _llama(8192, 22016, 80, 64),
    # Llama 3, arXiv 2407.21783
    "llama-3.1-8b": _llama(4096, 14336, 32, 32, 128256, num_key_value_heads=8),
    "llama-3.1-70b": _llama(8192, 28672, 80, 64, 128256, num_key_value_heads=8),
    # Gemma, arXiv 2403.08295
    "gemma-2b": {
        "model_type": "gemma",
        "hidden_size": 2048,
        "intermediate_size": 16384,
        "num_hidden_layers": 18,
        "num_attention_heads": 8,
        "num_key_value_heads": 1,
        "head_dim": 256,
        "vocab_size": 256000,
    },
    "gemma-7b": {
        "model_type": "gemma",
        "hidden_size": 3072,
        "intermediate_size": 24576,
        "num_hidden_layers": 28,
        "num_attention_heads": 16,
        "num_key_value_heads": 16,
        "head_dim": 256,
        "vocab_size": 256000,
    },
    # Qwen3, arXiv 2505.09388
    "qwen3-8b": {
        "model_type": "qwen3",
        "hidden_size": 4096,
        "intermediate_size": 12288,
        "num_hidden_layers": 36,
        "num_attention_heads": 32,
        "num_key_value_heads": 8,
        "head_dim": 128,
        "vocab_size": 151936,
        "tie_word_embeddings": False,
    },
}
"""Built-in names, and their configurations in the words of `transformers`."""


CHECKPOINTING = ("activation_checkpointing_enable", "gradient_checkpointing_enable")
"""What models of transformers call it, the newer name first."""


def load(model: str | nn.Module, dtype: torch.dtype | None, checkpointing: bool) -> nn.Module:
    """Make the model that is to be planned, on the ``meta`` device where it can be.

    Args:
        model: a built-in name, the path of a Hugging Face ``config.json`` or of a folder with one, ``module:function`` (which
            returns a module), or a module.
        dtype: of its floating-point weights; None: as it comes.
        checkpointing: whether activations are computed again in the backward.

    Raises:
        ConfigError: there is no such model, transformers is missing or does not know it, or the function raised.
    """
    found = model if isinstance(model, nn.Module) else _named(model, dtype)
    if checkpointing and not any(hasattr(found, name) for name in CHECKPOINTING):
        raise ConfigError(
            f"{type(found).__name__} has no gradient_checkpointing_enable(), which checkpointing=True would call. Put "
            "checkpoints into the model yourself and leave it out."
        )
    return found


def checkpoint(model: nn.Module) -> nn.Module:
    """Have a model compute its activations again, in place."""
    getattr(model, next(name for name in CHECKPOINTING if hasattr(model, name)))()
    return model


def changed_at(name: str) -> int:
    """When the file behind a name was last written; 0 for what is no file."""
    path = Path(name) / "config.json" if Path(name).is_dir() else Path(name)
    return path.stat().st_mtime_ns if path.is_file() else 0


def _named(name: str, dtype: torch.dtype | None) -> nn.Module:
    path = Path(name)
    if name.lower() in NAMES:
        return _from_config(NAMES[name.lower()], name, dtype)
    if (path / "config.json").is_file() or (path.is_file() and path.suffix == ".json"):
        path = path / "config.json" if path.is_dir() else path
        try:
            fields = json.loads(path.read_text())
        except (json.JSONDecodeError, UnicodeDecodeError) as error:
            raise ConfigError(f"{path} is not JSON: {error}") from error
        except OSError as error:
            raise ConfigError(f"cannot read {path}: {error}") from error
        if not isinstance(fields, dict):
            raise ConfigError(f"{path} holds {type(fields).__name__} and not the fields of a configuration.")
        return _from_config(fields, name, dtype)
    if ":" in name:
        return _from_function(name)
    raise ConfigError(
        f"{name!r} is neither a built-in name ({', '.join(NAMES)}), nor the path of a Hugging Face config.json or of a folder "
        "with one, nor module:function."
    )


def _from_function(name: str) -> nn.Module:
    module, _, function = name.partition(":")
    try:
        with torch.device("meta"), _current_folder():
            made = getattr(importlib.import_module(module), function)()
    except (Exception, SystemExit) as error:  # whatever it raises, it is the user's code and the user's to mend
        raise ConfigError(f"{name} raised {type(error).__name__}: {error}") from error
    if not isinstance(made, nn.Module):
        raise ConfigError(f"{name} returned {type(made).__name__}, and has to return a torch.nn.Module.")
    return made


@contextlib.contextmanager
def _current_folder() -> Iterator[None]:
    """Inside, modules of the current folder are found, as by ``python -m``."""
    sys.path.insert(0, os.getcwd())
    try:
        yield
    finally:
        sys.path.remove(os.getcwd())


def _from_config(fields: dict[str, Any], name: str, dtype: torch.dtype | None) -> nn.Module:
    try:
        import transformers
    except ImportError as error:
        raise ConfigError(f"{name} is built by transformers, which is not installed: pip install transformers") from error
    kind = str(fields.get("model_type"))
    if kind not in transformers.CONFIG_MAPPING:
        raise ConfigError(f"{name} has model_type {kind!r}, which transformers {transformers.__version__} does not know.")
    try:
        config = transformers.CONFIG_MAPPING[kind](**{key: value for key, value in fields.items() if key != "model_type"})
        if getattr(config, "use_cache", False):
            config.use_cache = False  # nobody reads it in training, and it holds keys and values
        with torch.device("meta"):
            model: nn.Module = _class_of(transformers, config)(config)
    except ConfigError:
        raise
    except Exception as error:  # transformers raises of all kinds at a field that makes no sense
        raise ConfigError(f"transformers cannot build {name}: {type(error).__name__}: {error}") from error
    return model.to(dtype) if dtype is not None else model


def _class_of(transformers: Any, config: Any) -> Callable[[Any], nn.Module]:
    for name in config.architectures or ():
        if hasattr(transformers, name):
            return getattr(transformers, name)  # type: ignore[no-any-return]
    for auto in ("AutoModelForCausalLM", "AutoModelForMaskedLM", "AutoModelForSeq2SeqLM"):
        mapping = getattr(transformers, auto)._model_mapping
        if type(config) in mapping:
            return mapping[type(config)]  # type: ignore[no-any-return]
    raise ConfigError(f"transformers has no language model for {type(config).__name__}; name one in its 'architectures'.")


@contextlib.contextmanager
def unnoticed() -> Iterator[None]:
    """Inside, transformers takes tensors without memory for real ones. Otherwise it would make masks that training does not."""
    utils = sys.modules.get("transformers.utils.import_utils")
    if utils is None or not hasattr(utils, "is_fake_tensor"):
        yield
        return
    with mock.patch.object(utils, "is_fake_tensor", _is_not_fake):
        yield


def as_fake(model: nn.Module, dtype: torch.dtype | None, checkpointing: bool = False) -> nn.Module:
    """A copy of a model whose tensors have no memory; called inside of a fake mode.

    Args:
        model: with tensors of any device; they are not touched.
        dtype: of its floating-point parameters; None: as they are.
        checkpointing: whether the copy computes its activations again.
    """
    memo: dict[int, Any] = {}
    for tensor in _tensors([module.__dict__ for module in model.modules()]):
        memo[id(tensor)] = fake_like(tensor, dtype if isinstance(tensor, nn.Parameter) else None)
    shadow = copy.deepcopy(model, memo)
    return checkpoint(shadow) if checkpointing else shadow


def _tensors(value: Any) -> Iterator[Tensor]:
    """Those in dicts, lists and tuples: parameters, buffers, and what a module holds beside them."""
    if isinstance(value, Tensor):
        yield value
    elif isinstance(value, (dict, list, tuple, set)):
        for item in value.values() if isinstance(value, dict) else value:
            yield from _tensors(item)


def fake_like(tensor: Tensor, dtype: torch.dtype | None) -> Tensor:
    """A tensor of the same shape and strides without memory; called inside of a fake mode."""
    dtype = dtype if dtype is not None and tensor.is_floating_point() else tensor.dtype
    empty = torch.empty_strided(tensor.shape, tensor.stride(), dtype=dtype, device="cpu")
    return nn.Parameter(empty, tensor.requires_grad) if isinstance(tensor, nn.Parameter) else empty


def _is_not_fake(tensor: Any) -> bool:
    return False
