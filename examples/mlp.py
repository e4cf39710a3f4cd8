"""The smallest possible script: an MLP learns to classify points, its weight gradients never formed in full."""

from __future__ import annotations

import torch
from torch import nn
from torch.nn.functional import cross_entropy

import grass_compile


def main() -> None:
    device = "cuda" if torch.cuda.is_available() else "cpu"
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(64, 512), nn.GELU(), nn.Linear(512, 512), nn.GELU(), nn.Linear(512, 10)).to(device)
    points = torch.randn(4096, 64, device=device)
    labels = (points @ torch.randn(64, 10, device=device)).argmax(1)

    optimizer = grass_compile.AdamW(model.named_parameters(), lr=2e-3, rank=0.25, update_proj_gap=20)
    compiled = torch.compile(model, backend="grass")

    for step in range(201):
        batch = torch.randint(len(points), (512,), device=device)
        loss = cross_entropy(compiled(points[batch]), labels[batch])
        loss.backward()  # the weights move here
        optimizer.step()  # and the biases here
        optimizer.zero_grad()
        if step % 50 == 0:
            print(f"step {step:3d}  loss {loss.item():.4f}")

    print(grass_compile.explain(model, points[:512], optimizer=optimizer))


if __name__ == "__main__":
    main()
