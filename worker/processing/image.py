"""The step `image`: a picture file in, one float tensor out.

Owns decoding (Pillow), orientation, resizing, cropping and scaling. Never decodes a
format that calls another program (EPS), nor a picture larger than `max_pixels`: the
size is read from the header before a pixel is unpacked.

The order is fixed: decode, turn as EXIF says, mode, resize, crop, `invert`
(255 − x), `× scale`, `− mean`, `÷ std`, layout.
"""

import io
import struct
import zlib
from collections.abc import Mapping
from enum import StrEnum
from pathlib import Path
from typing import Annotated, Any, Literal

import numpy as np
from PIL import Image, ImageOps
from pydantic import Field, model_validator

from agent.manifest import Manifest
from platforms.artifact import Datatype
from platforms.runtimes.base import Array, is_shape_allowed
from worker.errors import BadImageError, StepParamsError
from worker.processing.step import JobInput, Preprocessor, StepParams, get_bytes, parse_params
from worker.processing.tensor import TensorInput

FORMATS = ("PNG", "JPEG", "BMP", "GIF", "PPM", "TIFF", "WEBP")
DEFAULT_MAX_PIXELS = 40_000_000
"""Larger than any common sensor's picture; 120 MB as RGB."""

_FULL_SCALE = 255.0

# What Pillow's decoders raise on damaged files: its documentation sets no bound.
_DECODE_FAULTS = (
    OSError,
    SyntaxError,
    ValueError,
    TypeError,
    LookupError,
    ArithmeticError,
    AssertionError,
    AttributeError,
    EOFError,
    MemoryError,
    RuntimeError,
    struct.error,
    zlib.error,
    Image.DecompressionBombError,
    Image.DecompressionBombWarning,
)


class Resample(StrEnum):
    """Pillow's resampling filters."""

    NEAREST = "nearest"
    BOX = "box"
    BILINEAR = "bilinear"
    BICUBIC = "bicubic"
    LANCZOS = "lanczos"


PositiveInt = Annotated[int, Field(ge=1, le=1 << 14)]


class ImageParams(StepParams):
    """Parameters of the step `image`."""

    size: tuple[PositiveInt, PositiveInt]
    """Height and width of what the model sees, in pixels."""
    resize: Literal["stretch", "shortest", "contain"] = "stretch"
    """To the size whatever the proportions; to cover it; to fit into it, with black borders."""
    crop: Literal["center", "none"] = "none"
    """What sticks out after `shortest`."""
    mode: Literal["RGB", "L"] = "RGB"
    layout: Literal["NCHW", "NHWC", "NC"] = "NCHW"
    """`NC` is flattened row by row, channels last."""
    scale: float = 1 / _FULL_SCALE
    mean: tuple[float, ...] = (0.0,)
    """Subtracted after scaling: one number, or one per channel."""
    std: tuple[float, ...] = (1.0,)
    resample: Resample = Resample.BILINEAR
    invert: bool = False
    max_pixels: Annotated[int, Field(ge=1)] = DEFAULT_MAX_PIXELS

    @property
    def channels(self) -> int:
        """Channels of the mode."""
        return len(self.mode)

    @property
    def shape(self) -> tuple[int, ...]:
        """Shape of the tensor the step makes, batch axis included."""
        height, width = self.size
        by_layout = {
            "NCHW": (1, self.channels, height, width),
            "NHWC": (1, height, width, self.channels),
            "NC": (1, height * width * self.channels),
        }
        return by_layout[self.layout]

    @model_validator(mode="after")
    def _check_together(self) -> "ImageParams":
        for name, values in (("mean", self.mean), ("std", self.std)):
            if len(values) not in {1, self.channels}:
                msg = f"{name} has {len(values)} numbers, mode {self.mode} takes 1 or one a channel"
                raise ValueError(msg)
        if 0.0 in self.std:
            msg = "std must not be 0"
            raise ValueError(msg)
        if (self.resize == "shortest") != (self.crop == "center"):
            msg = "crop center goes with resize shortest, and with nothing else"
            raise ValueError(msg)
        return self


