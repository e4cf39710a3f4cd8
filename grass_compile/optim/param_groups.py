"""Parameter groups as the study found them to learn best (`param_groups`): which weights, which columns, at which rates."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from torch import Tensor, nn
from typing_extensions import Unpack

from ..checks import finite, matching, name_patterns
from ..errors import ConfigError
from ..keywords import DEFAULT_EXCLUDE, ProjectKeywords, check_names, completed

QUERY_KEY = (
    "*q_proj.weight", "*k_proj.weight",  # LLaMA, Mistral, Qwen, OPT
    "*.query.weight", "*.key.weight",  # BERT, ViT
    "*.wq.weight", "*.wk.weight", "*.to_q.weight", "*.to_k.weight",  # LLaMA's own code, diffusers
    "*.q.weight", "*.k.weight", "*q_lin.weight", "*k_lin.weight",  # T5, DistilBERT
)  # fmt: skip
"""Name patterns of query and key projections. A fused one (GPT-2's ``c_attn``) has no rate of its own."""


def param_groups(
    model: nn.Module,
    *,
    lr: float | Tensor,
    dense_lr: float | Tensor | None = None,
    query_key: Sequence[str] = QUERY_KEY,
    query_key_factor: float = 2.0,
    **project: Unpack[ProjectKeywords],
) -> list[dict[str, Any]]:
    """Parameter groups for any optimizer of this package: linear weights, among them queries and keys, and everything else.

    ``grass_compile.Muon(grass_compile.param_groups(model, lr=6e-3, dense_lr=1e-3), rank=512)`` projects the
    linear weights, moves query and key projections at twice the rate of the others, and trains the rest densely. By how much
    that is better is in ``docs/choosing.md``. The groups are plain dicts and may be changed.

    A matrix that no matmul with activations reads stays dense in its group; `grass_compile.explain` names it.

    Args:
        model: the model; every parameter of it goes into one of the groups.
        lr: learning rate of projected weights.
        dense_lr: learning rate of the rest (embeddings, the head, norms, biases); None: ``lr``.
        query_key: name patterns (``fnmatch``) of the weights that have a rate of their own.
        query_key_factor: this rate, as a multiple of ``lr``.
        **project: ``exclude``, ``rank``, ``preset`` and the rest of `grass_compile.keywords`, for the projected weights;
            what is left out is as the optimizer says.

    Returns:
        up to three groups of named parameters, those that are empty left out: linear weights, query and key projections, and,
        with ``rank=None``, the rest.

    Raises:
        ConfigError: ``model`` is not a module, or has no weight that could be projected; an unknown keyword; patterns that are
            not a list; a factor that is not positive.
    """
    if not isinstance(model, nn.Module):
        raise ConfigError(f"param_groups needs a torch.nn.Module, got {type(model).__name__}.")
    check_names(project, "param_groups")
    completed(project)  # refuses a preset that is not known
    if finite("param_groups: query_key_factor", query_key_factor) <= 0:
        raise ConfigError(f"param_groups: query_key_factor must be above 0, got {query_key_factor!r}.")
    query_key = name_patterns("query_key", query_key)
    exclude = name_patterns("exclude", project.get("exclude", DEFAULT_EXCLUDE))

    # An embedding is a matrix too, and so is a head that is tied to one.
    tables = [module for module in model.modules() if isinstance(module, nn.Embedding | nn.EmbeddingBag)]
    embeddings = {id(table.weight) for table in tables}
    linear: list[tuple[str, nn.Parameter]] = []
    queries: list[tuple[str, nn.Parameter]] = []
    rest: list[tuple[str, nn.Parameter]] = []
    for name, p in model.named_parameters():
        if p.ndim != 2 or id(p) in embeddings or matching(name, exclude) is not None:
            rest.append((name, p))
        else:
            (queries if matching(name, query_key) is not None else linear).append((name, p))
    if not linear and not queries:
        raise ConfigError(
            f"param_groups: {type(model).__name__} has no linear weight that could be projected: none of its parameters is a "
            f"matrix, or all that are belong to embeddings or match exclude={exclude!r}."
        )
    keywords = {**project, "exclude": exclude}
    groups: list[dict[str, Any]] = [
        {"params": linear, "lr": lr, **keywords},
        {"params": queries, "lr": lr * query_key_factor, **keywords},
        {"params": rest, "lr": lr if dense_lr is None else dense_lr, "rank": None},
    ]
    return [group for group in groups if group["params"]]
