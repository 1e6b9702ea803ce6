"""The boxes that artifacts are made for, and what is worth making for each.

Pure and declarative: a target names formats and recipes, each with what the manifest then requires
of a box (`requires`), so that selection offers an artifact only where it can serve. Recipes are
those of `converters.compression.recipes`, by their names.

The order of a target's builds is the order of the manifest's artifacts, which counts until a
box has measured them; fp32 comes last, as the one that always answers.

Source of what is worth making: models.md's measurements on x86-64 with VNNI. For ARM and
Apple they are expectations, which staging on the box checks: nothing is activated unproven.
"""

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from enum import StrEnum
from types import MappingProxyType
from typing import Any

from converters.compression.recipes import choose_recipe, get_recipe
from converters.errors import RecipeError
from converters.task import ModelFormat
from platforms.artifact import Precision
from platforms.spec import AcceleratorKind, Arch


class GraphKind(StrEnum):
    """What most of a model's work is; it decides which INT8 pays."""

    CONVOLUTION = "convolution"
    PRODUCT = "product"
    """Dense layers, attention, recurrence."""


@dataclass(frozen=True)
class Requires:
    """What an artifact needs of a box; the manifest's own words."""

    arch: tuple[Arch, ...] = ()
    cpu_flags: tuple[str, ...] = ()
    accelerator: AcceleratorKind | None = None

    def to_json(self) -> dict[str, Any]:
        """Return the manifest's `requires`; keys that ask for nothing are left out."""
        found: dict[str, Any] = {}
        if self.arch:
            found["arch"] = [arch.value for arch in self.arch]
        if self.cpu_flags:
            found["cpu_flags"] = list(self.cpu_flags)
        if self.accelerator is not None:
            found["accelerator"] = self.accelerator.value
        return found


@dataclass(frozen=True)
class Build:
    """One artifact worth making for a target."""

    format: ModelFormat
    recipe: str | None
    """Of `converters.compression.recipes`; None: as converted."""
    why: str
    requires: Requires = Requires()
    options: Mapping[str, Any] = field(default_factory=lambda: MappingProxyType({}))
    """Of the recipe's tool."""
    kinds: frozenset[GraphKind] = frozenset(GraphKind)
    """Of graphs that it is worth it for."""


@dataclass(frozen=True)
class Target:
    """A kind of box."""

    name: str
    label: str
    builds: tuple[Build, ...]
    """In order of preference."""


_CONVOLUTIONS = frozenset({GraphKind.CONVOLUTION})
_PRODUCTS = frozenset({GraphKind.PRODUCT})

_X86 = Requires(arch=(Arch.X86_64,))
_AVX2 = Requires(arch=(Arch.X86_64,), cpu_flags=("avx2",))
_VNNI = Requires(arch=(Arch.X86_64,), cpu_flags=("avx512_vnni",))
_DOT = Requires(arch=(Arch.AARCH64,), cpu_flags=("asimddp",))
_ARM = Requires(arch=(Arch.AARCH64,))
_JETSON = Requires(arch=(Arch.AARCH64,), accelerator=AcceleratorKind.JETSON)
_MAC = Requires(arch=(Arch.APPLE_SILICON,))

_ONNX_FP32 = Build(ModelFormat.ONNX, None, "onnxruntime runs on every box")
_LITERT_FP32 = Build(ModelFormat.TFLITE, None, "LiteRT, where onnxruntime is not installed")

