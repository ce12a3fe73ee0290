from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from pipeline.machine import gpus
from pipeline.machine.gpus import Gpu, detect_amd, detect_nvidia, visible_gpus

_A, _B = Gpu("A", 16, 15, "8.6"), Gpu("B", 24, 23, "8.9")
_NAMED = {"0 GPU-aaaa": _A, "1 GPU-bbbb": _B}


@pytest.mark.parametrize(
    ("visible", "expected"),
    [
        (None, (_A, _B)),
        ("0,1", (_A, _B)),
        ("1, 0", (_B, _A)),
        ("1", (_B,)),
        ("GPU-bbbb", (_B,)),
        ("", ()),
        ("-1", ()),
        ("0,7,1", (_A,)),
    ],
)
def test_cuda_visible_devices(visible: str | None, expected: tuple[Gpu, ...]) -> None:
    assert visible_gpus(_NAMED, visible) == expected


@pytest.mark.parametrize(("text", "pair"), [("8.9", (8, 9)), ("12.0", (12, 0)), ("7", (7, 0)), ("", (0, 0))])
def test_capability_as_numbers(text: str, pair: tuple[int, int]) -> None:
    assert Gpu("x", 1, 1, text).capability == pair


def test_a_machine_without_a_driver_is_not_an_error(monkeypatch: pytest.MonkeyPatch) -> None:
    import pynvml

    def no_library() -> None:
        raise pynvml.NVMLError(pynvml.NVML_ERROR_LIBRARY_NOT_FOUND)

    monkeypatch.setattr(pynvml, "nvmlInit", no_library)
    assert detect_nvidia() == gpus.Detected()


def test_a_driver_that_does_not_answer_is_told(monkeypatch: pytest.MonkeyPatch) -> None:
    import pynvml

    def mismatch() -> None:
        raise pynvml.NVMLError(pynvml.NVML_ERROR_LIB_RM_VERSION_MISMATCH)

    monkeypatch.setattr(pynvml, "nvmlInit", mismatch)
    found = detect_nvidia()
    assert found.gpus == ()
    assert len(found.notes) == 1
    assert found.notes[0].startswith("the NVIDIA driver does not answer: ")


class _Nvml:
    """NVML's answers for one L4 and one A100 cut into two MIG slices; no such machine is at hand in a test."""

    NVML_DEVICE_MIG_ENABLE = 1
    nvmlMemory_v2 = 2  # noqa: N815 - NVML's name

    class NVMLError(Exception):
        pass

    class NVMLError_NotFound(NVMLError):  # noqa: N801 - NVML's name
        pass

    def nvmlDeviceGetCount(self) -> int:  # noqa: N802
        return 2

    def nvmlDeviceGetHandleByIndex(self, index: int) -> str:  # noqa: N802
        return ("l4", "a100")[index]

    def nvmlDeviceGetMigMode(self, handle: str) -> tuple[int, int]:  # noqa: N802
        if handle == "l4":
            raise self.NVMLError
        return (1, 1)

    def nvmlDeviceGetMaxMigDeviceCount(self, handle: str) -> int:  # noqa: N802
        return 3

    def nvmlDeviceGetMigDeviceHandleByIndex(self, handle: str, number: int) -> str:  # noqa: N802
        if number == 1:
            raise self.NVMLError_NotFound
        return f"mig{number}"

    def nvmlDeviceGetUUID(self, handle: str) -> str:  # noqa: N802
        return f"{'MIG' if handle.startswith('mig') else 'GPU'}-{handle}"

    def nvmlDeviceGetMemoryInfo(self, handle: str, version: int = 1) -> Any:  # noqa: N802
        total = {"l4": 23034, "mig0": 9856, "mig2": 19968}[handle] * 2**20
        return SimpleNamespace(total=total, free=total - 800 * 2**20, reserved=455 * 2**20)

    def nvmlDeviceGetCudaComputeCapability(self, handle: str) -> tuple[int, int]:  # noqa: N802
        return {"l4": (8, 9), "a100": (8, 0)}[handle]

    def nvmlDeviceGetName(self, handle: str) -> str:  # noqa: N802
        return f"NVIDIA {handle}"

    def nvmlSystemGetCudaDriverVersion_v2(self) -> int:  # noqa: N802
        return 13010

    def nvmlSystemGetDriverVersion(self) -> str:  # noqa: N802
        return "590.10"


def test_nvml_answers_become_gpus_and_mig_slices_replace_their_card() -> None:
    found = gpus._ask_nvml(_Nvml(), None)
    assert (found.driver, found.cuda) == ("590.10", "13.1")
    assert [(g.name, g.memory_gib, g.free_gib, g.compute_capability, g.mig) for g in found.gpus] == [
        ("NVIDIA l4", 22.05, 21.71, "8.9", False),
        ("NVIDIA mig0", 9.18, 8.84, "8.0", True),
        ("NVIDIA mig2", 19.06, 18.72, "8.0", True),
    ]
    assert [g.name for g in gpus._ask_nvml(_Nvml(), "MIG-mig2").gpus] == ["NVIDIA mig2"]


def test_amd_cards_are_read_from_sysfs(tmp_path: Path) -> None:
    files = {
        "sys/class/drm/card0/device/vendor": "0x8086\n",
        "sys/class/drm/card1/device/vendor": "0x1002\n",
        "sys/class/drm/card1/device/mem_info_vram_total": str(24 * 2**30),
        "sys/class/drm/card1/device/mem_info_vram_used": str(2**30),
        "sys/class/drm/card1/device/product_name": "Radeon RX 7900 XTX\n",
        "sys/class/kfd/kfd/topology/nodes/0/properties": "cpu_cores_count 16\ngfx_target_version 0\n",
        "sys/class/kfd/kfd/topology/nodes/1/properties": "simd_count 192\ngfx_target_version 110000\n",
    }
    for name, text in files.items():
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_text(text)
    assert detect_amd(tmp_path) == (Gpu("Radeon RX 7900 XTX", 24.0, 23.0, "11.0", "amd"),)


def test_no_amd_driver_no_amd_gpus(tmp_path: Path) -> None:
    assert detect_amd(tmp_path) == ()
