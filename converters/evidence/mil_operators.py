"""What each operator of a Core ML program computes, in torch and float32.

Owns the table of operators: a function each, whose parameters are named as the operator's own,
so that one which is not known here is seen and not passed over. Only the process that interprets
a program imports this module, as it loads torch.

Source: the operators' definitions in coremltools 9.0
(https://apple.github.io/coremltools/source/coremltools.converters.mil.mil.ops.defs.html).
"""

import inspect
import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional

Operator = Callable[..., Any]
_Floats = float | Tensor

OPERATORS: dict[str, Operator] = {}


def find_unknown_parameters(kind: str, given: Sequence[str]) -> list[str]:
    """Return those of an operator's parameters that its function does not take."""
    known = inspect.signature(OPERATORS[kind]).parameters
    if any(item.kind is inspect.Parameter.VAR_KEYWORD for item in known.values()):
        return []
    return [name for name in given if name not in known]


def _operator(function: Operator) -> Operator:
    """Put a function into the table, by its name without the underscores around it."""
    OPERATORS[function.__name__.strip("_")] = function
    return function


def _ints(value: Tensor) -> list[int]:
    return [int(item) for item in value.reshape(-1).tolist()]


def _add_simple(table: Mapping[str, Callable[[Tensor], Tensor]]) -> None:
    def wrap(function: Callable[[Tensor], Tensor]) -> Operator:
        return lambda x: function(x)

    OPERATORS.update({name: wrap(function) for name, function in table.items()})


def _add_pairs(table: Mapping[str, Callable[[Tensor, Tensor], Tensor]]) -> None:
    def wrap(function: Callable[[Tensor, Tensor], Tensor]) -> Operator:
        return lambda x, y: function(x, y)

    OPERATORS.update({name: wrap(function) for name, function in table.items()})


_add_simple(
    {
        "abs": torch.abs,
        "ceil": torch.ceil,
        "cos": torch.cos,
        "erf": torch.erf,
        "exp": torch.exp,
        "floor": torch.floor,
        "identity": lambda x: x,
        "logical_not": torch.logical_not,
        "relu": torch.relu,
        "relu6": lambda x: x.clamp(0, 6),
        "round": torch.round,
        "shape": lambda x: torch.tensor(x.shape, dtype=torch.int32),
        "sigmoid": torch.sigmoid,
        "sign": torch.sign,
        "silu": functional.silu,
        "sin": torch.sin,
        "softplus": functional.softplus,
        "softsign": functional.softsign,
        "sqrt": torch.sqrt,
        "square": torch.square,
        "tanh": torch.tanh,
    }
)
_add_pairs(
    {
        "add": torch.add,
        "equal": torch.eq,
        "floor_div": torch.floor_divide,
        "greater": torch.gt,
        "greater_equal": torch.ge,
        "less": torch.lt,
        "less_equal": torch.le,
        "logical_and": torch.logical_and,
        "logical_or": torch.logical_or,
        "maximum": torch.maximum,
        "minimum": torch.minimum,
        "mod": torch.remainder,
        "mul": torch.mul,
        "not_equal": torch.ne,
        "pow": torch.pow,
        "real_div": torch.div,
        "sub": torch.sub,
    }
)


@_operator
def _clip(x: Tensor, alpha: Tensor, beta: Tensor) -> Tensor:
    return x.clamp(float(alpha), float(beta))


@_operator
def _leaky_relu(x: Tensor, alpha: Tensor) -> Tensor:
    return functional.leaky_relu(x, float(alpha))


@_operator
def _thresholded_relu(x: Tensor, alpha: Tensor) -> Tensor:
    return torch.where(x >= float(alpha), x, torch.zeros_like(x))


@_operator
def _threshold(x: Tensor, alpha: Tensor) -> Tensor:
    return x.clamp(min=float(alpha))


@_operator
def _elu(x: Tensor, alpha: Tensor) -> Tensor:
    return functional.elu(x, float(alpha))


