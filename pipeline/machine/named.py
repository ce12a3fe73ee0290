"""Machines by name or by description, for planning a launch on a machine that is not this one.

The named ones are described in ``machines.json`` as a user's file would describe them. GPU memory is what a CUDA program
sees (``torch.cuda.mem_get_info``), which is less than the box says: "80 GB" 79.19 GiB, "24 GB" 22.05 (with ECC) to 23.6,
"16 GB" 14.6 to 15.6. Free memory leaves room for a bare context (0.3 GiB), on a consumer card for a desktop and its
browser (0.6), on an Apple for what else runs.
"""

import json
import re
from dataclasses import dataclass, fields, replace
from pathlib import Path
from typing import Any

from pipeline.errors import InputError
from pipeline.machine.gpus import Gpu
from pipeline.machine.hardware import Cpu, Hardware
from pipeline.runs.files import read_json

ISA_WORDS = ("avx2", "avx512", "avx512_bf16", "amx", "amx_bf16", "neon", "arm_bf16")
_MACHINES: dict[str, Any] = read_json(Path(__file__).with_name("machines.json"))
NAMES = tuple(_MACHINES)
_DISK_GIB = 200.0
_CPU = re.compile(r"cpu-(\d+)c-(\d+)g(?:-([a-z0-9_]+))?")
_SEVERAL = re.compile(r"(\d+)x(.+)")
# the last word of the CPU names: a plain name is an x86-64 machine with AVX2 only
_CPU_ISA = {
    None: ("avx2",),
    "avx2": ("avx2",),
    "avx512": ("avx2", "avx512"),
    "bf16": ("avx2", "avx512", "avx512_bf16"),
    "amx": ("amx", "amx_bf16", "avx2", "avx512", "avx512_bf16"),
    "arm": ("neon",),
}


def hardware_from(text: str | None, folder: Path = Path()) -> Hardware:
    """This machine (None or "detect"), a named one, inline JSON, or a JSON file; raises InputError for anything else."""
    if text is None or text in ("", "detect", "auto"):
        return Hardware.detect(folder)
    if text.lstrip().startswith("{"):
        try:
            return from_json(json.loads(text), "--hardware")
        except json.JSONDecodeError as error:
            raise InputError(f"--hardware is not valid JSON: {error}") from None
    if machine := named(text.lower()):
        return machine
    path = Path(text)
    if path.suffix == ".json" or path.is_file():
        return from_json(read_json(path), str(path))
    names = f"{', '.join(NAMES)}; 2xa10g for several; cpu-2c-24g, cpu-16c-64g-bf16"
    raise InputError(f"no machine {text!r}", remedy=f"a name ({names}), a FILE.json, or inline JSON")


def named(name: str) -> Hardware | None:
    """A machine by name: a card, ``2xa10g``, ``cpu-CORESc-RAMg[-avx512|-bf16|-amx|-arm]``, an Apple; None when unknown."""
    if match := _CPU.fullmatch(name):
        cores, ram, word = int(match[1]), float(match[2]), match[3]
        if word not in _CPU_ISA or cores < 1 or ram < 1:
            return None
        return Hardware(Cpu(cores, _CPU_ISA[word]), ram, round(ram * 0.9, 2), _DISK_GIB, name=name)
    several = _SEVERAL.fullmatch(name)
    count, one = (int(several[1]), several[2]) if several else (1, name)
    if one not in _MACHINES or not 1 <= count <= 64:
        return None
    machine = replace(from_json(_MACHINES[one], "machines.json"), name=name)
    if not several or machine.accelerator == "apple":
        return None if several else machine
    ram = machine.ram_gib * count
    cpu = replace(machine.cpu, cores=machine.cpu.cores * count)
    return replace(machine, cpu=cpu, ram_gib=ram, ram_free_gib=round(ram * 0.9, 2), gpus=machine.gpus * count)


