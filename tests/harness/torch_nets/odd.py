"""A net with an operator that no converter knows."""

import torch
from torch import nn


class Odd(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.Linear(4, 4)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return torch.special.bessel_j0(self.layer(x))  # type: ignore[no-any-return]


def build() -> tuple[nn.Module, torch.Tensor]:
    return Odd(), torch.randn(2, 4)
