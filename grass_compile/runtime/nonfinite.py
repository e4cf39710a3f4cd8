"""Steps that are skipped because their gradient is not finite: what the host knows of them, and reports.

`grass_compile.math.finite` says what counts as finite. With ``nonfinite="raise"`` or ``"skip"`` the compiled step looks at the
compact gradient first, and one that is not finite changes nothing but the count ``state["nonfinite"]``. A refresh looks at the
full gradient; if that is not finite, it chooses no rows and its compact gradient is NaN throughout, so that the step, whenever it
comes, is skipped too, and the refresh stays due. Rows that were drawn blindly are kept.

The device decides and the host learns of it afterwards (`Skips`), since waiting for the answer would leave a GPU idle.
"""

from __future__ import annotations

from collections import Counter, defaultdict
from collections.abc import Iterable, Mapping, Sequence

import torch
from torch import Tensor

from ..distributed.layout import anywhere
from ..errors import NonFiniteError
from ..math.finite import not_finite
from ..math.transfer import to_host
from .gradient import CompactGrad
from .moved import MovedGrad
from .parameter import ProjectedParameter


def report(skipped: Mapping[ProjectedParameter, int], taken: Mapping[ProjectedParameter, int]) -> None:
    """Raise for the parameters that ask for it.

    Args:
        skipped: how many of their steps were.
        taken: of dense parameters that could not be held back, how many steps took a gradient that is not finite.

    Raises:
        NonFiniteError: naming them.
    """
    skips, takes = _listed(skipped), _listed(taken)
    sentences = []
    if skips:
        go_on = "" if takes else ", and after zero_grad() training may go on"
        sentences.append(
            f"the gradient was not finite: {skips}. These steps were skipped: weight and moments are as before{go_on}."
        )
    if takes:
        sentences.append(f"the gradient of dense parameters was not finite: {takes}. On a GPU they are not held back: they have")
        sentences.append("taken it, so go back to a checkpoint.")
    if sentences:
        sentences.append(
            "Look for the cause in the data and the loss; nonfinite='skip' says nothing, 'propagate' checks nothing."
        )
        raise NonFiniteError(" ".join(sentences))


def _listed(counts: Mapping[ProjectedParameter, int]) -> str:
    """The names of the parameters that ask for a report, and how many steps it is about."""
    asked = {record: count for record, count in counts.items() if record.options.nonfinite == "raise"}
    names = [f"{record.name or 'a weight'} ({count} step{'s' * (count > 1)})" for record, count in asked.items()]
    return ", ".join(names[:8]) + (f" and {len(names) - 8} more" if len(names) > 8 else "")


class Skips:
    """The host's knowledge of the steps that devices have skipped.

    The counts of an NVIDIA GPU are copied without waiting, and looked at one step later, when the copy has long arrived.
    """

    def __init__(self) -> None:
        self._sent: list[tuple[list[ProjectedParameter], Tensor, torch.cuda.Event | None]] = []

    def look(
        self, counts: Mapping[ProjectedParameter, Tensor], now: bool
    ) -> tuple[dict[ProjectedParameter, int], dict[ProjectedParameter, int]]:
        """Send for the counts.

        Args:
            counts: of each weight, ``int32[1]``.
            now: whether to wait for them.

        Returns:
            For each weight that has skipped any, how many steps: those that the last look sent for and did not wait for; and
            those since then, as far as they are known.
        """
        late = self._take()
        groups: dict[torch.device, dict[ProjectedParameter, Tensor]] = defaultdict(dict)
        for record, count in counts.items():
            groups[count.device][record] = count
        for group in groups.values():
            self._sent.append((list(group), *to_host(torch.cat(list(group.values())))))
        return late, self._take(only_known=not now)

    def forget(self) -> None:
        """Forget what was sent for; the counts have been replaced."""
        self._sent.clear()

    def _take(self, only_known: bool = False) -> dict[ProjectedParameter, int]:
        """The counts that have come, or all that were sent for, as differences to the known ones."""
        news = {}
        for sent in list(self._sent):
            records, counts, event = sent
            if event is not None:
                if only_known:
                    continue
                event.synchronize()
            self._sent.remove(sent)
            for record, count in zip(records, counts.tolist(), strict=True):
                if count > record.skipped:
                    news[record] = count - record.skipped
                    record.skipped = count
        return news