@_operator
def _prelu(x: Tensor, alpha: Tensor) -> Tensor:
    return functional.prelu(x, alpha)


@_operator
def _sigmoid_hard(x: Tensor, alpha: Tensor, beta: Tensor) -> Tensor:
    return (x * float(alpha) + float(beta)).clamp(0, 1)


@_operator
def _gelu(x: Tensor, mode: str = "EXACT") -> Tensor:
    if mode == "SIGMOID_APPROXIMATION":
        return x * torch.sigmoid(1.702 * x)
    return functional.gelu(x, approximate="none" if mode == "EXACT" else "tanh")


@_operator
def _log(x: Tensor, epsilon: _Floats = 1e-45) -> Tensor:
    return torch.log(x + epsilon)


@_operator
def _rsqrt(x: Tensor, epsilon: _Floats = 1e-12) -> Tensor:
    return torch.rsqrt(x + epsilon)


@_operator
def _inverse(x: Tensor, epsilon: _Floats = 1e-4) -> Tensor:
    return 1 / (x + epsilon)


_CASTS: Mapping[str, torch.dtype] = {
    "fp32": torch.float32,
    # Rounded afterwards, as every value whose type in the program is fp16.
    "fp16": torch.float32,
    "int32": torch.int32,
    "int16": torch.int16,
    "int8": torch.int8,
    "uint8": torch.uint8,
    "bool": torch.bool,
}


@_operator
def _cast(x: Tensor, dtype: str) -> Tensor:
    return x.to(_CASTS[dtype])


@_operator
def _softmax(x: Tensor, axis: Tensor) -> Tensor:
    return torch.softmax(x, int(axis))


@_operator
def _select(cond: Tensor, a: Tensor, b: Tensor) -> Tensor:
    return torch.where(cond, a, b)


