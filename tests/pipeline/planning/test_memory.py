import pytest

from pipeline.machine.gpus import Gpu
from pipeline.model.shape import SHAPES, Shape
from pipeline.planning import memory

_8B, _TINY, _SMALL = (SHAPES[f"granite-{name}"] for name in ("4.1-8b", "4.0-h-tiny", "4.0-h-small"))


def test_kv_cache_of_the_8b() -> None:
    assert memory.kv_gib(_8B, 8192) == 1.25
    assert memory.kv_gib(_8B, 8192, 1.0) == 0.625


@pytest.mark.parametrize(
    ("name", "with_caching", "without"),
    [("h-350m", 33, 11), ("h-1b", 84, 28), ("h-tiny", 84, 28), ("h-micro", 111, 37), ("h-small", 223, 74)],
)
def test_mamba_state_agrees_with_the_published_mib_per_request(name: str, with_caching: int, without: int) -> None:
    shape = SHAPES[f"granite-4.0-{name}"]
    assert memory.mamba_gib(shape, 1) * 1024 == pytest.approx(with_caching, rel=0.03)
    assert memory.mamba_gib(shape, 1, prefix_caching=False) * 1024 == pytest.approx(without, rel=0.03)


def test_activation_lies_in_the_published_ranges() -> None:
    assert 0.75 <= memory.activation_gib(_8B) <= 0.85
    assert 1.2 <= memory.activation_gib(_TINY) < memory.activation_gib(_SMALL) <= 2.9


def test_graphs_grow_with_the_captured_batches_and_vanish_when_eager() -> None:
    assert memory.graphs_gib(8, True) == 0
    assert 0.25 < memory.graphs_gib(8, False) < memory.graphs_gib(128, False) < memory.graphs_gib(256, False) == 1.0
    assert memory.graphs_gib(1024, False) == 1.0


@pytest.mark.parametrize(
    ("gpu", "share"),
    [
        (Gpu("NVIDIA H100", 79.19, 78.9, "9.0"), 0.92),
        (Gpu("NVIDIA GeForce RTX 4090", 23.52, 23.4, "8.9"), 0.90),
        (Gpu("NVIDIA GeForce RTX 4090", 23.52, 22.9, "8.9"), 0.85),
        (Gpu("NVIDIA GeForce RTX 4090", 23.52, 11.76, "8.9"), 0.48),
        (Gpu("NVIDIA L4", 22.05, 20.0, "8.9"), 0.88),
    ],
)
def test_utilisation_never_asks_for_more_than_is_free(gpu: Gpu, share: float) -> None:
    assert memory.utilization(gpu)[0] == share
    assert share * gpu.memory_gib <= gpu.free_gib


@pytest.mark.parametrize(("name", "gib", "sequences"), [("H100", 79.19, 1024), ("A100", 79.15, 256), ("L4", 22.05, 256)])
def test_default_sequences_by_device(name: str, gib: float, sequences: int) -> None:
    assert memory.default_max_num_seqs(Gpu(name, gib, gib, "9.0")) == sequences


# PSS of all processes of one start, GiB, on a 2-core AVX2 machine with float32: SmolLM2-135M weights in the Granite
# architecture (eager and compiled), and random weights of two Granite 4.0 shapes
_135M = Shape("granite", 30, 576, 9, 3, 64, 1536, 49152, 8192)


@pytest.mark.parametrize(
    ("shape", "kv", "sequences", "eager", "measured"),
    [
        (_135M, 1, 32, True, 3.451),
        (_135M, 1, 16, True, 3.396),
        (_135M, 2, 32, False, 4.636),
        (SHAPES["granite-4.0-350m"], 2, 32, True, 5.943),
        (SHAPES["granite-4.0-1b"], 5, 32, True, 14.936),
    ],
)
def test_vllm_on_a_cpu_is_predicted_within_15_percent(
    shape: Shape, kv: int, sequences: int, eager: bool, measured: float
) -> None:
    weights = shape.parameters * 4 / 2**30
    overhead = memory.vllm_cpu_overhead_gib(shape, weights, 4.0, eager)
    predicted = weights + kv + overhead + memory.vllm_cpu_activation_gib(shape, sequences, 4.0)
    assert predicted == pytest.approx(measured, rel=0.05)


@pytest.mark.parametrize(("tokens", "at_start", "loaded"), [(16384, 0.549, 0.611), (32768, 0.902, 0.961)])
def test_llamacpp_on_a_cpu_is_predicted_within_15_percent(tokens: int, at_start: float, loaded: float) -> None:
    predicted = _135M.parameters * 34 / 32 / 2**30 + memory.kv_gib(_135M, tokens) + memory.compute_gib(_135M)
    assert predicted == pytest.approx(at_start, rel=0.15)
    assert predicted == pytest.approx(loaded, rel=0.15)
