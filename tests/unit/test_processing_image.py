"""The step `image`: pictures in, scaled tensors out, hostile files refused."""

import io
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from platforms.artifact import Datatype
from platforms.runtimes.base import Array
from tests.unit.test_processing_tensor import declare
from worker.errors import BadImageError, PreprocessError, StepParamsError
from worker.processing.image import build_image
from worker.processing.step import JobInput

NOWHERE = Path("/nonexistent")
RGB = np.random.default_rng(0).integers(0, 256, (6, 4, 3), dtype=np.uint8)


def encode(pixels: Array, kind: str = "PNG", **options: Any) -> bytes:
    buffer = io.BytesIO()
    Image.fromarray(pixels).save(buffer, kind, **options)
    return buffer.getvalue()


def run(params: dict[str, Any], shape: tuple[int, ...], data: bytes) -> Array:
    step = build_image(params, declare(("x", Datatype.FP32, shape)), NOWHERE)
    return step(JobInput(data=data))["x"]


def test_png_of_the_right_size_comes_through_exactly_in_each_layout() -> None:
    nchw = run({"size": [6, 4]}, (-1, 3, 6, 4), encode(RGB))
    nhwc = run({"size": [6, 4], "layout": "NHWC"}, (-1, 6, 4, 3), encode(RGB))
    flat = run({"size": [6, 4], "layout": "NC"}, (-1, 72), encode(RGB))
    right = RGB.astype(np.float32) / np.float32(255)
    assert {nchw.dtype, nhwc.dtype, flat.dtype} == {np.dtype(np.float32)}
    assert np.allclose(nhwc[0], right, atol=1e-7)
    assert np.array_equal(nchw[0].transpose(1, 2, 0), nhwc[0])
    assert np.array_equal(flat[0], nhwc.reshape(-1))


def test_scale_mean_and_std_apply_in_this_order_per_channel() -> None:
    params = {"size": [6, 4], "layout": "NHWC", "mean": [0.5, 0.25, 0.1], "std": [2, 4, 0.5]}
    found = run(params, (-1, 6, 4, 3), encode(RGB))
    right = (RGB / 255 - np.array([0.5, 0.25, 0.1])) / np.array([2, 4, 0.5])
    assert np.allclose(found[0], right, atol=1e-6)


def test_unscaled_pixels_with_one_mean_match_the_efficientnet_form() -> None:
    params = {"size": [6, 4], "layout": "NHWC", "scale": 1.0, "mean": [127], "std": [128]}
    found = run(params, (-1, 6, 4, 3), encode(RGB))
    assert np.allclose(found[0], (RGB.astype(float) - 127) / 128, atol=1e-6)


def test_invert_turns_black_on_white_round() -> None:
    params = {"size": [6, 4], "mode": "L", "layout": "NHWC", "scale": 1.0, "invert": True}
    found = run(params, (-1, 6, 4, 1), encode(RGB[:, :, 0]))
    assert np.array_equal(found[0, :, :, 0], 255 - RGB[:, :, 0].astype(np.float32))


def test_exif_orientation_is_obeyed() -> None:
    exif = Image.Exif()
    exif[0x0112] = 6  # to be turned by 90° clockwise
    turned = run(
        {"size": [4, 6], "layout": "NHWC", "scale": 1.0}, (-1, 4, 6, 3), encode(RGB, exif=exif)
    )
    assert np.array_equal(turned[0], np.rot90(RGB, -1).astype(np.float32))


def test_shortest_covers_the_size_and_crops_the_middle() -> None:
    wide = np.zeros((4, 12), np.uint8)
    wide[:, 4:8] = 200
    params = {"size": [4, 4], "mode": "L", "resize": "shortest", "crop": "center", "scale": 1.0}
    assert (run(params, (-1, 1, 4, 4), encode(wide)) == 200).all()


def test_contain_fits_all_of_it_between_black_borders() -> None:
    wide = np.full((4, 8), 200, np.uint8)
    params = {"size": [8, 8], "mode": "L", "resize": "contain", "scale": 1.0}
    found = run(params, (-1, 1, 8, 8), encode(wide))[0, 0]
    assert (found[2:6] == 200).all()
    assert (found[:2] == 0).all()
    assert (found[6:] == 0).all()


def test_stretch_takes_any_size() -> None:
    found = run({"size": [3, 9], "resample": "nearest"}, (-1, 3, 3, 9), encode(RGB))
    assert found.shape == (1, 3, 3, 9)


