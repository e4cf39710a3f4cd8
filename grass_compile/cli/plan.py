"""``grass-compile plan``: how many bytes training needs, and whether they are there."""

from __future__ import annotations

import argparse
import dataclasses
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from ..errors import ConfigError
from ..planner import questions
from ..planner.models import NAMES
from ..planner.picture import draw
from ..planner.plan import of_request
from ..planner.request import DTYPES, OTHERS, Request
from ..planner.result import Plan
from ..planner.sizes import in_words, parse_bytes
from ..planner.spread import SHARDINGS, World
from .arguments import request_of

DESCRIPTION = """Say how many bytes training needs, without a GPU, without weights and without memory. Exits with 0 if it fits
(or if no --memory is given), with 1 if it does not, with 2 if the input makes no sense."""


def add(commands: Any) -> None:
    """Add the subcommand."""
    parser = commands.add_parser("plan", help="how many bytes training needs", description=DESCRIPTION)
    parser.add_argument(
        "model", help=f"a name ({', '.join(NAMES)}), a Hugging Face config.json or its folder, or module:function"
    )
    parser.add_argument("--rank", help="rows or columns of each weight that are trained at a time: 128, or a fraction, 0.25")
    parser.add_argument("--batch", type=int, default=1, help="sequences in a batch (default 1)")
    parser.add_argument("--seq", type=int, default=2048, help="tokens in a sequence (default 2048)")
    parser.add_argument("--memory", help="what there is: 40GB, 40GiB, 4e10")
    parser.add_argument("--optimizer", default="AdamW", help="AdamW, Muon, AdamW8bit, ... or, to compare, adamw, lora, ...")
    parser.add_argument(
        "--set", action="append", default=[], metavar="NAME=VALUE", help="a keyword of the optimizer: --set axis=rows"
    )
    parser.add_argument("--dtype", choices=list(DTYPES), default="bf16", help="of the weights (default bf16)")
    parser.add_argument("--device", choices=("cuda", "cpu"), default="cuda", help="default cuda; there need not be one")
    parser.add_argument("--compile", choices=("blocks", "whole"), default="blocks", help="default blocks")
    parser.add_argument("--checkpointing", action="store_true", help="compute activations again in the backward")
    parser.add_argument("--world", default="1", help="ranks, or replicas x shards: 8, 2x4 (default 1)")
    parser.add_argument("--sharding", choices=SHARDINGS, help="how they share the work")
    parser.add_argument("--compare", nargs="*", choices=OTHERS, metavar="METHOD", help=f"beside it: {', '.join(OTHERS)} (all)")
    parser.add_argument("--largest", choices=list(questions.STEPS), help="the largest that fits into --memory")
    parser.add_argument("--best", action="store_true", help="the best rule and rank that fit into --memory")
    parser.add_argument("--layers", action="store_true", help="bytes by layer, too")
    parser.add_argument("--json", action="store_true", help="print JSON; compares unless --compare says otherwise")
    parser.add_argument("--png", type=Path, metavar="FILE", help="draw it (needs matplotlib); compares likewise")
    parser.set_defaults(run=run)


def run(arguments: argparse.Namespace) -> int:
    """Plan."""
    limit = parse_bytes(arguments.memory) if arguments.memory is not None else None
    if limit is None and (arguments.largest or arguments.best):
        raise ConfigError("--largest and --best look for what fits, so they need --memory.")
    request = _request(arguments)
    if arguments.best:
        return _best(request, arguments, limit)
    if arguments.largest:
        return _largest(request, arguments, limit)
    wanted = arguments.compare
    if wanted is None and (arguments.json or arguments.png):
        wanted = list(OTHERS)
    if wanted is None:
        plans = {"grass": of_request(request)}
    else:
        plans = questions.compare(request, tuple(wanted or OTHERS))
    _show(plans, arguments, limit)
    return 0 if limit is None or plans["grass"].fits(limit) else 1


def _request(arguments: argparse.Namespace) -> Request:
    if arguments.rank is None and (arguments.best or arguments.largest == "rank"):
        arguments.rank = str(questions.STEPS["rank"])
    if arguments.rank is None and arguments.optimizer not in OTHERS:
        raise ConfigError("--rank is missing: how many rows or columns of each weight are trained at a time.")
    return dataclasses.replace(request_of(arguments), world=World.parse(arguments.world, arguments.sharding))


def _best(request: Request, arguments: argparse.Namespace, limit: int | None) -> int:
    assert limit is not None
    found = questions.best(request, limit)
    if found is None:
        tried = ", ".join(f"{name} at {share:g} of the width" for name, share in questions.PREFERENCE)
        _nothing(arguments, limit, f"None fits into {in_words(limit)}: {tried}. Try --checkpointing, a smaller --batch or --seq.")
        return 1
    _show({"grass": found[0]}, arguments, limit)
    return 0


def _largest(request: Request, arguments: argparse.Namespace, limit: int | None) -> int:
    assert limit is not None
    found = questions.largest(request, arguments.largest, limit)
    if found is None:
        _nothing(
            arguments, limit, f"Not even {arguments.largest}={questions.STEPS[arguments.largest]} fits into {in_words(limit)}."
        )
        return 1
    if not arguments.json:
        print(f"the largest {arguments.largest} that fits into {in_words(limit)}: {found[0]}")
    _show({"grass": found[1]}, arguments, limit)
    return 0


def _nothing(arguments: argparse.Namespace, limit: int, sentence: str) -> None:
    print(json.dumps({"memory_bytes": limit, "methods": {}, "reason": sentence}) if arguments.json else sentence)


def _show(plans: Mapping[str, Plan], arguments: argparse.Namespace, limit: int | None) -> None:
    if arguments.json:
        found = {name: _with_verdict(plan, limit) for name, plan in plans.items()}
        print(json.dumps({"memory_bytes": limit, "methods": found}, indent=1))
    else:
        _print(plans, arguments, limit)
    if arguments.png:
        draw(plans, arguments.png, limit)


def _print(plans: Mapping[str, Plan], arguments: argparse.Namespace, limit: int | None) -> None:
    print(plans["grass"])
    if arguments.layers:
        for name, kinds in plans["grass"].layers.items():
            print(f"  {in_words(sum(kinds.values())):>12}  {name or 'the rest'}")
    if limit is not None:
        _print_verdict(plans["grass"], limit)
    if len(plans) > 1:
        print("\nbeside it:")
        for name, plan in plans.items():
            fits = "" if limit is None else "  fits" if plan.fits(limit) else "  does not fit"
            print(f"  {in_words(plan.peak_bytes):>12}  {plan.method if name == 'grass' else name}{fits}")


def _with_verdict(plan: Plan, limit: int | None) -> dict[str, Any]:
    return plan.as_dict() | {"fits": None if limit is None else plan.fits(limit)}


def _print_verdict(plan: Plan, limit: int) -> None:
    spare = limit - plan.peak_bytes
    if spare >= 0:
        print(f"It fits into {in_words(limit)}, and leaves {in_words(spare)}.")
    else:
        print(f"It does not fit into {in_words(limit)}: {in_words(-spare)} are missing. Try --checkpointing or --best.")
