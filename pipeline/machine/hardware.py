"""The machine: what may really be used of its CPU, memory, disk and GPUs - detected, named or described by the user.

Not covered: network, interconnect topology (NVLink or PCIe) and per-process GPU quotas other than MIG.
"""

import os
import platform
import re
import shutil
import sys
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import psutil

from pipeline.machine import gpus
from pipeline.machine.gpus import GIB, Gpu, Vendor

# /proc/cpuinfo flag -> the name used in plans; ARM calls the line "Features" and NEON "asimd".
_RENAMED = {"avx512f": "avx512", "amx_tile": "amx", "asimd": "neon", "bf16": "arm_bf16"}
_ISA = {name: name for name in ("avx2", "avx512_bf16", "amx_bf16", "neon")} | _RENAMED
_FAST_BFLOAT16 = frozenset({"avx512_bf16", "amx", "amx_bf16", "arm_bf16"})
# a load average below this is a quiet machine; else the cores are watched for so many seconds
_QUIET, _WATCHED = 0.5, 0.3


@dataclass(frozen=True)
class Cpu:
    """Cores this process may use (affinity and cgroup quota applied) and the instruction sets that matter for inference.

    ``physical`` counts hyperthreads once (None: not known), ``idle`` is how many cores other work left idle when this was
    measured (None: it was not).
    """

    cores: int
    isa: tuple[str, ...] = ()
    numa_nodes: int = 1
    name: str = ""
    physical: int | None = None
    idle: float | None = None

    @property
    def fast_bfloat16(self) -> bool:
        """True when bfloat16 products run in hardware; elsewhere float32 is faster."""
        return bool(_FAST_BFLOAT16.intersection(self.isa))


@dataclass(frozen=True)
class Hardware:
    """What a launch may use; memory and disk in GiB. ``compiler`` says whether torch.compile finds a C++ compiler."""

    cpu: Cpu
    ram_gib: float
    ram_free_gib: float
    disk_free_gib: float = 0.0
    gpus: tuple[Gpu, ...] = ()
    driver: str | None = None
    cuda: str | None = None
    compiler: bool = True
    name: str = "detected"
    notes: tuple[str, ...] = ()

    @property
    def accelerator(self) -> Vendor | None:
        """Vendor of the GPUs, or None on a CPU machine."""
        return self.gpus[0].vendor if self.gpus else None

    def to_json(self) -> dict[str, Any]:
        """The documented JSON object of ``granite-pipeline hardware --json``."""
        return asdict(self)

    @staticmethod
    def detect(folder: Path = Path()) -> "Hardware":
        """Look at this machine; ``folder`` is where disk space is measured. Missing GPU libraries are normal, not errors."""
        total, free = memory_bytes()
        existing = next(p for p in [folder.resolve(), *folder.resolve().parents] if p.exists())
        return Hardware(
            cpu=replace(detect_cpu(), idle=idle_cores()),
            ram_gib=round(total / GIB, 2),
            ram_free_gib=round(free / GIB, 2),
            compiler=any(map(shutil.which, (os.environ.get("CXX") or "c++", "g++", "clang++"))),
            disk_free_gib=round(shutil.disk_usage(existing).free / GIB, 2),
            **vars(gpus.detect(total / GIB, free / GIB)),
        )


def detect_cpu(root: Path = Path("/")) -> Cpu:
    """Usable cores, ISA, NUMA nodes and name of this CPU; ``root`` is another file system root in tests."""
    name, flags = _cpuinfo(root)
    isa = tuple(sorted({_ISA[flag] for flag in flags if flag in _ISA}))
    if sys.platform == "darwin" and platform.machine() == "arm64":
        name, isa = platform.processor(), ("neon",)
    nodes = [p for p in (root / "sys/devices/system/node").glob("node[0-9]*") if p.is_dir()]
    cores, physical = usable_cores(root), psutil.cpu_count(logical=False)
    return Cpu(cores, isa, max(1, len(nodes)), name, physical and min(cores, physical))


