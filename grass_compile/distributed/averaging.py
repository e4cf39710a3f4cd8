"""How the gradient of one weight becomes the mean over the ranks between a backward and ``opt.step()``."""

from __future__ import annotations

from torch import Tensor

from ..errors import StateError
from .layout import Layout


class Averaging:
    """What is known of the gradient of a weight that every rank of a group has.

    A mean of means is itself, so what is averaged already may be averaged again along with the rest.

    Attributes:
        layout: the group.
        in_graph: whether the backward that runs averages the gradient itself.
        on_arrival: whether what waits is to be the mean once the gradient of this backward has arrived.
        apart: whether what waits differs from rank to rank. It says nothing once that is cleared.
    """

    __slots__ = ("apart", "in_graph", "layout", "on_arrival")

    def __init__(self, layout: Layout) -> None:
        self.layout = layout
        self.in_graph = self.on_arrival = self.apart = False

    def expect(self, in_graph: bool, on_arrival: bool, along: bool) -> None:
        """Note what a part of a backward does with its gradient.

        Args:
            in_graph: see above.
            on_arrival: see above.
            along: whether what an earlier part of the same backward has computed is on its way too, and arrives along with it.
        """
        self.in_graph = in_graph and (self.in_graph or not along)
        self.on_arrival = on_arrival or (self.on_arrival and along)

    def arrived(self, waiting: Tensor, is_new: bool, mixed: bool) -> None:
        """A gradient has arrived; average what waits now if this backward is to.

        Args:
            waiting: all that waits for ``opt.step()``.
            is_new: whether nothing had waited before.
            mixed: whether something that no backward has averaged was added to it.
        """
        self.apart = mixed or not self.in_graph or (self.apart and not is_new)
        if self.on_arrival:
            self.finish(waiting)

    def finish(self, waiting: Tensor) -> None:
        """Average what waits unless that was done; all ranks have to call this."""
        if self.apart:
            self.layout.mean_(waiting)
        self.apart = False


def from_outside(label: str) -> StateError:
    """The error for a gradient that the compiled region of a weight does not compute."""
    return StateError(
        f"{label}: it gets a gradient from outside of its compiled region too, which nobody would average over the ranks. "
        "Compute all of its loss inside the compiled model, or keep it dense with exclude=."
    )
