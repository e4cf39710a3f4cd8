"""`Plan`: what a training step needs, for people to read and for programs."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from types import MappingProxyType
from typing import Any

from .sizes import in_words, parse_bytes

SLACK = "allocator slack"


@dataclasses.dataclass(frozen=True)
class Plan:
    """What training needs, found without running it.

    Attributes:
        model: what was planned, in a word.
        method: how it is trained: ``grass AdamW``, ``adamw``, ``lora`` and so on.
        settings: batch, seq, dtype, device, compile, checkpointing and the optimizer's keywords.
        parameters: how many numbers the model holds.
        peak_bytes: the most that lives at once, and what the allocator adds by rounding up. The context of a GPU and the
            workspaces of its libraries are not in it.
        phase: in which step and in which part of it that is.
        bytes: bytes by kind at that moment; they add up to ``peak_bytes``.
        steps: the peak of each simulated step, by part.
        saved_bytes: what autograd keeps between forward and backward in a regular step.
        layers: bytes by kind at the peak, for each block, and for what is outside of blocks; of one process, and without states
            that are counted by shapes.
        notes: what a reader should know: assumptions, and parts that were not seen.
        sent: bytes that each rank sends in a regular step, by collective; empty for one process.
    """

    model: str
    method: str
    settings: Mapping[str, Any]
    parameters: int
    peak_bytes: int
    phase: str
    bytes: Mapping[str, int]
    steps: tuple[Mapping[str, int], ...]
    saved_bytes: int
    layers: Mapping[str, Mapping[str, int]]
    notes: tuple[str, ...] = ()
    sent: Mapping[str, int] = dataclasses.field(default_factory=dict)

    def __post_init__(self) -> None:
        for name in ("settings", "bytes", "layers", "sent"):
            object.__setattr__(self, name, MappingProxyType(dict(getattr(self, name))))

    def fits(self, memory: str | int | float) -> bool:
        """Whether it fits into ``memory``: ``"40GB"`` (10^9 bytes each), ``"40GiB"`` (2^30), or bytes.

        Raises:
            ConfigError: that is no size.
        """
        return self.peak_bytes <= parse_bytes(memory)

    def as_dict(self) -> dict[str, Any]:
        """Plain values, for JSON."""
        found = {field.name: getattr(self, field.name) for field in dataclasses.fields(self)}
        plain: dict[str, Any] = _plain(found)
        return plain

    def __str__(self) -> str:
        settings = ", ".join(f"{name}={value}" for name, value in self.settings.items() if value is not None)
        lines = [
            f"{self.model}, {self.parameters / 1e9:.2f} billion parameters, {self.method}: {in_words(self.peak_bytes)}",
            f"  {settings}",
            f"  the peak is in {self.phase}; it is made of",
        ]
        lines += [f"  {in_words(size):>12}  {kind}" for kind, size in self.bytes.items() if size]
        lines += [f"  {in_words(self.saved_bytes):>12}  are kept between forward and backward"]
        lines += [f"  {in_words(size):>12}  are sent by each rank in a step: {name}" for name, size in self.sent.items()]
        return "\n".join([*lines, *(f"  note: {note}" for note in self.notes)])


def _plain(value: Any) -> Any:
    if isinstance(value, Mapping):
        return {str(key): _plain(of) for key, of in value.items()}
    if isinstance(value, (list, tuple)):
        return [_plain(of) for of in value]
    return value if isinstance(value, (int, float, str, bool)) or value is None else str(value)