def usable_cores(root: Path = Path("/")) -> int:
    """Cores allowed by scheduler affinity and by the cgroup CPU quota (v1 or v2), at least 1."""
    quotas = [q for folder in _cgroup_folders(root, "cpu") if (q := _cpu_quota(folder)) is not None]
    return max(1, min([len(_allowed()), *(int(q) for q in quotas)]))


def idle_cores() -> float:
    """Of the cores that this process may be scheduled on, how many other work leaves idle.

    The load of the last minute or a look of _WATCHED seconds, whichever finds more: neither a moment's burst nor work that
    has just ended makes a machine busy.
    """
    allowed, load = _allowed(), psutil.getloadavg()[0]
    if load < _QUIET:
        return float(len(allowed))
    busy = psutil.cpu_percent(_WATCHED, percpu=True)
    seen = sum(1 - busy[core] / 100 for core in allowed if core < len(busy))
    return round(max(seen, len(allowed) - load), 1)


def _allowed() -> set[int]:
    """Numbers of the cores that the scheduler's affinity allows."""
    if hasattr(os, "sched_getaffinity"):
        return set(os.sched_getaffinity(0))
    return set(range(os.cpu_count() or 1))


def memory_bytes(root: Path = Path("/")) -> tuple[int, int]:
    """Total and available RAM in bytes, both bounded by the tightest cgroup memory limit above this process."""
    machine = psutil.virtual_memory()
    total, free = machine.total, machine.available
    for folder in _cgroup_folders(root, "memory"):
        limit = _integer(folder / "memory.max") or _integer(folder / "memory.limit_in_bytes")
        used = _integer(folder / "memory.current") or _integer(folder / "memory.usage_in_bytes") or 0
        if limit is not None:
            total, free = min(total, limit), min(free, max(0, limit - used + _reclaimable(folder)))
    return total, free


def _cgroup_folders(root: Path, controller: str) -> list[Path]:
    """This process's cgroup and its ancestors, for v1 (one tree a controller) and v2 (one unified tree).

    Inside a container the path of /proc/self/cgroup may lie outside the mounted tree; then only the mount's root is left.
    """
    folders: list[Path] = []
    for line in gpus.read(root / "proc/self/cgroup").splitlines():
        _, controllers, path = line.split(":", 2)
        if controllers and controller not in controllers.split(","):
            continue
        mount = root / "sys/fs/cgroup" / (controller if controllers else "")
        relative = Path(path.lstrip("/"))
        folders += [mount / part for part in [relative, *relative.parents] if (mount / part).is_dir()]
    return folders


def _cpu_quota(folder: Path) -> float | None:
    quota, _, period = gpus.read(folder / "cpu.max").partition(" ")
    if not quota:
        quota, period = gpus.read(folder / "cpu.cfs_quota_us"), gpus.read(folder / "cpu.cfs_period_us")
    unlimited = quota in ("", "max") or int(quota) <= 0
    return None if unlimited else int(quota) / int(period or 100_000)


def _reclaimable(folder: Path) -> int:
    """Page cache the kernel gives back under pressure; counted as used by the cgroup but free in practice."""
    stat = dict(line.split() for line in gpus.read(folder / "memory.stat").splitlines() if len(line.split()) == 2)
    return int(stat.get("inactive_file", stat.get("total_inactive_file", 0)))


def _cpuinfo(root: Path) -> tuple[str, set[str]]:
    """Name and flags of the first core."""
    text = gpus.read(root / "proc/cpuinfo")
    name = re.search(r"^model name\s*:(.*)", text, re.MULTILINE)
    flags = re.search(r"^(?:flags|Features)\s*:(.*)", text, re.MULTILINE)
    return name[1].strip() if name else "", set(flags[1].split()) if flags else set()


def _integer(path: Path) -> int | None:
    text = gpus.read(path)
    return int(text) if text.isdigit() else None
