"""A transformer encoder over token ids, with a mask: two inputs, one of them whole numbers."""

import torch
from torch import nn

MANIFEST = {"inputs": ["ids", "mask"], "outputs": ["scores"]}


class Encoder(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.table = nn.Embedding(50, 16)
        layer = nn.TransformerEncoderLayer(16, 2, 32, batch_first=True)
        self.layers = nn.TransformerEncoder(layer, 2, enable_nested_tensor=False)
        self.head = nn.Linear(16, 4)

    def forward(self, ids: torch.Tensor, mask: torch.Tensor) -> torch.Tensor:
        x = self.layers(self.table(ids))
        x = (x * mask[:, :, None]).sum(1) / mask.sum(1, keepdim=True)
        return self.head(x)  # type: ignore[no-any-return]


def build() -> nn.Module:
    torch.manual_seed(3)
    return Encoder()


def example_inputs() -> dict[str, torch.Tensor]:
    return {"mask": torch.ones(2, 6), "ids": torch.randint(0, 50, (2, 6), dtype=torch.int32)}