class ImageStep:
    """Turns one picture into `float32[1, …]` in the model's layout."""

    def __init__(self, params: ImageParams, name: str, prepared: TensorInput) -> None:
        """Work out the numbers that are the same for every picture."""
        self._params = params
        self._name = name
        self._prepared = prepared
        self._mean = np.asarray(params.mean, dtype=np.float32)
        self._std = np.asarray(params.std, dtype=np.float32)

    def __call__(self, given: JobInput) -> dict[str, Array]:
        """Return the tensor of the picture in `given.data`.

        Tensors that a job brings instead are taken as already prepared.

        Raises:
            PreprocessError: the job brought no bytes, or tensors that do not fit.
            BadImageError: they are no picture, a damaged one, or one too large.
        """
        if given.tensors is not None:
            return self._prepared(given)
        data = get_bytes(given, "image")
        image = decode_image(data, self._params.mode, self._params.max_pixels)
        return {self._name: self._scale(self._fit(image))}

    def _fit(self, image: Image.Image) -> Image.Image:
        height, width = self._params.size
        size, method = (width, height), Image.Resampling[self._params.resample.name]
        if self._params.resize == "shortest":
            return ImageOps.fit(image, size, method)
        if self._params.resize == "contain":
            return ImageOps.pad(image, size, method)
        return image.resize(size, method)

    def _scale(self, image: Image.Image) -> Array:
        pixels = np.asarray(image, dtype=np.float32)
        if self._params.invert:
            pixels = np.float32(_FULL_SCALE) - pixels
        pixels = pixels.reshape(*self._params.size, self._params.channels)
        pixels = (pixels * np.float32(self._params.scale) - self._mean) / self._std
        if self._params.layout == "NCHW":
            pixels = pixels.transpose(2, 0, 1)
        return np.ascontiguousarray(pixels).reshape(self._params.shape)


def build_image(params: Mapping[str, Any], manifest: Manifest, folder: Path) -> Preprocessor:
    """Return the step `image` for a model with one FP32 input.

    Raises:
        StepParamsError: a parameter is bad, or the model's input is not what it makes.
    """
    del folder
    parsed = parse_params("image", ImageParams, params)
    first = manifest.inputs[0]
    if len(manifest.inputs) != 1 or first.datatype is not Datatype.FP32:
        msg = "step image makes one FP32 tensor, and the model takes something else"
        raise StepParamsError(msg)
    if not is_shape_allowed(first.shape, parsed.shape):
        msg = f"step image makes {list(parsed.shape)}, the model takes {list(first.shape)}"
        raise StepParamsError(msg)
    return ImageStep(parsed, first.name, TensorInput(manifest))


def decode_image(data: bytes, mode: str, max_pixels: int) -> Image.Image:
    """Return the picture in `data`, complete, the right way up, in Pillow's `mode`.

    Raises:
        BadImageError: it is none, is damaged or cut short, has more than `max_pixels`
            pixels, or 16 bits or floats a channel.
    """
    try:
        image = Image.open(io.BytesIO(data), formats=FORMATS)
        _check_header(image, max_pixels)
        image.load()
        return ImageOps.exif_transpose(image).convert(mode)
    except _DECODE_FAULTS as exc:
        msg = f"the bytes are no picture that can be decoded: {exc}"
        raise BadImageError(msg) from exc


def _check_header(image: Image.Image, max_pixels: int) -> None:
    if image.width * image.height > max_pixels:
        msg = f"the picture is {image.width} × {image.height}; at most {max_pixels} pixels"
        raise BadImageError(msg)
    if image.mode.startswith(("I", "F")):
        msg = f"the picture has mode {image.mode}: convert it to 8 bits a channel first"
        raise BadImageError(msg)
