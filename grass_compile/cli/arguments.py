"""What the subcommands read alike."""

from __future__ import annotations

import argparse
import ast
from typing import Any

from ..errors import ConfigError
from ..planner.request import Request, hashable


def request_of(arguments: argparse.Namespace) -> Request:
    """What a command line asks for.

    Args:
        arguments: with ``model``, ``batch``, ``seq``, ``optimizer``, ``dtype``, ``device``, ``compile``, ``checkpointing``,
            ``set`` (texts ``NAME=VALUE``) and ``rank`` (a text, or None).

    Raises:
        ConfigError: an argument makes no sense.
    """
    keywords = dict(_keyword(text) for text in arguments.set)
    if arguments.rank is not None:
        keywords["rank"] = _literal(arguments.rank)
    return Request(
        arguments.model,
        arguments.batch,
        arguments.seq,
        arguments.optimizer,
        arguments.dtype,
        arguments.device,
        arguments.compile,
        arguments.checkpointing,
        keywords=hashable(keywords),
    )


def _keyword(text: str) -> tuple[str, Any]:
    name, equals, value = text.partition("=")
    if not equals:
        raise ConfigError(f"--set {text} is not NAME=VALUE.")
    return name, _literal(value)


def _literal(text: str) -> Any:
    try:
        return ast.literal_eval(text)
    except (ValueError, SyntaxError):
        return text