def from_json(value: Any, source: str) -> Hardware:
    """A described machine; only ``cpu.cores`` and ``ram_gib`` are required. Unknown keys and impossible values are refused."""
    top = _Entry(value, source, Hardware, separator=": ")
    cpu = _Entry(top.need("cpu"), f"{source}: cpu", Cpu)
    ram = top.number("ram_gib")
    gpus = top.get("gpus", [])
    if not isinstance(gpus, list):
        raise InputError(f"{source}: gpus is not a list")
    cores, numa_nodes = int(cpu.number("cores", low=1)), int(cpu.number("numa_nodes", 1, low=1))
    physical = int(cpu.number("physical", low=1, high=cores)) if cpu.get("physical") is not None else None
    idle = cpu.number("idle", low=0) if cpu.get("idle") is not None else None
    return Hardware(
        cpu=Cpu(cores, _isa(cpu.get("isa", []), source), numa_nodes, str(cpu.get("name", "")), physical, idle),
        ram_gib=ram,
        ram_free_gib=top.number("ram_free_gib", round(ram * 0.9, 2), high=ram),
        disk_free_gib=top.number("disk_free_gib", _DISK_GIB, low=0),
        gpus=tuple(_gpu(entry, f"{source}: gpus[{i}]") for i, entry in enumerate(gpus)),
        driver=top.get("driver"),
        cuda=top.get("cuda"),
        compiler=bool(top.get("compiler", True)),
        name=str(top.get("name", "described")),
    )


@dataclass(frozen=True)
class _Entry:
    """One JSON object of a description, and what it is called in a message; refused unless its keys are fields of ``kind``."""

    value: Any
    where: str
    kind: type
    separator: str = "."

    def __post_init__(self) -> None:
        if not isinstance(self.value, dict):
            raise InputError(f"{self.where} is not a JSON object")
        known = [field.name for field in fields(self.kind)]
        unknown = ", ".join(str(key) for key in self.value if key not in known)
        if unknown:
            raise InputError(f"{self.where} has unknown keys: {unknown}", remedy="known keys: " + ", ".join(known))

    def get(self, key: str, default: Any = None) -> Any:
        return self.value.get(key, default)

    def need(self, key: str) -> Any:
        if key not in self.value:
            raise InputError(f"{self.where} lacks {key!r}")
        return self.value[key]

    def number(self, key: str, default: float | None = None, *, low: float = 0.1, high: float = 1e6) -> float:
        value = self.need(key) if default is None else self.get(key, default)
        if isinstance(value, bool) or not isinstance(value, int | float) or not low <= value <= high:
            where = f"{self.where}{self.separator}{key}"
            raise InputError(f"{where} is {value!r}; it must be a number from {low:g} to {high:g}")
        return float(value)


def _gpu(value: Any, where: str) -> Gpu:
    entry = _Entry(value, where, Gpu)
    memory = entry.number("memory_gib")
    vendor = entry.get("vendor", "nvidia")
    if vendor not in ("nvidia", "amd", "apple"):
        raise InputError(f"{where}.vendor is {vendor!r}; it must be nvidia, amd or apple")
    capability = str(entry.get("compute_capability") or "")
    if vendor == "nvidia" and not re.fullmatch(r"\d{1,2}\.\d", capability):
        remedy = 'write it as "8.9" (nvidia-smi --query-gpu=compute_cap)'
        raise InputError(f"{where}.compute_capability is {capability!r}", remedy=remedy)
    free = entry.number("free_gib", round(memory * 0.98, 2), low=0, high=memory)
    return Gpu(str(entry.get("name", "GPU")), memory, free, capability, vendor, bool(entry.get("mig", False)))


def _isa(value: Any, source: str) -> tuple[str, ...]:
    words = value if isinstance(value, list) else [None]
    unknown = [word for word in words if word not in ISA_WORDS]
    if unknown:
        raise InputError(f"{source}: cpu.isa has unknown words: {unknown}", remedy="known words: " + ", ".join(ISA_WORDS))
    return tuple(sorted(words))
