"""Machines by name or by description, for planning a launch on a machine that is not this one.

GPU memory is what a CUDA program sees (``torch.cuda.mem_get_info``), which is less than the box says: "80 GB" 79.19 GiB,
"24 GB" 22.05 (with ECC) to 23.6, "16 GB" 14.6 to 15.6. Free memory of a named machine leaves room for a bare context.
"""

from __future__ import annotations

import json
import re
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any

from pipeline.errors import InputError
from pipeline.machine.gpus import Gpu, Vendor
from pipeline.machine.hardware import Cpu, Hardware
from pipeline.runs.files import read_json

ISA_WORDS = ("avx2", "avx512", "avx512_bf16", "amx", "amx_bf16", "neon", "arm_bf16")
_CONTEXT_GIB = 0.3
# a desktop, its browser and its compositor hold this much of a consumer card
_DESKTOP_GIB = 0.6
_DISK_GIB = 200.0


@dataclass(frozen=True)
class _Card:
    title: str
    memory: float
    capability: str
    ram: float
    cores: int
    vendor: Vendor = "nvidia"
    desktop: bool = False


_CARDS = {
    "rtx3060": _Card("NVIDIA GeForce RTX 3060", 11.63, "8.6", 32, 8, desktop=True),
    "rtx3080": _Card("NVIDIA GeForce RTX 3080", 9.64, "8.6", 32, 8, desktop=True),
    "rtx3090": _Card("NVIDIA GeForce RTX 3090", 23.57, "8.6", 64, 12, desktop=True),
    "rtx4060": _Card("NVIDIA GeForce RTX 4060", 7.63, "8.9", 32, 8, desktop=True),
    "rtx4060ti16": _Card("NVIDIA GeForce RTX 4060 Ti", 15.59, "8.9", 32, 8, desktop=True),
    "rtx4070": _Card("NVIDIA GeForce RTX 4070", 11.60, "8.9", 32, 8, desktop=True),
    "rtx4080": _Card("NVIDIA GeForce RTX 4080", 15.59, "8.9", 32, 8, desktop=True),
    "rtx4090": _Card("NVIDIA GeForce RTX 4090", 23.52, "8.9", 64, 16, desktop=True),
    "rtx5090": _Card("NVIDIA GeForce RTX 5090", 31.36, "12.0", 64, 16, desktop=True),
    "a6000": _Card("NVIDIA RTX A6000", 47.43, "8.6", 128, 16),
    "v100-16": _Card("Tesla V100-SXM2-16GB", 15.77, "7.0", 61, 8),
    "v100-32": _Card("Tesla V100-SXM2-32GB", 31.74, "7.0", 96, 12),
    "t4": _Card("Tesla T4", 14.58, "7.5", 16, 4),
    "l4": _Card("NVIDIA L4", 22.05, "8.9", 32, 8),
    "l40s": _Card("NVIDIA L40S", 44.40, "8.9", 128, 16),
    "a10g": _Card("NVIDIA A10G", 22.05, "8.6", 32, 8),
    "a100-40": _Card("NVIDIA A100-SXM4-40GB", 39.39, "8.0", 85, 12),
    "a100-80": _Card("NVIDIA A100-SXM4-80GB", 79.15, "8.0", 170, 12),
    "h100": _Card("NVIDIA H100 80GB HBM3", 79.19, "9.0", 200, 26),
    "h200": _Card("NVIDIA H200", 139.80, "9.0", 240, 24),
    "b200": _Card("NVIDIA B200", 178.35, "10.0", 240, 28),
    "mi210": _Card("AMD Instinct MI210", 63.98, "9.0", 128, 16, vendor="amd"),
    "mi300x": _Card("AMD Instinct MI300X", 191.98, "9.4", 240, 24, vendor="amd"),
    "rx7900xtx": _Card("AMD Radeon RX 7900 XTX", 23.98, "11.0", 64, 12, vendor="amd", desktop=True),
}
_APPLE = {"m2-16g": (16, 8), "m3-pro-36g": (36, 12), "m4-max-64g": (64, 16), "m2-ultra-192g": (192, 24)}
_CPU = re.compile(r"cpu-(\d+)c-(\d+)g(?:-([a-z0-9_]+))?")
_SEVERAL = re.compile(r"(\d+)x(.+)")
# The four words of the CPU names: a plain name is an x86-64 machine with AVX2 only.
_CPU_ISA = {
    None: ("avx2",),
    "avx2": ("avx2",),
    "avx512": ("avx2", "avx512"),
    "bf16": ("avx2", "avx512", "avx512_bf16"),
    "amx": ("amx", "amx_bf16", "avx2", "avx512", "avx512_bf16"),
    "arm": ("neon",),
}
NAMES = (*_CARDS, *_APPLE)


def hardware_from(text: str | None, folder: Path = Path()) -> Hardware:
    """This machine (None or "detect"), a named one, inline JSON, or a JSON file; raises InputError for anything else."""
    if text is None or text in ("", "detect", "auto"):
        return Hardware.detect(folder)
    if text.lstrip().startswith("{"):
        try:
            return from_json(json.loads(text), "--hardware")
        except json.JSONDecodeError as error:
            raise InputError(f"--hardware is not valid JSON: {error}") from None
    found = named(text.lower())
    if found:
        return found
    path = Path(text)
    if path.suffix == ".json" or path.is_file():
        return from_json(read_json(path), str(path))
    raise InputError(
        f"no machine {text!r}",
        remedy=f"a name ({', '.join(NAMES)}; 2xa10g for several; cpu-2c-24g, cpu-16c-64g-bf16), a FILE.json, or inline JSON",
    )


