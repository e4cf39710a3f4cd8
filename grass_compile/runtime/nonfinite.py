"""Steps that are skipped because their gradient is not finite: what the host knows of them, and reports.

`grass_compile.math.finite` says what counts as finite. With ``nonfinite="raise"`` or ``"skip"`` the compiled step looks at the
compact gradient first, and one that is not finite changes nothing but the count ``state["nonfinite"]``. A refresh looks at the
full gradient; if that is not finite, it chooses no rows and its compact gradient is NaN throughout, so that the step, whenever it
comes, is skipped too, and the refresh stays due. Rows that were drawn blindly are kept.

The device decides and the host learns of it afterwards (`Skips`), since waiting for the answer would leave a GPU idle.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Mapping
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from ..errors import NonFiniteError
from ..math.transfer import to_host

if TYPE_CHECKING:
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