TARGETS: Mapping[str, Target] = MappingProxyType(
    {
        target.name: target
        for target in (
            Target(
                "rpi5",
                "Raspberry Pi 5 (Cortex-A76, no accelerator)",
                (
                    Build(
                        ModelFormat.TFLITE,
                        "litert_static",
                        "XNNPACK's INT8 kernels use the dot product of ARMv8.2",
                        _DOT,
                    ),
                    Build(
                        ModelFormat.ONNX,
                        "onnx_static",
                        "INT8 by onnxruntime's own kernels",
                        _DOT,
                        kinds=_CONVOLUTIONS,
                    ),
                    Build(
                        ModelFormat.ONNX,
                        "onnx_dynamic",
                        "INT8 products, nothing to calibrate",
                        _DOT,
                        kinds=_PRODUCTS,
                    ),
                    Build(
                        ModelFormat.TFLITE,
                        "litert_weight_only",
                        "a quarter of the size for a slow SD card, also on tflite-runtime",
                        _ARM,
                    ),
                    _LITERT_FP32,
                    _ONNX_FP32,
                ),
            ),
            Target(
                "jetson-orin",
                "NVIDIA Jetson Orin (Ampere GPU, Cortex-A78AE)",
                (
                    Build(
                        ModelFormat.ONNX,
                        "onnx_fp16",
                        "half precision on the GPU; the box builds its TensorRT engine from it",
                        _JETSON,
                    ),
                    Build(
                        ModelFormat.ONNX,
                        "onnx_dynamic",
                        "on the CPU, where the GPU is busy or missing",
                        _DOT,
                        kinds=_PRODUCTS,
                    ),
                    _ONNX_FP32,
                ),
            ),
            Target(
                "x86-avx2",
                "x86-64 with AVX2 and without VNNI",
                (
                    Build(
                        ModelFormat.OPENVINO,
                        "openvino_int8",
                        "INT8 by oneDNN, which keeps clear of the 16-bit sums of AVX2",
                        _AVX2,
                    ),
                    Build(
                        ModelFormat.ONNX,
                        "onnx_static",
                        "INT8 with weights of 7 bits: sums of 16 bits overflow with 8",
                        _AVX2,
                        MappingProxyType({"reduce_range": True}),
                        _CONVOLUTIONS,
                    ),
                    Build(
                        ModelFormat.ONNX,
                        "onnx_dynamic",
                        "INT8 products with weights of 7 bits",
                        _AVX2,
                        MappingProxyType({"reduce_range": True}),
                        _PRODUCTS,
                    ),
                    Build(ModelFormat.OPENVINO, None, "fp32, faster than onnxruntime's", _X86),
                    _ONNX_FP32,
                ),
            ),
            Target(
                "x86-vnni",
                "x86-64 with AVX512-VNNI",
                (
                    Build(
                        ModelFormat.OPENVINO,
                        "openvino_int8",
                        "1.8 to 3.5 times onnxruntime's fp32 on every kind of net",
                        _VNNI,
                    ),
                    Build(
                        ModelFormat.ONNX,
                        "onnx_static",
                        "1.8 to 2.3 times fp32 on convolutions",
                        _VNNI,
                        kinds=_CONVOLUTIONS,
                    ),
                    Build(
                        ModelFormat.ONNX,
                        "onnx_dynamic",
                        "2 to 3.3 times fp32 on products; ten times slower on convolutions",
                        _VNNI,
                        kinds=_PRODUCTS,
                    ),
                    Build(
                        ModelFormat.TFLITE,
                        "litert_static",
                        "2.8 times LiteRT's fp32, where LiteRT is what is installed",
                        _VNNI,
                        kinds=_CONVOLUTIONS,
                    ),
                    Build(ModelFormat.OPENVINO, None, "fp32, faster than onnxruntime's", _X86),
                    _ONNX_FP32,
                ),
            ),
            Target(
                "mac-m",
                "Apple silicon (M1 and later)",
                (
                    Build(
                        ModelFormat.COREML,
                        "coreml_fp16",
                        "what the Neural Engine computes in",
                        _MAC,
                    ),
                    Build(
                        ModelFormat.COREML,
                        "coreml_int8_weights",
                        "half of fp16's size, arithmetic in fp16",
                        _MAC,
                    ),
                    _ONNX_FP32,
                ),
            ),
        )
    }
)


@dataclass(frozen=True)
class PlannedBuild:
    """One artifact to make, and the targets that it is for."""

    format: ModelFormat
    recipe: str | None
    requires: Requires
    options: Mapping[str, Any]
    targets: tuple[str, ...]
    why: str


def get_target(name: str) -> Target:
    """Return a target by its name.

    Raises:
        RecipeError: there is none of that name; says which there are.
    """
    if name not in TARGETS:
        msg = f"there is no target {name!r}; known are {', '.join(TARGETS)}"
        raise RecipeError(msg)
    return TARGETS[name]


def find_kind(operators: Mapping[str, int]) -> GraphKind | None:
    """Return what most of a model's work is, or None where nothing in it can be compressed.

    Args:
        operators: ONNX operator → nodes.
    """
    try:
        choice = choose_recipe(operators, Precision.INT8)
    except RecipeError:
        return None
    is_convolution = choice.recipe == "onnx_static"
    return GraphKind.CONVOLUTION if is_convolution else GraphKind.PRODUCT


def plan_builds(
    names: Iterable[str], kind: GraphKind | None, *, has_calibration: bool
) -> list[PlannedBuild]:
    """Return what to make for some targets, each artifact once, with the targets it is for.

    What is compressed comes first, in the targets' order, what is as converted last.

    Args:
        names: of targets.
        kind: of the graph, by `find_kind`; None leaves out everything compressed.
        has_calibration: without, recipes that need data are left out.

    Raises:
        RecipeError: a name is no target's.
    """
    found: dict[tuple[Any, ...], PlannedBuild] = {}
    for name in dict.fromkeys(names):
        for build in get_target(name).builds:
            if not _is_worth(build, kind, has_calibration):
                continue
            options = tuple(sorted(build.options.items()))
            key = (build.format, build.recipe, build.requires, options)
            before = found[key].targets if key in found else ()
            found[key] = PlannedBuild(
                build.format,
                build.recipe,
                build.requires,
                build.options,
                (*before, name),
                build.why,
            )
    return sorted(found.values(), key=lambda build: build.recipe is None)


def _is_worth(build: Build, kind: GraphKind | None, has_calibration: bool) -> bool:
    if build.recipe is None:
        return True
    return kind in build.kinds and (
        has_calibration or not get_recipe(build.recipe).needs_calibration
    )


def describe_targets() -> list[dict[str, Any]]:
    """Return one JSON-ready row for each artifact of each target."""
    return [
        {
            "target": target.name,
            "label": target.label,
            "format": build.format.value,
            "recipe": build.recipe or "",
            "requires": build.requires.to_json(),
            "kinds": sorted(kind.value for kind in build.kinds),
            "why": build.why,
        }
        for target in TARGETS.values()
        for build in target.builds
    ]