class NonFinite:
    """What is known of the gradients of one optimizer that are not finite.

    Attributes:
        checked: whether gradients of dense parameters that are not finite are to be kept from the optimizer's own code.
    """

    def __init__(self) -> None:
        self.checked = False
        self._skips = Skips()
        self._withheld: list[ProjectedParameter] = []
        self._taken: dict[ProjectedParameter, Tensor] = {}

    def forget(self) -> None:
        """The state was replaced; the counts in a loaded one are known as they are."""
        self._skips.forget()
        for record in self._taken:
            record.skipped = 0
        self._taken.clear()

    @torch.no_grad()
    def withhold(self, records: Mapping[Tensor, ProjectedParameter]) -> dict[Tensor, Tensor]:
        """Gradients of dense parameters that are not to be applied, since they are not finite.

        Those on a GPU are only counted: the answer would have to be waited for.
        """
        if not self.checked:
            return {}
        present = {parameter: record.gradient for parameter, record in records.items()}
        given = {p: g for p, g in present.items() if g is not None and not isinstance(g, (CompactGrad, MovedGrad))}
        dense = {parameter: gradient for parameter, gradient in given.items() if gradient.layout is torch.strided}
        near = {parameter: gradient for parameter, gradient in dense.items() if _is_at_hand(gradient)}
        self._count({parameter: gradient for parameter, gradient in dense.items() if parameter not in near}, records)
        bad = anywhere(not_finite(list(near.values())), list(near)).tolist()
        found = {parameter: gradient for (parameter, gradient), is_bad in zip(near.items(), bad, strict=True) if is_bad}
        self._withheld = [records[parameter] for parameter in found]
        return found

    def _count(self, gradients: Mapping[Tensor, Tensor], records: Mapping[Tensor, ProjectedParameter]) -> None:
        """Count, without waiting for the device, which gradients are not finite."""
        if not gradients:
            return
        bad = anywhere(not_finite(list(gradients.values())), list(gradients)).to(torch.int32)
        zero, counted = torch.zeros_like(bad[:1]), [records[parameter] for parameter in gradients]
        counts = torch._foreach_add([self._taken.get(record, zero) for record in counted], list(bad.split(1)))
        self._taken.update(zip(counted, counts, strict=True))

    def close(self, records: Iterable[ProjectedParameter]) -> None:
        """At the end of a step, report what has become known.

        Raises:
            NonFiniteError: parameters with ``nonfinite="raise"`` have been left as they were, in this step or (on a GPU) in the
                one before.
        """
        withheld, self._withheld = self._withheld, []
        news = self._news([record for record in records if record.assigned is not None and record.options.checked])
        taken = {record: count for record, count in news.items() if record.assigned is None}
        report(Counter(withheld) + news - Counter(taken), taken)

    def _news(self, checked: Sequence[ProjectedParameter]) -> Counter[ProjectedParameter]:
        """How many gradients that were not finite have become known. A refresh that was skipped is due again if its rows were to
        be chosen by that gradient; only then does the host have to know at once."""
        refreshed = [record for record in checked if record.refreshed]
        counts = {record: record.state["nonfinite"] for record in checked}
        late, current = self._skips.look({**self._taken, **counts}, now=bool(refreshed))
        for record in refreshed:
            record.refreshed = False
            if record in current:
                record.state["updates"] -= 1
        return Counter(late) + Counter(current)


def _is_at_hand(gradient: Tensor) -> bool:
    """Whether its values can be looked at without waiting for a device."""
    return gradient.device.type == "cpu"
