"""Gradients that are not finite: what counts as one, and what becomes of its step.

A gradient is *sound* if its norm is finite: no element is infinite or NaN, or so large (1.8e19 in fp32) that its square, which
Adam's second moment would keep, overflows. With ``nonfinite="raise"`` or ``"skip"`` the compiled step looks at the compact
gradient first, and an unsound one changes nothing but the count ``state["nonfinite"]``. A refresh looks at the full
gradient; if that is unsound, it chooses no rows and its compact gradient is NaN throughout, so that the step, whenever it
comes, is skipped too, and the refresh stays due. Rows that were drawn blindly are kept.

The device decides and the host learns of it afterwards (`Skips`), since waiting for the answer would leave a GPU idle.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from ..errors import NonFiniteError
from .transfer import to_host

if TYPE_CHECKING:
    from .state import Record


def sound(gradient: Tensor) -> Tensor:
    """Whether the norm of a gradient (or of the norms of its rows) is finite; ``bool``, 0-d, on its device."""
    wide = gradient.to(torch.promote_types(gradient.dtype, torch.float32))
    return (wide * wide).sum().isfinite()


def unsound(gradients: Sequence[Tensor]) -> Tensor:
    """Which gradients are not sound; ``bool``, one number for each, on the device of the first."""
    if not gradients:
        return torch.zeros(0, dtype=torch.bool, device="cpu")
    return _norms(gradients, 2.0).isfinite().logical_not()


def clip_(gradients: Sequence[Tensor], max_norm: float, norm_type: float) -> Tensor:
    """Scale gradients in place so that their common norm is at most ``max_norm``, as ``torch.nn.utils.clip_grad_norm_``, but for
    those whose norm is not finite: they count for nothing, and become NaN throughout.

    Returns:
        The norm before, of the others; 0-d, without a synchronisation.
    """
    if not gradients:
        return torch.zeros((), device="cpu")
    norms = _norms(gradients, norm_type)
    finite = norms.isfinite()
    norm: Tensor = torch.linalg.vector_norm(torch.where(finite, norms, 0.0 if norm_type >= 0 else torch.inf), norm_type)
    scale = (max_norm / (norm + 1e-6)).clamp(max=1.0)
    factors = torch.where(finite & norm.isfinite(), scale, torch.nan)
    for gradient, factor in zip(gradients, factors.unbind(), strict=True):
        gradient.mul_(factor.to(gradient.device))
    return norm


def _norms(gradients: Sequence[Tensor], norm_type: float) -> Tensor:
    """The norm of each, in at least fp32, on the device of the first."""
    dtypes = [torch.promote_types(gradient.dtype, torch.float32) for gradient in gradients]
    norms = [torch.linalg.vector_norm(g, norm_type, dtype=dtype) for g, dtype in zip(gradients, dtypes, strict=True)]
    return torch.stack([norm.to(norms[0].device) for norm in norms])


def report(skipped: Mapping[Record, int], taken: Mapping[Record, int]) -> None:
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


def _listed(counts: Mapping[Record, int]) -> str:
    """The names of the parameters that ask for a report, and how many steps it is about."""
    asked = {record: count for record, count in counts.items() if record.options.nonfinite == "raise"}
    names = [f"{record.name or 'a weight'} ({count} step{'s' * (count > 1)})" for record, count in asked.items()]
    return ", ".join(names[:8]) + (f" and {len(names) - 8} more" if len(names) > 8 else "")


class Skips:
    """What the host knows of the steps that devices have skipped.

    The counts of an NVIDIA GPU are copied without waiting, and looked at one step later, when the copy has long arrived.
    """

    def __init__(self) -> None:
        self._sent: list[tuple[list[Record], Tensor, torch.cuda.Event | None]] = []

    def look(self, counts: Mapping[Record, Tensor], now: bool) -> tuple[dict[Record, int], dict[Record, int]]:
        """Send for the counts.

        Args:
            counts: of each weight, ``int32[1]``.
            now: whether to wait for them.

        Returns:
            For each weight that has skipped any, how many steps: those that the last look sent for and did not wait for; and
            those since then, as far as they are known.
        """
        late = self._take()
        groups: dict[torch.device, dict[Record, Tensor]] = defaultdict(dict)
        for record, count in counts.items():
            groups[count.device][record] = count
        for group in groups.values():
            self._sent.append((list(group), *to_host(torch.cat(list(group.values())))))
        return late, self._take(only_known=not now)

    def forget(self) -> None:
        """Forget what was sent for; the counts have been replaced."""
        self._sent.clear()

    def _take(self, only_known: bool = False) -> dict[Record, int]:
        """What has come, or all that was sent for, as differences to what was known."""
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