@pytest.mark.parametrize("kind", ["PNG", "JPEG", "BMP", "GIF", "WEBP", "TIFF", "PPM"])
def test_common_formats_are_decoded(kind: str) -> None:
    assert run({"size": [6, 4]}, (-1, 3, 6, 4), encode(RGB, kind)).shape == (1, 3, 6, 4)


@pytest.mark.parametrize("kind", ["PNG", "JPEG", "GIF", "TIFF"])
def test_picture_cut_short_is_refused(kind: str) -> None:
    big = np.random.default_rng(1).integers(0, 256, (64, 64, 3), dtype=np.uint8)
    data = encode(big, kind)
    with pytest.raises(BadImageError):
        run({"size": [6, 4]}, (-1, 3, 6, 4), data[: len(data) // 2])


@pytest.mark.parametrize("data", [b"", b"GIF89a", b"\x89PNG\r\n\x1a\n", b"%!PS-Adobe-3.0 EPSF-3.0"])
def test_bytes_that_are_no_picture_are_refused(data: bytes) -> None:
    with pytest.raises(BadImageError):
        run({"size": [6, 4]}, (-1, 3, 6, 4), data)


def test_picture_with_too_many_pixels_is_refused_by_its_header() -> None:
    params = {"size": [6, 4], "max_pixels": 23}
    with pytest.raises(BadImageError, match="23 pixels"):
        run(params, (-1, 3, 6, 4), encode(RGB))
    bomb = encode(np.zeros((1, 1), np.uint8)).replace(
        b"\0\0\0\x01\0\0\0\x01", b"\0\0\xff\xff\0\0\xff\xff", 1
    )
    with pytest.raises(BadImageError):
        run({"size": [6, 4]}, (-1, 3, 6, 4), bomb)


# Pillow says it about damage that it can decode around.
@pytest.mark.filterwarnings("ignore::UserWarning")
def test_damaged_pictures_raise_nothing_but_the_declared_error() -> None:
    random = np.random.default_rng(2)
    for kind in ("PNG", "JPEG", "BMP", "GIF", "WEBP", "TIFF", "PPM"):
        whole = np.frombuffer(encode(RGB, kind), np.uint8)
        for _ in range(150):
            broken = whole.copy()
            broken[random.integers(0, len(whole), 3)] = random.integers(0, 256, 3)
            try:
                found = run({"size": [6, 4]}, (-1, 3, 6, 4), broken.tobytes())
            except BadImageError:
                continue
            assert found.shape == (1, 3, 6, 4)


def test_sixteen_bit_picture_is_refused_rather_than_clipped() -> None:
    with pytest.raises(BadImageError, match="8 bits"):
        run({"size": [6, 4]}, (-1, 3, 6, 4), encode(np.full((6, 4), 3000, np.uint16)))


def test_prepared_tensor_is_taken_as_it_is() -> None:
    step = build_image(
        {"size": [1, 2], "mode": "L", "layout": "NC"},
        declare(("x", Datatype.FP32, (-1, 2))),
        NOWHERE,
    )
    tensor = {"name": "x", "datatype": "FP32", "shape": [1, 2], "data": [7, 8]}
    assert step(JobInput(tensors=[tensor]))["x"].tolist() == [[7, 8]]
    with pytest.raises(PreprocessError, match="brought none"):
        step(JobInput())


@pytest.mark.parametrize(
    "params",
    [
        {},
        {"size": [0, 4]},
        {"size": [6, 4], "sise": 1},
        {"size": [6, 4], "resize": "cover"},
        {"size": [6, 4], "resize": "shortest"},
        {"size": [6, 4], "crop": "center"},
        {"size": [6, 4], "mean": [1, 2]},
        {"size": [6, 4], "std": [0]},
        {"size": [6, 4], "scale": float("nan")},
        {"size": [6, 5]},
        {"size": [6, 4], "layout": "NHWC"},
    ],
)
def test_parameters_that_do_not_fit_are_refused_when_the_model_loads(params: Any) -> None:
    with pytest.raises(StepParamsError):
        build_image(params, declare(("x", Datatype.FP32, (-1, 3, 6, 4))), NOWHERE)


def test_model_that_takes_no_float_picture_is_refused_when_it_loads() -> None:
    with pytest.raises(StepParamsError, match="FP32"):
        build_image({"size": [6, 4]}, declare(("x", Datatype.UINT8, (-1, 3, 6, 4))), NOWHERE)
