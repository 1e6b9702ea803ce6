"""NVML's calling convention, against a small library compiled here in NVIDIA's place."""

import subprocess
from pathlib import Path

from platforms.nvml import NvidiaFacts, NvidiaGpu, probe_nvidia
from tests.harness.waiting import require_binary

FAKE_NVML = r"""
#include <string.h>
struct memory { unsigned long long total, free, used; };
static int alive = 0;
int nvmlInit_v2(void) { alive = INIT_CODE == 0; return INIT_CODE; }
int nvmlShutdown(void) { alive = 0; return 0; }
const char *nvmlErrorString(int code) {
    return code == 18 ? "Driver/library version mismatch" : "Unknown";
}
int nvmlDeviceGetCount_v2(unsigned *count) { *count = 2; return alive ? 0 : 1; }
int nvmlDeviceGetHandleByIndex_v2(unsigned index, void **handle) {
    *handle = (void *)(0x7f0000000000UL + index); return 0;
}
int nvmlDeviceGetName(void *handle, char *name, unsigned length) {
    strncpy(name, handle == (void *)0x7f0000000000UL ? "Tesla T4" : "Orin (nvgpu)", length);
    return 0;
}
int nvmlDeviceGetMemoryInfo(void *handle, struct memory *memory) {
    if (handle != (void *)0x7f0000000000UL) return 3;
    memory->total = 16106127360ULL; return 0;
}
int nvmlDeviceGetCudaComputeCapability(void *handle, int *major, int *minor) {
    (void)handle; *major = 7; *minor = 5; return 0;
}
int nvmlSystemGetDriverVersion(char *text, unsigned length) {
    strncpy(text, "550.144.03", length); return 0;
}
"""


def build(folder: Path, init_code: int, source: str = FAKE_NVML) -> str:
    compiler = require_binary("cc")
    library = folder / f"libnvml-{init_code}.so"
    (folder / "nvml.c").write_text(source, encoding="utf-8")
    command = [compiler, "-shared", "-fPIC", f"-DINIT_CODE={init_code}", "-o", str(library)]
    subprocess.run([*command, str(folder / "nvml.c")], check=True)
    return str(library)


def test_missing_library_is_said_and_not_raised() -> None:
    assert probe_nvidia("libno-such-nvml.so.1") == NvidiaFacts(
        error="libno-such-nvml.so.1 is not installed"
    )


def test_gpus_are_read_with_memory_only_where_they_have_their_own(tmp_path: Path) -> None:
    assert probe_nvidia(build(tmp_path, 0)) == NvidiaFacts(
        driver_version="550.144.03",
        gpus=(
            NvidiaGpu("Tesla T4", 16106127360, "7.5"),
            NvidiaGpu("Orin (nvgpu)", None, "7.5"),
        ),
    )


def test_library_that_does_not_fit_the_driver_says_so(tmp_path: Path) -> None:
    facts = probe_nvidia(build(tmp_path, 18))
    assert facts == NvidiaFacts(error="NVML: Driver/library version mismatch")


def test_library_that_is_no_nvml_is_said_and_not_raised(tmp_path: Path) -> None:
    facts = probe_nvidia(build(tmp_path, 0, "int unrelated(void) { return 0; }"))
    assert "no usable NVML" in facts.error
