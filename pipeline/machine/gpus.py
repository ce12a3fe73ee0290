"""GPUs of this machine: NVIDIA through NVML, AMD through the kernel's files, Apple through sysctl.

No driver and no GPU library is the normal case of a CPU machine, not an error; what could not be asked is told in ``notes``.
"""

import contextlib
import os
import platform
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

Vendor = Literal["nvidia", "amd", "apple"]
GIB = 2**30
# Metal lets one process hold about three quarters of the unified memory (recommendedMaxWorkingSetSize).
_METAL_SHARE = 0.75
_AMD = "0x1002"


@dataclass(frozen=True)
class Gpu:
    """One GPU or one MIG slice; memory in GiB as a CUDA program sees it; compute capability as "8.9", empty for Apple."""

    name: str
    memory_gib: float
    free_gib: float
    compute_capability: str = ""
    vendor: Vendor = "nvidia"
    mig: bool = False

    @property
    def capability(self) -> tuple[int, int]:
        """Compute capability as (major, minor); (0, 0) where there is none."""
        major, _, minor = self.compute_capability.partition(".")
        return (int(major), int(minor or 0)) if major else (0, 0)


@dataclass(frozen=True)
class Detected:
    """GPUs that may be used, the driver's version and the CUDA version it supports, and what could not be asked."""

    gpus: tuple[Gpu, ...] = ()
    driver: str | None = None
    cuda: str | None = None
    notes: tuple[str, ...] = ()


def detect(ram_gib: float, ram_free_gib: float, root: Path = Path("/")) -> Detected:
    """GPUs of the first vendor that has any: NVIDIA, AMD, Apple; RAM is what Apple's GPUs share."""
    found = detect_nvidia()
    if found.gpus:
        return found
    if gpus := detect_amd(root):
        return Detected(gpus, driver=read(root / "sys/module/amdgpu/version") or None)
    if sys.platform == "darwin" and platform.machine() == "arm64":
        return Detected((_apple(ram_gib, ram_free_gib),))
    return found


def detect_nvidia() -> Detected:
    """NVIDIA GPUs and MIG slices that CUDA_VISIBLE_DEVICES leaves visible."""
    try:
        import pynvml
    except ImportError:
        return Detected(notes=("nvidia-ml-py is not installed: NVIDIA GPUs were not looked for",))
    try:
        pynvml.nvmlInit()
    except pynvml.NVMLError as error:
        missing = isinstance(error, pynvml.NVMLError_LibraryNotFound | pynvml.NVMLError_DriverNotLoaded)
        return Detected(notes=() if missing else (f"the NVIDIA driver does not answer: {error}",))
    try:
        return _ask_nvml(pynvml, os.environ.get("CUDA_VISIBLE_DEVICES"))
    except pynvml.NVMLError as error:
        return Detected(notes=(f"the NVIDIA driver does not answer: {error}",))
    finally:
        pynvml.nvmlShutdown()


def _ask_nvml(nvml: Any, visible: str | None) -> Detected:
    named: dict[str, Gpu] = {}
    for index in range(nvml.nvmlDeviceGetCount()):
        handle = nvml.nvmlDeviceGetHandleByIndex(index)
        slices = _mig_slices(nvml, handle)
        for number, device in enumerate(slices or [handle]):
            key = f"{index}:{number}" if slices else str(index)
            named[f"{key} {nvml.nvmlDeviceGetUUID(device)}"] = _nvidia_gpu(nvml, handle, device, bool(slices))
    version = nvml.nvmlSystemGetCudaDriverVersion_v2()
    cuda = f"{version // 1000}.{version % 1000 // 10}"
    return Detected(visible_gpus(named, visible), str(nvml.nvmlSystemGetDriverVersion()), cuda)


