import json
import os
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import ExitStack
from pathlib import Path

import psutil
import pytest

from pipeline.machine.hardware import Cpu, Hardware, detect_cpu, idle_cores, memory_bytes, usable_cores


def _write(root: Path, name: str, text: str) -> None:
    path = root / name
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(text)


def test_detect_describes_this_machine() -> None:
    found = Hardware.detect()
    assert found.cpu.cores >= 1
    assert 0 < found.ram_free_gib <= found.ram_gib
    assert found.disk_free_gib > 0
    assert found.accelerator == (found.gpus[0].vendor if found.gpus else None)


def test_detect_measures_the_disk_of_a_folder_that_does_not_exist_yet(tmp_path: Path) -> None:
    assert Hardware.detect(tmp_path / "not" / "yet").disk_free_gib == pytest.approx(
        Hardware.detect(tmp_path).disk_free_gib, abs=1
    )


@pytest.mark.parametrize(
    ("flags", "isa", "fast"),
    [
        ("fpu sse4_2 avx2 fma", ("avx2",), False),
        ("avx2 avx512f", ("avx2", "avx512"), False),
        ("avx2 avx512f avx512_bf16", ("avx2", "avx512", "avx512_bf16"), True),
        ("avx2 avx512f avx512_bf16 amx_tile amx_bf16", ("amx", "amx_bf16", "avx2", "avx512", "avx512_bf16"), True),
    ],
)
def test_cpuinfo_flags_become_instruction_sets(tmp_path: Path, flags: str, isa: tuple[str, ...], fast: bool) -> None:
    _write(tmp_path, "proc/cpuinfo", f"model name\t: A CPU\nflags\t\t: {flags}\n\nmodel name\t: A CPU\nflags\t\t: {flags}\n")
    cpu = detect_cpu(tmp_path)
    assert (cpu.name, cpu.isa, cpu.fast_bfloat16) == ("A CPU", isa, fast)


def test_arm_features_line_is_read(tmp_path: Path) -> None:
    _write(tmp_path, "proc/cpuinfo", "processor : 0\nFeatures\t: fp asimd evtstrm\n")
    assert detect_cpu(tmp_path).isa == ("neon",)


def test_numa_nodes_are_counted(tmp_path: Path) -> None:
    for node in ("node0", "node1"):
        (tmp_path / "sys/devices/system/node" / node).mkdir(parents=True)
    assert detect_cpu(tmp_path).numa_nodes == 2


@pytest.mark.parametrize(
    ("files", "cores"),
    [
        ({"sys/fs/cgroup/cpu.max": "100000 100000"}, 1),
        ({"sys/fs/cgroup/a/cpu.max": "max 100000", "sys/fs/cgroup/cpu.max": "50000 100000"}, 1),
        ({"sys/fs/cgroup/a/cpu.max": "max 100000"}, None),
    ],
)
def test_cgroup_v2_quota_of_any_ancestor_limits_the_cores(tmp_path: Path, files: dict[str, str], cores: int | None) -> None:
    _write(tmp_path, "proc/self/cgroup", "0::/a\n")
    for name, text in files.items():
        _write(tmp_path, name, text)
    assert usable_cores(tmp_path) == (cores or usable_cores(tmp_path / "empty"))


@pytest.fixture
def _all_cores_busy() -> Iterator[None]:
    spin = [sys.executable, "-c", "while True: pass"]
    with ExitStack() as stack:
        for _ in range(2 * len(os.sched_getaffinity(0))):
            stack.callback(stack.enter_context(subprocess.Popen(spin)).kill)
        time.sleep(0.5)
        yield


@pytest.mark.skipif(not hasattr(os, "sched_getaffinity"), reason="Linux only")
@pytest.mark.usefixtures("_all_cores_busy")
def test_cores_that_other_work_uses_are_not_idle(monkeypatch: pytest.MonkeyPatch) -> None:
    # the load of the last minute takes a minute to rise
    monkeypatch.setattr(psutil, "getloadavg", lambda: (2.0 * os.cpu_count(), 1.0, 1.0))  # type: ignore[operator]
    cores = len(os.sched_getaffinity(0))
    assert idle_cores() <= 0.5 * cores
    # a moment's burst on a quiet machine
    monkeypatch.setattr(psutil, "getloadavg", lambda: (0.1, 0.1, 0.1))
    assert idle_cores() == cores
    detected = Hardware.detect().cpu
    assert (detected.idle, detected.physical is None or 1 <= detected.physical <= detected.cores) == (cores, True)


@pytest.mark.skipif(not hasattr(os, "sched_getaffinity"), reason="Linux only")
def test_work_that_just_ended_and_cores_of_others_do_not_make_a_machine_busy(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(os, "sched_getaffinity", lambda _: {1, 3})
    monkeypatch.setattr(psutil, "getloadavg", lambda: (4.0, 1.0, 1.0))
    monkeypatch.setattr(psutil, "cpu_percent", lambda *_, percpu: [100.0, 0.0, 100.0, 10.0])
    assert idle_cores() == 1.9


def test_cgroup_v1_quota_limits_the_cores(tmp_path: Path) -> None:
    _write(tmp_path, "proc/self/cgroup", "3:cpu,cpuacct:/docker/x\n0::/\n")
    _write(tmp_path, "sys/fs/cgroup/cpu/cpu.cfs_quota_us", "100000\n")
    _write(tmp_path, "sys/fs/cgroup/cpu/cpu.cfs_period_us", "100000\n")
    assert usable_cores(tmp_path) == 1


def test_cgroup_v2_limit_bounds_memory_and_counts_page_cache_as_free(tmp_path: Path) -> None:
    gib = 2**30
    _write(tmp_path, "proc/self/cgroup", "0::/\n")
    _write(tmp_path, "sys/fs/cgroup/memory.max", str(gib))
    _write(tmp_path, "sys/fs/cgroup/memory.current", str(gib // 2))
    _write(tmp_path, "sys/fs/cgroup/memory.stat", f"anon 1\ninactive_file {gib // 4}\n")
    assert memory_bytes(tmp_path) == (gib, gib - gib // 2 + gib // 4)


def test_cgroup_v1_limit_bounds_memory(tmp_path: Path) -> None:
    gib = 2**30
    _write(tmp_path, "proc/self/cgroup", "4:memory:/job\n")
    _write(tmp_path, "sys/fs/cgroup/memory/job/memory.limit_in_bytes", str(gib))
    _write(tmp_path, "sys/fs/cgroup/memory/job/memory.usage_in_bytes", str(gib // 4))
    assert memory_bytes(tmp_path) == (gib, gib - gib // 4)


@pytest.mark.parametrize("limit", ["max", "9223372036854771712"])
def test_an_unlimited_cgroup_leaves_the_machine_s_memory(tmp_path: Path, limit: str) -> None:
    _write(tmp_path, "proc/self/cgroup", "0::/\n")
    _write(tmp_path, "sys/fs/cgroup/memory.max", limit)
    assert memory_bytes(tmp_path)[0] == psutil.virtual_memory().total


def test_to_json_is_what_a_machine_description_reads() -> None:
    from pipeline.machine.named import from_json

    for cpu in (Cpu(2, ("avx2",)), Cpu(2, ("avx2",), physical=1, idle=0.0), detect_cpu()):
        here = Hardware(cpu, 24.0, 20.0, 70.0, compiler=False)
        assert from_json(json.loads(json.dumps(here.to_json())), "x") == here
