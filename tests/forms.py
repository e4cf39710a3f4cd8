"""Every spelling of a linear layer that detection has to understand, as small modules.

Each maps ``x [B, S, N]`` to a tensor whose last dimension holds features. ``separated`` scales features so that row and column
norms of the weight gradients are far apart: the same rows are then the top ones in every precision.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor, nn

B, S, N, M = 3, 5, 24, 32
RANK = 6


def weight(rows: int = M, columns: int = N) -> nn.Parameter:
    """A weight of the usual initial size."""
    return nn.Parameter(torch.randn(rows, columns) / columns**0.5)


class Linear(nn.Module):
    """``F.linear`` without bias."""

    def __init__(self) -> None:
        super().__init__()
        self.w = weight()

    def forward(self, x: Tensor) -> Tensor:
        return F.linear(x, self.w)


class LinearBias(nn.Module):
    """``nn.Linear`` with bias."""

    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.Linear(N, M)

    def forward(self, x: Tensor) -> Tensor:
        return self.layer(x)


class Flat(Linear):
    """Tokens flattened by hand, ``mm`` with a transposed weight."""

    def forward(self, x: Tensor) -> Tensor:
        return (x.reshape(-1, N) @ self.w.t()).view(B, S, M)


class InOut(nn.Module):
    """A weight stored in x out behind ``addmm``: GPT-2's ``Conv1D``."""

    def __init__(self) -> None:
        super().__init__()
        self.w = weight(N, M)
        self.b = nn.Parameter(torch.zeros(M))

    def forward(self, x: Tensor) -> Tensor:
        return torch.addmm(self.b, x.view(-1, N), self.w).view(B, S, M)


class Bmm(nn.Module):
    """``bmm`` with the weight expanded over the batch: the gradient is a sum over the batch."""

    def __init__(self) -> None:
        super().__init__()
        self.w = weight(N, M)

    def forward(self, x: Tensor) -> Tensor:
        return torch.bmm(x, self.w.unsqueeze(0).expand(B, -1, -1))


class Einsum(Linear):
    """``einsum`` over a plain weight."""

    def forward(self, x: Tensor) -> Tensor:
        return torch.einsum("bsi,oi->bso", x, self.w)