@_operator
def _linear(x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    return functional.linear(x, weight, bias)


@_operator
def _matmul(
    x: Tensor,
    y: Tensor,
    transpose_x: Tensor | bool = False,
    transpose_y: Tensor | bool = False,
) -> Tensor:
    left = x.transpose(-1, -2) if transpose_x else x
    right = y.transpose(-1, -2) if transpose_y else y
    return torch.matmul(left, right)


@_operator
def _einsum(values: list[Tensor], equation: str) -> Tensor:
    return torch.einsum(equation, *values)


@_operator
def _scaled_dot_product_attention(
    query: Tensor, key: Tensor, value: Tensor, attn_mask: Tensor | None = None
) -> Tensor:
    return functional.scaled_dot_product_attention(query, key, value, attn_mask)


def _find_padding(
    x: Tensor, kernel: Sequence[int], strides: Sequence[int], how: str, pad: Tensor | None
) -> list[int]:
    """Return what is added before and after each spatial axis, first axis first."""
    if how == "custom":
        return _ints(pad) if pad is not None else [0] * 2 * len(kernel)
    if how == "valid":
        return [0] * 2 * len(kernel)
    found: list[int] = []
    for size, width, step in zip(x.shape[2:], kernel, strides, strict=True):
        total = max(0, (math.ceil(size / step) - 1) * step + width - size)
        less, more = total // 2, total - total // 2
        found += [more, less] if how == "same_lower" else [less, more]
    return found


def _pad_spatial(x: Tensor, padding: Sequence[int], value: float = 0.0) -> Tensor:
    pairs = [padding[index : index + 2] for index in range(0, len(padding), 2)]
    # torch begins with the last axis.
    return functional.pad(x, [item for pair in reversed(pairs) for item in pair], value=value)


_CONVOLUTIONS: Mapping[int, Callable[..., Tensor]] = {
    1: functional.conv1d,
    2: functional.conv2d,
    3: functional.conv3d,
}


@_operator
def _conv(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None = None,
    strides: Tensor | None = None,
    pad_type: str = "valid",
    pad: Tensor | None = None,
    dilations: Tensor | None = None,
    groups: Tensor | int = 1,
) -> Tensor:
    axes = weight.ndim - 2
    steps = _ints(strides) if strides is not None else [1] * axes
    spread = _ints(dilations) if dilations is not None else [1] * axes
    kernel = [(size - 1) * by + 1 for size, by in zip(weight.shape[2:], spread, strict=True)]
    padded = _pad_spatial(x, _find_padding(x, kernel, steps, pad_type, pad))
    return _CONVOLUTIONS[axes](padded, weight, bias, steps, 0, spread, int(groups))


_MAX_POOLS: Mapping[int, Callable[..., Any]] = {
    1: functional.max_pool1d,
    2: functional.max_pool2d,
    3: functional.max_pool3d,
}
_AVERAGE_POOLS: Mapping[int, Callable[..., Any]] = {
    1: functional.avg_pool1d,
    2: functional.avg_pool2d,
    3: functional.avg_pool3d,
}


@_operator
def _max_pool(
    x: Tensor,
    kernel_sizes: Tensor,
    strides: Tensor | None = None,
    pad_type: str = "valid",
    pad: Tensor | None = None,
    ceil_mode: Tensor | bool = False,
) -> Tensor:
    kernel = _ints(kernel_sizes)
    steps = _ints(strides) if strides is not None else [1] * len(kernel)
    padded = _pad_spatial(x, _find_padding(x, kernel, steps, pad_type, pad), -math.inf)
    found: Tensor = _MAX_POOLS[len(kernel)](padded, kernel, steps, ceil_mode=bool(ceil_mode))
    return found


@_operator
def _avg_pool(
    x: Tensor,
    kernel_sizes: Tensor,
    strides: Tensor | None = None,
    pad_type: str = "valid",
    pad: Tensor | None = None,
    exclude_padding_from_average: Tensor | bool = False,
    ceil_mode: Tensor | bool = False,
) -> Tensor:
    kernel = _ints(kernel_sizes)
    steps = _ints(strides) if strides is not None else [1] * len(kernel)
    padding = _find_padding(x, kernel, steps, pad_type, pad)
    pool, is_up = _AVERAGE_POOLS[len(kernel)], bool(ceil_mode)
    found: Tensor = pool(_pad_spatial(x, padding), kernel, steps, ceil_mode=is_up)
    if not exclude_padding_from_average:
        return found
    share: Tensor = pool(_pad_spatial(torch.ones_like(x), padding), kernel, steps, ceil_mode=is_up)
    return found / share


def _along_channels(values: Tensor, rank: int) -> Tensor:
    return values.reshape(1, -1, *[1] * (rank - 2))


@_operator
def _batch_norm(
    x: Tensor,
    mean: Tensor,
    variance: Tensor,
    gamma: Tensor | None = None,
    beta: Tensor | None = None,
    epsilon: _Floats = 1e-5,
) -> Tensor:
    parts = [_along_channels(item, x.ndim) for item in (mean, variance)]
    found = (x - parts[0]) / torch.sqrt(parts[1] + epsilon)
    if gamma is not None and beta is not None:
        found = found * _along_channels(gamma, x.ndim) + _along_channels(beta, x.ndim)
    return found


@_operator
def _instance_norm(
    x: Tensor,
    gamma: Tensor | None = None,
    beta: Tensor | None = None,
    epsilon: _Floats = 1e-5,
) -> Tensor:
    return functional.instance_norm(x, weight=gamma, bias=beta, eps=float(epsilon))


@_operator
def _layer_norm(
    x: Tensor,
    axes: Tensor,
    gamma: Tensor | None = None,
    beta: Tensor | None = None,
    epsilon: _Floats = 1e-5,
) -> Tensor:
    over = [axis % x.ndim for axis in _ints(axes)]
    mean = x.mean(over, keepdim=True)
    found = (x - mean) / torch.sqrt((x - mean).square().mean(over, keepdim=True) + epsilon)
    shape = [size if axis in over else 1 for axis, size in enumerate(x.shape)]
    if gamma is not None:
        found = found * gamma.reshape(shape)
    return found if beta is None else found + beta.reshape(shape)


def _add_reductions(table: Mapping[str, Callable[[Tensor, list[int], bool], Tensor]]) -> None:
    def wrap(function: Callable[[Tensor, list[int], bool], Tensor]) -> Operator:
        def reduce(
            x: Tensor, axes: Tensor | None = None, keep_dims: Tensor | bool = False
        ) -> Tensor:
            over = _ints(axes) if axes is not None else [*range(x.ndim)]
            return function(x, over, bool(keep_dims))

        return reduce

    OPERATORS.update({name: wrap(function) for name, function in table.items()})


_add_reductions(
    {
        "reduce_l2_norm": lambda x, axes, keep: x.square().sum(axes, keep).sqrt(),
        "reduce_log_sum_exp": lambda x, axes, keep: torch.logsumexp(x, axes, keep),
        "reduce_max": lambda x, axes, keep: x.amax(axes, keep),
        "reduce_mean": lambda x, axes, keep: x.mean(axes, keep),
        "reduce_min": lambda x, axes, keep: x.amin(axes, keep),
        "reduce_sum": lambda x, axes, keep: x.sum(axes, keep),
        "reduce_sum_square": lambda x, axes, keep: x.square().sum(axes, keep),
    }
)


@_operator
def _reduce_argmax(x: Tensor, axis: Tensor, keep_dims: Tensor | bool = False) -> Tensor:
    return x.argmax(int(axis), bool(keep_dims)).to(torch.int32)


@_operator
def _reshape(x: Tensor, shape: Tensor) -> Tensor:
    # A length of 0 stands for the input's own.
    wanted = [size or x.shape[axis] for axis, size in enumerate(_ints(shape))]
    return x.reshape(wanted)


@_operator
def _transpose(x: Tensor, perm: Tensor) -> Tensor:
    return x.permute(_ints(perm))


@_operator
def _squeeze(x: Tensor, axes: Tensor | None = None) -> Tensor:
    return x.squeeze() if axes is None else x.squeeze(_ints(axes))


@_operator
def _expand_dims(x: Tensor, axes: Tensor) -> Tensor:
    rank = x.ndim + axes.numel()
    for axis in sorted(axis % rank for axis in _ints(axes)):
        x = x.unsqueeze(axis)
    return x


@_operator
def _flatten2d(x: Tensor, axis: Tensor | int = 1) -> Tensor:
    return x.reshape(math.prod(x.shape[: int(axis)]), -1)


@_operator
def _concat(values: list[Tensor], axis: Tensor, interleave: Tensor | bool = False) -> Tensor:
    values = [item.reshape(1) if item.ndim == 0 else item for item in values]
    if not interleave:
        return torch.cat(values, int(axis))
    at = int(axis) % values[0].ndim
    return torch.stack(values, at + 1).flatten(at, at + 1)


@_operator
def _stack(values: list[Tensor], axis: Tensor) -> Tensor:
    return torch.stack(values, int(axis))


@_operator
def _split(
    x: Tensor,
    axis: Tensor,
    num_splits: Tensor | None = None,
    split_sizes: Tensor | None = None,
) -> tuple[Tensor, ...]:
    at = int(axis)
    if split_sizes is not None:
        return torch.split(x, _ints(split_sizes), at)
    assert num_splits is not None, "one of both is required"
    return torch.split(x, x.shape[at] // int(num_splits), at)


@_operator
def _slice_by_index(
    x: Tensor,
    begin: Tensor,
    end: Tensor,
    stride: Tensor | None = None,
    begin_mask: Tensor | None = None,
    end_mask: Tensor | None = None,
    squeeze_mask: Tensor | None = None,
) -> Tensor:
    def flags(mask: Tensor | None) -> list[bool]:
        return [bool(item) for item in mask.tolist()] if mask is not None else [False] * x.ndim

    steps = _ints(stride) if stride is not None else [1] * x.ndim
    parts: list[slice | int] = []
    for first, last, step, from_start, to_end, only in zip(
        _ints(begin),
        _ints(end),
        steps,
        flags(begin_mask),
        flags(end_mask),
        flags(squeeze_mask),
        strict=True,
    ):
        one = slice(None if from_start else first, None if to_end else last, step)
        parts.append(first if only else one)
    # NumPy, since torch has no negative steps.
    return torch.from_numpy(x.numpy()[tuple(parts)].copy())


@_operator
def _slice_by_size(x: Tensor, begin: Tensor, size: Tensor) -> Tensor:
    for axis, (first, length) in enumerate(zip(_ints(begin), _ints(size), strict=True)):
        rest = x.shape[axis] - first
        x = x.narrow(axis, first, rest if length == -1 else length)
    return x


@_operator
def _gather(
    x: Tensor,
    indices: Tensor,
    axis: Tensor | int = 0,
    batch_dims: Tensor | int = 0,
    validate_indices: Tensor | bool = False,
) -> Tensor:
    del validate_indices
    if int(batch_dims):
        msg = "gather with batch_dims"
        raise NotImplementedError(msg)
    at = int(axis) % x.ndim
    wanted = indices.reshape(-1).to(torch.int64) % x.shape[at]
    found = x.index_select(at, wanted)
    return found.reshape([*x.shape[:at], *indices.shape, *x.shape[at + 1 :]])


@_operator
def _gather_along_axis(
    x: Tensor, indices: Tensor, axis: Tensor | int = 0, validate_indices: Tensor | bool = False
) -> Tensor:
    del validate_indices
    at = int(axis)
    return torch.gather(x, at, indices.to(torch.int64) % x.shape[at])


@_operator
def _tile(x: Tensor, reps: Tensor) -> Tensor:
    return x.repeat(_ints(reps))


@_operator
def _reverse(x: Tensor, axes: Tensor | None = None) -> Tensor:
    return x.flip(_ints(axes) if axes is not None else [*range(x.ndim)])


@_operator
def _fill(shape: Tensor, value: Tensor) -> Tensor:
    return torch.full(_ints(shape), value.item(), dtype=value.dtype)


@_operator
def _range_1d(start: Tensor, end: Tensor, step: Tensor) -> Tensor:
    return torch.arange(start.item(), end.item(), step.item(), dtype=start.dtype)


@_operator
def _cumsum(
    x: Tensor,
    axis: Tensor | int = 0,
    exclusive: Tensor | bool = False,
    reverse: Tensor | bool = False,
) -> Tensor:
    if exclusive or reverse:
        msg = "cumsum, exclusive or in reverse"
        raise NotImplementedError(msg)
    return torch.cumsum(x, int(axis)).to(x.dtype)


@_operator
def _pad(
    x: Tensor, pad: Tensor, mode: str = "constant", constant_val: Tensor | float = 0.0
) -> Tensor:
    names = {"constant": "constant", "reflect": "reflect", "replicate": "replicate"}
    if mode == "constant":
        return _pad_spatial(x, _ints(pad), float(constant_val))
    pairs = _ints(pad)
    order = [pairs[index : index + 2] for index in range(0, len(pairs), 2)]
    flat = [item for pair in reversed(order) for item in pair]
    # torch pads only the last axes so; those before have nothing to pad.
    while len(flat) > 2 and flat[-2:] == [0, 0]:
        flat = flat[:-2]
    return functional.pad(x, flat, mode=names[mode])


@_operator
def _upsample_nearest_neighbor(
    x: Tensor,
    scale_factor_height: Tensor | float = 1.0,
    scale_factor_width: Tensor | float = 1.0,
) -> Tensor:
    factors = (float(scale_factor_height), float(scale_factor_width))
    return functional.interpolate(x, scale_factor=factors, mode="nearest")


@_operator
def _pixel_shuffle(x: Tensor, upscale_factor: Tensor) -> Tensor:
    return functional.pixel_shuffle(x, int(upscale_factor))
