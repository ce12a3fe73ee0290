import json
from pathlib import Path

import pytest

from pipeline.errors import InputError
from pipeline.machine.gpus import Gpu
from pipeline.machine.hardware import Cpu, Hardware
from pipeline.machine.named import NAMES, hardware_from, named

_ISSUE = (
    '{"cpu":{"cores":16,"isa":["avx512_bf16"]},"ram_gib":64,'
    '"gpus":[{"name":"L4","memory_gib":22.05,"free_gib":21.8,"compute_capability":"8.9"}]}'
)


def test_inline_json() -> None:
    assert hardware_from(_ISSUE) == Hardware(
        Cpu(16, ("avx512_bf16",)), 64.0, 57.6, 200.0, (Gpu("L4", 22.05, 21.8, "8.9"),), name="described"
    )


def test_json_file(tmp_path: Path) -> None:
    path = tmp_path / "machine.json"
    path.write_text(_ISSUE)
    assert hardware_from(str(path)) == hardware_from(_ISSUE)


def test_nothing_means_this_machine() -> None:
    assert hardware_from(None).name == "detected"


@pytest.mark.parametrize("name", NAMES)
def test_every_named_machine_is_possible(name: str) -> None:
    found = hardware_from(name)
    assert found.name == name
    assert found.cpu.cores >= 1
    assert found.ram_free_gib <= found.ram_gib
    assert all(0 < gpu.free_gib <= gpu.memory_gib for gpu in found.gpus)


def test_names_of_the_issue() -> None:
    names = ["rtx4060", "t4", "l4", "a10g", "rtx3090", "rtx4090", "a100-40", "a100-80", "h100", "h200", "cpu-2c-24g", "2xa10g"]
    assert [hardware_from(name).name for name in names] == names


def test_several_cards_and_capital_letters() -> None:
    found = hardware_from("2xA10G")
    assert [gpu.memory_gib for gpu in found.gpus] == [22.05, 22.05]


@pytest.mark.parametrize(
    ("name", "isa"),
    [("cpu-2c-24g", ("avx2",)), ("cpu-8c-32g-bf16", ("avx2", "avx512", "avx512_bf16")), ("cpu-4c-8g-arm", ("neon",))],
)
def test_cpu_names(name: str, isa: tuple[str, ...]) -> None:
    assert hardware_from(name).cpu.isa == isa


@pytest.mark.parametrize("name", ["rtx9999", "0xh100", "65xh100", "cpu-0c-4g", "cpu-2c-24g-sse", "2xcpu-2c-24g"])
def test_unknown_names(name: str) -> None:
    assert named(name) is None


def _without(key: str) -> str:
    value = json.loads(_ISSUE)
    del value[key]
    return json.dumps(value)


def _with(path: str, new: object) -> str:
    value = json.loads(_ISSUE)
    target = value
    *parents, last = path.split(".")
    for part in parents:
        target = target[int(part)] if part.isdigit() else target[part]
    target[last] = new
    return json.dumps(value)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("nonsense", "no machine 'nonsense'"),
        ("{", "--hardware is not valid JSON"),
        ("missing.json", "missing.json: no such file"),
        (_without("cpu"), "lacks 'cpu'"),
        (_without("ram_gib"), "lacks 'ram_gib'"),
        (_with("vram", 3), "unknown keys: vram"),
        (_with("cpu.threads", 3), "unknown keys: threads"),
        (_with("gpus.0.vram", 3), "gpus[0] has unknown keys: vram"),
        (_with("cpu.cores", 0), "cpu.cores is 0"),
        (_with("cpu.cores", True), "cpu.cores is True"),
        (_with("cpu.isa", ["sse"]), "unknown words: ['sse']"),
        (_with("ram_gib", -1), "ram_gib is -1"),
        (_with("ram_free_gib", 65), "ram_free_gib is 65"),
        (_with("gpus", {}), "gpus is not a list"),
        (_with("gpus.0.free_gib", 99), "gpus[0].free_gib is 99"),
        (_with("gpus.0.compute_capability", "ampere"), "gpus[0].compute_capability is 'ampere'"),
        (_with("gpus.0.vendor", "intel"), "gpus[0].vendor is 'intel'"),
    ],
)
def test_wrong_descriptions_are_refused(text: str, message: str) -> None:
    with pytest.raises(InputError) as caught:
        hardware_from(text)
    assert message in caught.value.message


def test_an_amd_gpu_needs_no_compute_capability() -> None:
    gpu = {"name": "W7900", "memory_gib": 47.9, "vendor": "amd"}
    assert hardware_from(_with("gpus", [gpu])).gpus == (Gpu("W7900", 47.9, 46.94, "", "amd"),)
