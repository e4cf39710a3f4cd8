"""Small tensors on their way between the host and a device, at which neither waits for the other.

A copy from or to pageable memory waits until the device has done all that it was given before. One such copy a step, of a
learning rate, would leave a GPU idle while the host prepares what comes next.
"""

from __future__ import annotations

import torch
from torch import Tensor


def to_device(tensor: Tensor, device: torch.device) -> Tensor:
    """A tensor of the host on ``device``."""
    if device.type != "cuda":
        return tensor.to(device)
    return tensor.pin_memory().to(device, non_blocking=True)  # the pinned copy is kept for as long as the device reads it


def to_host(tensor: Tensor) -> tuple[Tensor, torch.cuda.Event | None]:
    """A copy on the host, and the event after which it holds the values; None if it does now."""
    device = tensor.device
    if device.type != "cuda":
        return tensor.to("cpu"), None
    copied, event = tensor.to("cpu", non_blocking=True), torch.cuda.Event()  # into pinned memory
    event.record(torch.cuda.current_stream(device))
    return copied, event
