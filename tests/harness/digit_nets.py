"""Small nets that really know scikit-learn's digits, trained in seconds from a fixed seed.

The kinds that recipes differ on: a perceptron (Gemm), a CNN with depthwise convolutions, and a
transformer encoder (MatMul, attention).
"""

from dataclasses import dataclass
from pathlib import Path
from typing import Any, cast

import numpy as np
import torch
from numpy.typing import NDArray
from sklearn.datasets import load_digits
from torch import Tensor, nn

Float = NDArray[np.float32]

SEED = 5
SIDE = 8
CLASSES = 10
_TRAINED_ON = 1347
"""Three quarters, as the demo's split; the 450 others judge."""


@dataclass(frozen=True)
class Digits:
    """Pictures `float32[N, 1, 8, 8]`, 0–1, and their digits `int64[N]`."""

    x: Float
    y: NDArray[np.int64]


def load_split() -> tuple[Digits, Digits]:
    """Return what to train (and calibrate) with, and what to judge by."""
    found = load_digits()
    order = np.random.default_rng(SEED).permutation(len(found.target))
    x = (found.images[order] / 16).astype(np.float32)[:, None]
    y = found.target[order].astype(np.int64)
    return Digits(x[:_TRAINED_ON], y[:_TRAINED_ON]), Digits(x[_TRAINED_ON:], y[_TRAINED_ON:])


class Perceptron(nn.Sequential):
    """Two hidden layers."""

    def __init__(self, hidden: int = 64) -> None:
        super().__init__(
            nn.Flatten(),
            nn.Linear(SIDE * SIDE, hidden),
            nn.ReLU(),
            nn.Linear(hidden, hidden),
            nn.ReLU(),
            nn.Linear(hidden, CLASSES),
        )


class Separable(nn.Sequential):
    """A depthwise convolution, then one of 1 × 1."""

    def __init__(self, before: int, after: int, stride: int) -> None:
        super().__init__(
            nn.Conv2d(before, before, 3, stride, 1, groups=before, bias=False),
            nn.BatchNorm2d(before),
            nn.ReLU(),
            nn.Conv2d(before, after, 1, bias=False),
            nn.BatchNorm2d(after),
            nn.ReLU(),
        )


class ConvNet(nn.Sequential):
    """Of MobileNet's kind."""

    def __init__(self, width: int = 24) -> None:
        super().__init__(
            nn.Conv2d(1, width, 3, padding=1, bias=False),
            nn.BatchNorm2d(width),
            nn.ReLU(),
            Separable(width, 2 * width, 2),
            Separable(2 * width, 2 * width, 1),
            nn.AdaptiveAvgPool2d(1),
            nn.Flatten(),
            nn.Linear(2 * width, CLASSES),
        )


class Encoder(nn.Module):
    """One transformer block over the picture's rows, with attention written by hand."""

    def __init__(self, width: int = 64, heads: int = 4) -> None:
        super().__init__()
        self.heads = heads
        self.embed = nn.Linear(SIDE, width)
        self.place = nn.Parameter(torch.randn(SIDE, width) * 0.02)
        self.qkv = nn.Linear(width, 3 * width)
        self.merge = nn.Linear(width, width)
        self.norms = nn.ModuleList([nn.LayerNorm(width), nn.LayerNorm(width)])
        self.widen = nn.Linear(width, 4 * width)
        self.narrow = nn.Linear(4 * width, width)
        self.head = nn.Linear(width, CLASSES)

    def forward(self, x: Tensor) -> Tensor:
        x = self.embed(x.flatten(1, 2)) + self.place
        x = x + self.attend(self.norms[0](x))
        x = x + self.narrow(torch.relu(self.widen(self.norms[1](x))))
        scores: Tensor = self.head(x.mean(1))
        return scores

    def attend(self, x: Tensor) -> Tensor:
        rows, length, width = x.shape
        split = self.qkv(x).reshape(rows, length, 3, self.heads, width // self.heads)
        q, k, v = split.permute(2, 0, 3, 1, 4)
        weights = torch.softmax(q @ k.transpose(-1, -2) / (width // self.heads) ** 0.5, -1)
        merged: Tensor = self.merge((weights @ v).transpose(1, 2).reshape(rows, length, width))
        return merged


def train(net: nn.Module, data: Digits, epochs: int = 12, rate: float = 3e-3) -> nn.Module:
    """Train a net in place, in a few seconds; return it, ready to answer."""
    generator = torch.Generator().manual_seed(SEED)
    x, y = torch.from_numpy(data.x), torch.from_numpy(data.y)
    optimizer = torch.optim.Adam(net.parameters(), rate)
    net.train()
    for _ in range(epochs):
        order = torch.randperm(len(x), generator=generator)
        for batch in (order[start : start + 64] for start in range(0, len(x), 64)):
            optimizer.zero_grad()
            torch.autograd.backward(nn.functional.cross_entropy(net(x[batch]), y[batch]))
            optimizer.step()
    return net.eval()


def unbalance(net: ConvNet, factor: float = 300.0) -> ConvNet:
    """Make one channel of the first separable block far larger than the others, in place.

    The net answers as before (ReLU lets a positive factor through, the next weights undo it), but
    8 bits for the whole tensor now leave nearly none for the other channels.
    """
    block = cast("Separable", net[3])
    norm, pointwise = cast("nn.BatchNorm2d", block[1]), cast("nn.Conv2d", block[3])
    with torch.no_grad():
        norm.weight[0] *= factor
        norm.bias[0] *= factor
        pointwise.weight[:, 0] /= factor
    return net


def build(kind: type[nn.Module], **options: Any) -> nn.Module:
    """Return an untrained net with weights from the seed."""
    torch.manual_seed(SEED)
    return kind(**options)


def export_onnx(net: nn.Module, path: Path) -> Path:
    """Write `x` float32[batch, 1, 8, 8] → `y` float32[batch, 10]."""
    torch.onnx.export(
        net.eval(),
        (torch.zeros(2, 1, SIDE, SIDE),),
        path,
        dynamo=True,
        external_data=False,
        opset_version=18,
        input_names=["x"],
        output_names=["y"],
        dynamic_shapes=({0: torch.export.Dim("batch")},),
        verbose=False,
    )
    return path