def named(name: str) -> Hardware | None:
    """A machine by name: a card, ``2xa10g``, ``cpu-CORESc-RAMg[-avx512|-bf16|-amx|-arm]``, an Apple; None when unknown."""
    if match := _CPU.fullmatch(name):
        cores, ram, word = int(match[1]), float(match[2]), match[3]
        if word not in _CPU_ISA or cores < 1 or ram < 1:
            return None
        return Hardware(Cpu(cores, _CPU_ISA[word]), ram, round(ram * 0.9, 2), _DISK_GIB, name=name)
    if name in _APPLE:
        unified, cores = _APPLE[name]
        gpu = Gpu(f"Apple {name}", unified * 0.75, unified * 0.65, "", "apple")
        return Hardware(Cpu(cores, ("neon",)), float(unified), unified * 0.7, _DISK_GIB, (gpu,), name=name)
    several = _SEVERAL.fullmatch(name)
    count, card = (int(several[1]), _CARDS.get(several[2])) if several else (1, _CARDS.get(name))
    if card is None or not 1 <= count <= 64:
        return None
    free = round(card.memory - (_DESKTOP_GIB if card.desktop else _CONTEXT_GIB), 2)
    gpu = Gpu(card.title, card.memory, free, card.capability, card.vendor)
    cpu = Cpu(card.cores * count, _CPU_ISA["bf16"] if not card.desktop else _CPU_ISA["avx2"])
    return Hardware(cpu, card.ram * count, round(card.ram * count * 0.9, 2), _DISK_GIB, (gpu,) * count, name=name)


def from_json(value: Any, source: str) -> Hardware:
    """A described machine; only ``cpu.cores`` and ``ram_gib`` are required. Unknown keys and impossible values are refused."""
    top = _object(value, source, Hardware)
    cpu = _object(_need(top, "cpu", source), f"{source}: cpu", Cpu)
    ram = _number(_need(top, "ram_gib", source), f"{source}: ram_gib")
    gpus = top.get("gpus", [])
    if not isinstance(gpus, list):
        raise InputError(f"{source}: gpus is not a list")
    return Hardware(
        cpu=Cpu(
            cores=int(_number(_need(cpu, "cores", f"{source}: cpu"), f"{source}: cpu.cores", low=1)),
            isa=_isa(cpu.get("isa", []), source),
            numa_nodes=int(_number(cpu.get("numa_nodes", 1), f"{source}: cpu.numa_nodes", low=1)),
            name=str(cpu.get("name", "")),
        ),
        ram_gib=ram,
        ram_free_gib=_number(top.get("ram_free_gib", round(ram * 0.9, 2)), f"{source}: ram_free_gib", high=ram),
        disk_free_gib=_number(top.get("disk_free_gib", _DISK_GIB), f"{source}: disk_free_gib", low=0),
        gpus=tuple(_gpu(entry, f"{source}: gpus[{i}]") for i, entry in enumerate(gpus)),
        driver=top.get("driver"),
        cuda=top.get("cuda"),
        compiler=bool(top.get("compiler", True)),
        name=str(top.get("name", "described")),
    )


def _gpu(value: Any, where: str) -> Gpu:
    entry = _object(value, where, Gpu)
    memory = _number(_need(entry, "memory_gib", where), f"{where}.memory_gib")
    vendor = entry.get("vendor", "nvidia")
    if vendor not in ("nvidia", "amd", "apple"):
        raise InputError(f"{where}.vendor is {vendor!r}; it must be nvidia, amd or apple")
    capability = str(entry.get("compute_capability") or "")
    if vendor == "nvidia" and not re.fullmatch(r"\d{1,2}\.\d", capability):
        raise InputError(
            f"{where}.compute_capability is {capability!r}", remedy='write it as "8.9" (nvidia-smi --query-gpu=compute_cap)'
        )
    free = _number(entry.get("free_gib", round(memory * 0.98, 2)), f"{where}.free_gib", low=0, high=memory)
    return Gpu(str(entry.get("name", "GPU")), memory, free, capability, vendor, bool(entry.get("mig", False)))


def _object(value: Any, where: str, kind: type) -> dict[str, Any]:
    if not isinstance(value, dict):
        raise InputError(f"{where} is not a JSON object")
    known = [f.name for f in fields(kind)]
    unknown = [key for key in value if key not in known]
    if unknown:
        raise InputError(f"{where} has unknown keys: {', '.join(map(str, unknown))}", remedy="known keys: " + ", ".join(known))
    return value


def _need(entry: dict[str, Any], key: str, where: str) -> Any:
    if key not in entry:
        raise InputError(f"{where} lacks {key!r}")
    return entry[key]


def _number(value: Any, where: str, low: float = 0.1, high: float = 1e6) -> float:
    if isinstance(value, bool) or not isinstance(value, int | float) or not low <= value <= high:
        raise InputError(f"{where} is {value!r}; it must be a number from {low:g} to {high:g}")
    return float(value)


def _isa(value: Any, source: str) -> tuple[str, ...]:
    words = value if isinstance(value, list) else [None]
    unknown = [word for word in words if word not in ISA_WORDS]
    if unknown:
        raise InputError(f"{source}: cpu.isa has unknown words: {unknown}", remedy="known words: " + ", ".join(ISA_WORDS))
    return tuple(sorted(words))
