"""Recipes from OpenVINO IR to OpenVINO IR, by OpenVINO and NNCF.

Owns the settings that held on our nets. Runs in the process of a hop. NNCF is never told that a
net is a transformer: with `model_type=TRANSFORMER` an encoder fell from .85 to .23 correct.
"""

from pathlib import Path
from typing import Any

from converters.compression.calibration import read_calibration
from converters.compression.toolchain import (
    TOOL_FAULTS,
    get_calibration_file,
    get_choice,
    import_library,
    read_inputs,
    read_options,
    tell,
)
from converters.errors import CompressionError, RecipeError
from converters.task import Facts, Task

EXTRA = "openvino"
_PACKAGES = ("openvino", "nncf")
_PRESETS = {"mixed": "MIXED", "performance": "PERFORMANCE"}
_QUANTIZED_OPERATORS = ("FakeQuantize",)
_NARROW_TYPES = ("i8", "u8", "i4", "u4")

INT8_OPTIONS: dict[str, Any] = {
    "calibration": "",
    "preset": "mixed",
    "fast_bias_correction": True,
    "exclude": (),
}
WEIGHT_OPTIONS: dict[str, Any] = {"bits": 8, "group_size": 32, "exclude": ()}


def int8(task: Task) -> Facts:
    """Quantize weights and activations to 8 bits after training.

    Options: `calibration` (a file of `CalibrationSet.save`, needed); `preset`: `mixed`
    (asymmetric activations, as after a sigmoid or SiLU) or `performance`; `fast_bias_correction`:
    False corrects layer by layer, better and many times slower; `exclude`: names of operations
    that stay in fp32.

    Raises:
        RecipeError, CalibrationError: an option, or the data, does not fit.
        CompressionError: NNCF cannot take the model.
    """
    options = read_options(task, INT8_OPTIONS)
    preset = get_choice(options, "preset", tuple(_PRESETS))
    nncf = import_library("nncf", EXTRA)
    specs = read_inputs(task.source.path, "openvino")
    calibration = read_calibration(get_calibration_file(options), specs)
    model = _read(task.source.path)
    scope = _exclude(nncf, model, options["exclude"])
    task.report(0.2, f"calibrating with {calibration.samples} samples")
    # By position: a tensor of IR may have several names.
    feeds = [dict(enumerate(feed.values())) for feed in calibration.iter_feeds(specs)]
    try:
        made = nncf.quantize(
            model,
            nncf.Dataset(feeds),
            preset=nncf.QuantizationPreset[_PRESETS[preset]],
            subset_size=len(feeds),
            fast_bias_correction=options["fast_bias_correction"],
            ignored_scope=scope,
        )
        _save(made, task.target, fp16=False)
    except _get_faults(nncf) as exc:
        msg = f"NNCF cannot quantize the model: {type(exc).__name__}: {exc}"
        raise CompressionError(msg) from exc
    facts = _tell(task, "openvino_int8")
    return facts | {"calibration": dict(calibration.facts), "preset": preset}


def weights(task: Task) -> Facts:
    """Store weights in 8 or 4 bits; arithmetic stays in float.

    8 bits take every weight. 4 bits take those of matrix products, in groups, first and last
    layer left in 8 as NNCF does; convolutions stay in 8.

    Options: `bits`: 8 or 4; `group_size`: weights that share a scale (4 bits), made smaller where
    it does not divide the inputs of a product; `exclude`: names of operations that stay in fp32.

    Raises:
        RecipeError: an option does not fit.
        CompressionError: NNCF cannot take the model.
    """
    options = read_options(task, WEIGHT_OPTIONS)
    bits = get_choice(options, "bits", (8, 4))
    nncf = import_library("nncf", EXTRA)
    model = _read(task.source.path)
    scope = _exclude(nncf, model, options["exclude"])
    task.report(0.3, f"quantizing weights to {bits} bits")
    own: dict[str, Any] = {"mode": nncf.CompressWeightsMode.INT8_ASYM}
    if bits == 4:
        own = {
            "mode": nncf.CompressWeightsMode.INT4_SYM,
            "group_size": options["group_size"],
            "ratio": 1.0,
            "advanced_parameters": nncf.AdvancedCompressionParameters(
                group_size_fallback_mode=nncf.GroupSizeFallbackMode.ADJUST
            ),
        }
    try:
        made = nncf.compress_weights(model, ignored_scope=scope, **own)
        _save(made, task.target, fp16=False)
    except _get_faults(nncf) as exc:
        msg = f"NNCF cannot quantize the weights: {type(exc).__name__}: {exc}"
        raise CompressionError(msg) from exc
    return {**_tell(task, f"openvino_weights{bits}", is_4_bits=bits == 4), "bits": bits}


