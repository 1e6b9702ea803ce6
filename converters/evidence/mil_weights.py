"""Compressed weights of a Core ML program, made dense: affine, palettized, sparse.

Owns the `constexpr` operators of iOS 16 and those of iOS 18, which have the same names and other
parameters. Pure functions over arrays.

Source: coremltools 9.0, `converters/mil/mil/ops/defs/iOS16/constexpr_ops.py` and
`iOS18/compression.py`.
"""

import math
from collections.abc import Callable, Mapping

import numpy as np

from converters.evidence.mil_values import unpack_bits
from platforms.runtimes.base import Array


def _dequantize(quantized_data: Array, zero_point: Array, scale: Array, axis: Array) -> Array:
    shape = [1] * quantized_data.ndim

    def spread(values: Array) -> Array:
        one = values.astype(np.float32)
        if one.size == 1:
            return one.reshape(())
        along = [*shape]
        along[int(axis)] = one.size
        return one.reshape(along)

    centred: Array = quantized_data.astype(np.float32) - spread(zero_point)
    return centred * spread(scale)


def _repeat_blocks(values: Array, shape: tuple[int, ...]) -> Array:
    """Return values that each stand for a block, one per element of `shape`."""
    for axis, size in enumerate(shape):
        values = np.repeat(values, size // values.shape[axis], axis)
    return values


def _shift_scale(data: Array, scale: Array, offset: Array | None = None) -> Array:
    centred: Array = data.astype(np.float32)
    if offset is not None:
        centred = centred - _repeat_blocks(offset.astype(np.float32), data.shape)
    return centred * _repeat_blocks(scale.astype(np.float32), data.shape)


def _cast(source_val: Array, output_dtype: str) -> Array:
    del output_dtype
    return source_val.astype(np.float32)


def _look_up(
    indices: Array,
    lut: Array,
    shape: Array | None = None,
    vector_axis: Array | None = None,
) -> Array:
    if shape is not None:
        dense = tuple(int(size) for size in shape)
        bits = round(math.log2(lut.size))
        found: Array = lut[unpack_bits(indices, bits, math.prod(dense))].reshape(dense)
        return found
    # One table per block; its last axes are the palette and the parts of a vector.
    tables = lut.reshape(-1, *lut.shape[-2:])
    blocks = np.arange(len(tables)).reshape(lut.shape[:-2])
    vectors = tables[_repeat_blocks(blocks, indices.shape), indices]
    if vectors.shape[-1] == 1:
        plain: Array = vectors[..., 0]
        return plain
    axis = int(vector_axis) if vector_axis is not None else 0
    moved = np.moveaxis(vectors, -1, axis + 1)
    long = [*indices.shape]
    long[axis] *= vectors.shape[-1]
    return moved.reshape(long)


def _fill_in(nonzero_data: Array, mask: Array, shape: Array | None = None) -> Array:
    if shape is None:
        is_set = mask.astype(bool)
    else:
        dense = tuple(int(size) for size in shape)
        is_set = unpack_bits(mask, 1, math.prod(dense)).reshape(dense).astype(bool)
    found = np.zeros(is_set.shape, nonzero_data.dtype)
    found[is_set] = nonzero_data
    return found


CONSTANTS: Mapping[str, Callable[..., Array]] = {
    "constexpr_affine_dequantize": _dequantize,
    "constexpr_blockwise_shift_scale": _shift_scale,
    "constexpr_cast": _cast,
    "constexpr_lut_to_dense": _look_up,
    "constexpr_sparse_to_dense": _fill_in,
}