class EinsumHeads(Linear):
    """``einsum`` over a weight viewed as heads."""

    def forward(self, x: Tensor) -> Tensor:
        return torch.einsum("bsi,hki->bshk", x, self.w.view(4, M // 4, N)).flatten(2)


class FusedQKV(Linear):
    """One weight, its output split in three."""

    def __init__(self) -> None:
        super().__init__()
        self.w = weight(3 * 16)

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = F.linear(x, self.w).chunk(3, dim=-1)
        return torch.cat([q, 0.5 * k, 2.0 * v], -1)


class SplitWeight(FusedQKV):
    """One weight, itself split in three before use: its gradient is a concatenation."""

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = self.w.split(16)
        return torch.cat([F.linear(x, q), 0.5 * F.linear(x, k), 2.0 * F.linear(x, v)], -1)


class JoinedWeights(nn.Module):
    """Three weights joined before one product: their gradients are slices of it."""

    def __init__(self) -> None:
        super().__init__()
        self.q, self.k, self.v = weight(16), weight(8), weight(8)

    def forward(self, x: Tensor) -> Tensor:
        return F.linear(x, torch.cat([self.q, self.k, self.v]))


class Twice(Linear):
    """One weight used twice: its gradient is a sum of two products."""

    def forward(self, x: Tensor) -> Tensor:
        return F.linear(x, self.w) + F.linear(x.flip(1), self.w).tanh()


class BothWays(Linear):
    """One weight used as an encoder and, transposed, as a decoder."""

    def forward(self, x: Tensor) -> Tensor:
        return F.linear(F.linear(x, self.w).tanh(), self.w.t())


class OneRow(nn.Module):
    """A single row, whose product Inductor decomposes into the multiplication of a column by a row."""

    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.Linear(8, 12)

    def forward(self, x: Tensor) -> Tensor:
        return self.layer(x[0, :1, :8])


class OneVector(Linear):
    """A matrix times a vector."""

    def forward(self, x: Tensor) -> Tensor:
        return self.w @ x[0, 0]


class Scaled(Linear):
    """The weight times a number, and divided by one."""

    def forward(self, x: Tensor) -> Tensor:
        return F.linear(x, self.w * 0.5) + F.linear(x.flip(1), -self.w / 3).tanh()


class ScaledRows(Linear):
    """The weight times a number for each row and one for each column."""

    def forward(self, x: Tensor) -> Tensor:
        rows, columns = torch.linspace(0.5, 1, M).to(self.w), torch.linspace(1, 2, N).to(self.w)
        return F.linear(x, self.w * rows[:, None] / columns)


class ScaledJoined(JoinedWeights):
    """Joined weights times a number for each of their rows."""

    def forward(self, x: Tensor) -> Tensor:
        return F.linear(x, torch.cat([self.q, self.k, self.v]) * torch.linspace(0.5, 1, M).to(self.q)[:, None])


class Masked(Linear):
    """A pruned weight."""

    def forward(self, x: Tensor) -> Tensor:
        mask = torch.arange(M * N).view(M, N) % 5 != 0
        return F.linear(x, self.w * mask.to(self.w))


class TrainedScale(Linear):
    """A scale that is trained too, and needs the full gradient."""

    def __init__(self) -> None:
        super().__init__()
        self.scale = nn.Parameter(torch.tensor(0.5))

    def forward(self, x: Tensor) -> Tensor:
        return F.linear(x, self.w * self.scale)


class Slices(Linear):
    """Slices of a weight used by themselves; a part of it is not used at all."""

    def forward(self, x: Tensor) -> Tensor:
        return torch.cat([F.linear(x, self.w[:8]), F.linear(x.flip(1), self.w[8:24])], -1)


class Strided(Linear):
    """Every second row used by itself."""

    def forward(self, x: Tensor) -> Tensor:
        return torch.cat([F.linear(x, self.w[::2] * 2), F.linear(x.flip(1), self.w[1::2])], -1)


class StridedColumns(Linear):
    """Every second column used by itself."""

    def forward(self, x: Tensor) -> Tensor:
        return F.linear(x[..., : N // 2], self.w[:, ::2]) + F.linear(x[..., N // 2 :], self.w[:, 1::2])


class HeadsInnermost(Linear):
    """``einsum`` over a weight viewed as heads, which lie inside of each."""

    def forward(self, x: Tensor) -> Tensor:
        return torch.einsum("bsi,khi->bshk", x, self.w.view(M // 4, 4, N)).flatten(2)


class HeadsInnermostIn(Linear):
    """The same for what comes in."""

    def forward(self, x: Tensor) -> Tensor:
        return torch.einsum("bshk,okh->bso", x.unflatten(2, (4, N // 4)), self.w.view(M, N // 4, 4))


class LowRank(Linear):
    """A base weight beside a trained product, which needs its full gradient."""

    def __init__(self) -> None:
        super().__init__()
        self.b, self.a = weight(M, 2), weight(2, N)

    def forward(self, x: Tensor) -> Tensor:
        return F.linear(x, self.w + 0.5 * (self.b @ self.a))


class Autocast(Linear):
    """Under bf16 autocast: the product is bf16, the gradient is cast to fp32."""

    def forward(self, x: Tensor) -> Tensor:
        with torch.autocast("cpu", dtype=torch.bfloat16):
            return F.linear(x, self.w)


class WideLogits(Linear):
    """Logits in fp32, as language models compute them."""

    def forward(self, x: Tensor) -> Tensor:
        return F.linear(x, self.w).float()


FORMS: dict[str, Callable[[], nn.Module]] = {
    form.__name__: form
    for form in (
        Linear, LinearBias, Flat, InOut, Bmm, Einsum, EinsumHeads, FusedQKV, SplitWeight, JoinedWeights, Twice, BothWays,
        OneRow, OneVector, Scaled, ScaledRows, ScaledJoined, Masked, TrainedScale, Slices, Strided, StridedColumns,
        HeadsInnermost, HeadsInnermostIn, LowRank, Autocast, WideLogits,
    )
}  # fmt: skip


class Everything(nn.Module):
    """All forms side by side, for what is too slow to compile one by one."""

    def __init__(self, without: tuple[str, ...] = ()) -> None:
        super().__init__()
        self.forms = nn.ModuleList([form() for name, form in FORMS.items() if name not in without])

    def forward(self, x: Tensor) -> list[Tensor]:
        return [form(x) for form in self.forms]


def separated(features: int) -> Tensor:
    """A scale for each feature, neighbours 20 % apart, in a scrambled order."""
    order = torch.randperm(features, generator=torch.Generator().manual_seed(features))
    return 1.2 ** -order.float()


def batch(dtype: torch.dtype, seed: int = 0) -> Tensor:
    """One input with separated features."""
    return (torch.randn(B, S, N, generator=torch.Generator().manual_seed(seed)) * separated(N)).to(dtype)


def loss_of(outputs: Tensor | list[Tensor]) -> Tensor:
    """A loss whose gradient has separated features: a fixed random linear form of each output."""
    total = torch.zeros(())
    for output in outputs if isinstance(outputs, list) else [outputs]:
        features = output.shape[-1]
        noise = torch.randn(output.shape, generator=torch.Generator().manual_seed(features))
        total = total + (output.float() * noise * separated(features)).sum()
    return total
