"""Two dense layers, and two outputs by name."""

import torch
from torch import nn

MANIFEST = {
    "name": "mlp",
    "version": "1.2.0",
    "license": "Apache-2.0",
    "inputs": [{"name": "pixels", "datatype": "FP32", "shape": [-1, 16]}],
    "preprocess": {"name": "tensor"},
    "labels": ["a", "b", "c", "d"],
}


class Mlp(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.first = nn.Linear(16, 32)
        self.second = nn.Linear(32, 4)

    def forward(self, x: torch.Tensor) -> dict[str, torch.Tensor]:
        inner = torch.relu(self.first(x))
        return {"scores": self.second(inner), "norm": inner.norm(dim=1, keepdim=True)}


def build() -> nn.Module:
    torch.manual_seed(1)
    return Mlp()