def fp16(task: Task) -> Facts:
    """Store weights as fp16, half the size; a CPU turns them back into fp32 when it loads them.

    Takes no options.

    Raises:
        RecipeError: an option is given.
        CompressionError: OpenVINO cannot read or write the model.
    """
    read_options(task, {})
    model = _read(task.source.path)
    before = _count_types(model).get("f16", 0)
    try:
        _save(model, task.target, fp16=True)
    except TOOL_FAULTS as exc:
        msg = f"OpenVINO cannot write the model: {exc}"
        raise CompressionError(msg) from exc
    after = _count_types(_read(task.target)).get("f16", 0)
    no_op = None if after > before else "no weight was turned into fp16"
    return tell(task, "openvino_fp16", no_op, _PACKAGES, fp16_weights=after - before)


def _get_faults(nncf: Any) -> tuple[type[Exception], ...]:
    """Return what NNCF raises: its own errors share no root."""
    own = [
        kind
        for kind in vars(nncf.errors).values()
        if isinstance(kind, type) and issubclass(kind, Exception)
    ]
    return (*TOOL_FAULTS, *own)


def _read(path: Path) -> Any:
    openvino = import_library("openvino", EXTRA)
    try:
        return openvino.Core().read_model(path)
    except TOOL_FAULTS as exc:
        msg = f"{path.name} cannot be read by OpenVINO: {exc}"
        raise CompressionError(msg) from exc


def _save(model: Any, target: Path, *, fp16: bool) -> None:
    openvino = import_library("openvino", EXTRA)
    openvino.save_model(model, target, compress_to_fp16=fp16)


def _exclude(nncf: Any, model: Any, names: list[str] | tuple[str, ...]) -> Any:
    unknown = sorted({*names} - {node.get_friendly_name() for node in model.get_ops()})
    if unknown:
        msg = f"there is no operation {', '.join(unknown)} to leave in fp32"
        raise RecipeError(msg)
    return nncf.IgnoredScope(names=list(names)) if names else None


def _count_types(model: Any) -> dict[str, int]:
    """Return element type → constants of the model."""
    counts: dict[str, int] = {}
    for node in model.get_ops():
        if node.get_type_name() == "Constant":
            name = node.get_element_type().get_type_name()
            counts[name] = counts.get(name, 0) + 1
    return counts


def _tell(task: Task, recipe: str, *, is_4_bits: bool = False) -> dict[str, Any]:
    model, source = _read(task.target), _read(task.source.path)
    types, before = _count_types(model), _count_types(source)
    added = {name: types.get(name, 0) - before.get(name, 0) for name in _NARROW_TYPES}
    fakes = sum(node.get_type_name() in _QUANTIZED_OPERATORS for node in model.get_ops())
    no_op = None
    if not fakes and sum(added.values()) <= 0:
        no_op = "no weight was quantized: the model has none to take"
    elif is_4_bits and added["i4"] + added["u4"] <= 0:
        no_op = "no matrix product to hold in 4 bits: what came out is openvino_weights8's"
    return tell(
        task,
        recipe,
        no_op,
        _PACKAGES,
        narrow_weights={name: count for name, count in added.items() if count},
        fake_quantize_nodes=fakes,
    )