def _mig_slices(nvml: Any, handle: Any) -> list[Any]:
    try:
        current, _ = nvml.nvmlDeviceGetMigMode(handle)
        if current != nvml.NVML_DEVICE_MIG_ENABLE:
            return []
        slices = []
        for number in range(nvml.nvmlDeviceGetMaxMigDeviceCount(handle)):
            with contextlib.suppress(nvml.NVMLError_NotFound):
                slices.append(nvml.nvmlDeviceGetMigDeviceHandleByIndex(handle, number))
        return slices
    except nvml.NVMLError:  # cards without MIG answer "not supported"
        return []


def _nvidia_gpu(nvml: Any, parent: Any, device: Any, mig: bool) -> Gpu:
    try:
        memory = nvml.nvmlDeviceGetMemoryInfo(device, version=nvml.nvmlMemory_v2)
        reserved = memory.reserved
    except nvml.NVMLError:  # drivers before 510
        memory, reserved = nvml.nvmlDeviceGetMemoryInfo(device), 0
    major, minor = nvml.nvmlDeviceGetCudaComputeCapability(parent)
    # the driver's reserve is in NVML's total but never available to a program
    total, free = round((memory.total - reserved) / GIB, 2), round(memory.free / GIB, 2)
    return Gpu(str(nvml.nvmlDeviceGetName(device)), total, free, f"{major}.{minor}", mig=mig)


def visible_gpus(named: dict[str, Gpu], visible: str | None) -> tuple[Gpu, ...]:
    """GPUs that CUDA_VISIBLE_DEVICES leaves, in its order; keys of ``named`` are "INDEX UUID", of MIG slices "INDEX:SLICE UUID".

    As in CUDA, the list ends at the first entry that names no device.
    """
    if visible is None:
        return tuple(named.values())
    chosen = []
    for entry in (part.strip() for part in visible.split(",")):
        match = [gpu for key, gpu in named.items() if _names(key, entry)]
        if not match:
            break
        chosen.append(match[0])
    return tuple(chosen)


def _names(key: str, entry: str) -> bool:
    index, _, uuid = key.partition(" ")
    return bool(entry) and (index.partition(":")[0] == entry or uuid.startswith(entry))


def detect_amd(root: Path = Path("/")) -> tuple[Gpu, ...]:
    """AMD GPUs that the amdgpu driver shows in sysfs; the capability is the gfx version of the kernel's compute topology."""
    versions = _gfx_versions(root)
    gpus: list[Gpu] = []
    for card in sorted((root / "sys/class/drm").glob("card[0-9]*")):
        device = card / "device"
        total = read(device / "mem_info_vram_total")
        if read(device / "vendor") != _AMD or not total.isdigit():
            continue
        used = read(device / "mem_info_vram_used")
        capability = versions[len(gpus)] if len(gpus) < len(versions) else ""
        name = read(device / "product_name") or f"AMD {read(device / 'device')}"
        free = int(total) - int(used or 0)
        gpus.append(Gpu(name, round(int(total) / GIB, 2), round(free / GIB, 2), capability, "amd"))
    return tuple(gpus)


def _gfx_versions(root: Path) -> list[str]:
    """ "9.4" for gfx942, "11.0" for gfx1100: gfx_target_version is major x 10000 + minor x 100 + step; CPUs have 0."""
    versions = []
    nodes = (root / "sys/class/kfd/kfd/topology/nodes").glob("[0-9]*")
    for node in sorted(nodes, key=lambda p: int(p.name)):
        words = dict(line.split(maxsplit=1) for line in read(node / "properties").splitlines() if " " in line)
        versions.append(int(words.get("gfx_target_version", "0")))
    return [f"{version // 10000}.{version // 100 % 100}" for version in versions if version]


def _apple(ram_gib: float, ram_free_gib: float) -> Gpu:
    asked = subprocess.run(["sysctl", "-n", "machdep.cpu.brand_string"], capture_output=True, text=True, check=False)
    share = round(ram_gib * _METAL_SHARE, 2)
    return Gpu(asked.stdout.strip() or "Apple GPU", share, min(share, ram_free_gib), "", "apple")


def read(path: Path) -> str:
    """A file of the kernel as text without surrounding white space; "" where there is none."""
    try:
        return path.read_text().strip()
    except OSError:
        return ""
