"""What is compiled from one Dynamo graph: a variant for each plan, and the analyses that plans are made of."""

from __future__ import annotations

import dataclasses
import functools
import logging
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from torch import fx

from .. import _aot, _dynamo
from ..config import BackendOptions
from ..distributed.tensor_parallel import whole_of
from ..errors import GraphError
from ..passes import pipeline
from ..passes.pipeline import PlanMismatch
from ..passes.records import Analysis, Plan, WeightInput
from ..runtime.call import expected, in_graph
from ..runtime.parameter import ProjectedParameter
from . import kernels
from .lazy import CompiledPair
from .plan import fake_inputs, guessed, is_static, make_plan, meshes_of, nothing_planned, part_read, reads_part, settled

log = logging.getLogger(__name__)


@dataclasses.dataclass(frozen=True)
class Variant:
    """A compiled function, and its halves, which are told at each call what they have to do."""

    call: Callable[..., Any]
    pair: CompiledPair | None


Decided = tuple[Plan, Sequence[ProjectedParameter]]
"""What is compiled from a graph that was looked at, and the records of the weights that it projects."""


class Variants:
    """The compiled forms of one Dynamo graph."""

    def __init__(self, captured: _dynamo.Captured, options: BackendOptions) -> None:
        self.captured, self.options = captured, options
        self._analyses: dict[tuple[WeightInput, ...], tuple[tuple[WeightInput, ...], Analysis]] = {}
        self._variants: dict[Plan | None, Variant] = {}

    def plan(
        self, weights: tuple[WeightInput, ...], records: Mapping[int, ProjectedParameter], clipped: tuple[int, ...] | None
    ) -> Plan | None:
        """The plan for what optimizers want of the weights of a call, or None if nothing is projected.

        Args:
            weights: what they want.
            records: of the weights, by position.
            clipped: see `Plan`.

        Raises:
            GraphError: ``strict``, and a weight that should be projected is not.
        """
        if weights not in self._analyses:
            with _dynamo.compiling():
                if weights not in self._analyses:
                    self._look_and_compile(weights, records, clipped)
        weights, analysis = self._analyses[weights]
        return make_plan(self.options, weights, analysis, records, clipped)

    def analyse(self, weights: tuple[WeightInput, ...]) -> tuple[tuple[WeightInput, ...], Analysis]:
        """Which of ``weights`` can be projected in this graph; traced once per set of requests.

        Returns:
            The requests as they stand once every axis is settled (which is how the optimizers ask from now on), and the
            analysis of these.
        """
        if weights not in self._analyses:
            with _dynamo.compiling():
                if weights not in self._analyses:
                    self._look(weights)
        return self._analyses[weights]

    def _look(self, weights: tuple[WeightInput, ...]) -> None:
        """Analyse the graph for ``weights``, and go no further."""

        def stop(found: Analysis) -> Decided:
            raise PlanMismatch(found)

        try:
            self._trace(nothing_planned(self.options, weights), stop)
            self._note(weights, Analysis((), ()))  # the graph needs no backward
        except PlanMismatch as looked:
            self._note(weights, looked.analysis)

    def _look_and_compile(
        self, weights: tuple[WeightInput, ...], records: Mapping[int, ProjectedParameter], clipped: tuple[int, ...] | None
    ) -> None:
        """Analyse the graph for ``weights``, and compile it in the same trace if it is as `guessed`."""
        shapes = {w.position: tuple(part_read(w, self.captured.example_inputs[w.position]).shape) for w in weights}
        guess = guessed(self.options, weights, records, shapes, clipped)
        plans: list[Plan] = []

        def decide(found: Analysis) -> Decided:
            with _aot.outside_of_tracing():
                asked, analysis = self._note(weights, found)
                plan = make_plan(self.options, asked, analysis, records, clipped)
            if plan is None or not plan.takes_inputs_of(guess):
                raise PlanMismatch(found)
            plans.append(plan)
            return plan, records_of(plan, records)

        try:
            variant = self._trace(guess, decide)
        except PlanMismatch:
            log.debug("the graph is traced again, since it needs other inputs than were guessed")
            return
        if plans:
            self._variants[plans[0]] = variant
        else:
            self._note(weights, Analysis((), ()))  # the graph needs no backward

    def _note(self, weights: tuple[WeightInput, ...], found: Analysis) -> tuple[tuple[WeightInput, ...], Analysis]:
        """Keep what was found for ``weights``; see `analyse`."""
        asked, analysis = settled(weights, found)
        self._analyses[weights] = self._analyses[asked] = asked, analysis
        return asked, analysis

    def of(self, plan: Plan | None, held: Sequence[ProjectedParameter] = ()) -> Variant:
        """The compiled variant for ``plan``; None stands for the graph as any compiler would have it."""
        if plan not in self._variants:
            with _dynamo.compiling():
                if plan not in self._variants:
                    self._variants[plan] = self._compile_plain() if plan is None else self._compile_plan(plan, held)
        return self._variants[plan]

    def _compile_plain(self) -> Variant:
        gm = _dynamo.with_inputs(self.captured, (), ())
        return Variant(self._compile(gm, self.captured.example_inputs, None), None)

    def _compile_plan(self, plan: Plan, held: Sequence[ProjectedParameter]) -> Variant:
        def decide(found: Analysis) -> Decided:
            if found.projections != plan.projections:
                raise GraphError(
                    f"the graph of {plan.projections[0].name} changed between two traces; please report this: {found}"
                )
            return plan, held

        return self._trace(plan, decide)

    def _trace(self, asked: Plan, decide: Callable[[Analysis], Decided]) -> Variant:
        """Trace the graph, and compile it unless ``decide`` raises.

        Args:
            asked: what it is traced for; it gets the inputs of this plan.
            decide: makes of what was found in it what is compiled.
        """
        examples, pair = [*self.captured.example_inputs], CompiledPair()
        meshes = meshes_of(asked, examples)
        names = (*asked.input_names, *(f"grass_mesh_{number}" for number in range(len(meshes))))
        gm = _dynamo.with_inputs(self.captured, names, [is_static(name) for name in names])
        first_mesh, made_of = len(examples) + len(asked.input_names), {}
        for weight in asked.weights:
            if reads_part(weight, spread := examples[weight.position]):
                mesh = first_mesh + list(meshes).index(spread.device_mesh)
                made_of[weight.position] = whole_of(spread), mesh
                examples[weight.position] = part_read(weight, spread)
        if made_of:
            _dynamo.replace_inputs(gm, made_of)
        inputs = (*examples, *fake_inputs(_dynamo.fake_mode(self.captured), examples, asked), *meshes.values())

        def decided(found: Analysis) -> Plan:
            plan, held = decide(found)
            log.info("compiling: %d weights projected", len(plan.projections))
            _prepare(pair, plan, held)
            return plan

        transform = functools.partial(pipeline.transform, asked=asked, decide=decided)
        spread = any(weight.config.layout is not None for weight in asked.weights)
        return Variant(self._compile(gm, inputs, transform, pair, spread), pair)

    def _compile(
        self, gm: fx.GraphModule, inputs: Sequence[Any], partition: Any, pair: CompiledPair | None = None, spread: bool = False
    ) -> Callable[..., Any]:
        # Every rank has to send in the same order; this one goes by the sizes of buffers, which may differ from rank to rank.
        patches = {"reorder_for_peak_memory": False} if spread else {}
        return _aot.compile_graph(
            self.captured,
            gm,
            inputs,
            compiler=self.options.compiler,
            mode=self.options.mode,
            patches={**patches, **dict(self.options.inductor)},
            partition=partition,
            key=kernels.source_hash() + self.options.passes_key,
            pair=pair,
        )


def records_of(plan: Plan, records: Mapping[int, ProjectedParameter]) -> list[ProjectedParameter]:
    """The records of the weights that a plan projects, in its order."""
    return [records[projection.position] for projection in plan.projections]


def _prepare(pair: CompiledPair, plan: Plan, held: Sequence[ProjectedParameter]) -> None:
    """Tell the halves of a plan what they are needed for first: the next call needs what is due now, those that follow a regular
    step."""
    due, never = in_graph(held, [record.due for record in held]), in_graph(held, [False] * len(held))
    refreshes = (due, never) if due != never else (never,)
    pair.forward.prepare(lambda gm, key: pipeline.finish_forward(gm, plan, key), refreshes)
    keys = dict.fromkeys(key for refresh in refreshes for key in expected(held, refresh, plan.clipped is not None))
    pair.backward.prepare(lambda gm, key: pipeline.finish_backward(gm, plan, key, pair.saved(key[0])), tuple(keys))
