"""The faster conversion: the file that llama.cpp's converter writes alone, byte for byte; and what happens when it is in doubt."""

from __future__ import annotations

import json
import logging
import shutil
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import pytest
import tiny

from pipeline.errors import EnvironmentFailure
from training.base import resolve
from training.export import gguf, weights
from training.export.llamacpp import quantize

# tiny models of every architecture, two with the tokenizer and template of a published version, and the embedded base
MODELS = ["embedded", "3.3", "3.x-moe", "4.0-dense", "4.0-hybrid", "4.0-hybrid-moe", "4.1"]
ALONE = """
import runpy, sys
from pathlib import Path
script = sys.argv[1]
sys.path[0] = str(Path(script).parent)
for view in sys.argv[2:]:
    target = str(Path(view).parent / "theirs.gguf")
    sys.argv = [script, view, "--outtype", "q8_0", "--outfile", target, "--model-name", "m"]
    runpy.run_path(script, run_name="__main__")
"""


def _view(name: str, folder: Path) -> Path:
    """What the converter is given of a model, in a folder of its own."""
    if name == "embedded":
        base = resolve("embedded", folder / ".base").folder
    else:
        base = tiny.published_base(name, folder / "base") if name in tiny.PUBLISHED else tiny.make(name, folder / "base")
    weights.merge_folder(base, base, folder / "merged", full=True)
    return gguf._converter_view(folder / "merged", folder / "view")


def _alone(*views: Path, converter: Path | None = None) -> None:
    """Convert as the converter's authors do, one view after the other in one process, each to ``theirs.gguf`` beside it."""
    words = [sys.executable, "-c", ALONE, converter or gguf._converter(), *views]
    done = subprocess.run([str(word) for word in words], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr


@pytest.fixture(scope="module")
def views(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    made = {name: _view(name, tmp_path_factory.mktemp("model")) for name in MODELS}
    _alone(*made.values())
    return made


@pytest.mark.slow
@pytest.mark.parametrize("name", MODELS)
def test_the_file_is_the_converters_to_the_last_byte(
    name: str, views: dict[str, Path], tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    with caplog.at_level(logging.INFO):
        gguf._run_converter(views[name], tmp_path / "ours.gguf", "m")
    assert "the converter does it alone" not in caplog.text
    assert (tmp_path / "ours.gguf").read_bytes() == (views[name].parent / "theirs.gguf").read_bytes()


@pytest.mark.parametrize("dtype", [np.float16, np.float32])
def test_q8_0_is_the_reference_on_every_float16_and_on_halves(dtype: type) -> None:
    """Against gguf-py: every finite float16 in blocks of like and of unlike size, and values that end on a half exactly."""
    from gguf import GGMLQuantizationType
    from gguf.quants import quantize as reference

    every = np.arange(65536, dtype=np.uint16).view(np.float16)
    every = every[np.isfinite(every)]
    every = every[: len(every) // 64 * 64].reshape(-1, 64)
    mixed = np.random.default_rng(0).permutation(every.reshape(-1)).reshape(-1, 64)
    halves = np.arange(-127, 127.5, 0.5)
    halves = np.pad(halves, (0, -len(halves) % 31)).reshape(-1, 31)
    halves = np.concatenate([np.full((len(halves), 1), 127), halves], axis=1)
    halves = np.concatenate([halves, np.nextafter(halves.astype(dtype), dtype(0)), halves * 2.0**-14]).reshape(-1, 32)
    with ThreadPoolExecutor(2) as pool:
        for values in (every, mixed, np.zeros((3, 32)), halves, np.random.default_rng(1).normal(0, 0.02, (40000, 32))):
            cast = values.astype(dtype)
            theirs = reference(cast, GGMLQuantizationType.Q8_0)
            assert quantize(cast, pool).tobytes() == theirs.tobytes()


@pytest.mark.slow
def test_another_q8_0_is_noticed_and_the_converter_does_it_alone(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """A converter whose gguf-py rounds another way: its file counts, not ours."""
    view = _view("3.x-moe", tmp_path)
    home, other = gguf._converter().parent, tmp_path / "llama.cpp"
    other.mkdir()
    shutil.copy(home / "convert_hf_to_gguf.py", other)
    for folder in ("conversion", "gguf-py"):
        shutil.copytree(home / folder, other / folder, ignore=shutil.ignore_patterns("__pycache__"))
    quants = other / "gguf-py" / "gguf" / "quants.py"
    text = quants.read_text()
    assert "qs = np_roundf(blocks * id)" in text
    quants.write_text(text.replace("qs = np_roundf(blocks * id)", "qs = np.trunc(blocks * id)"))
    monkeypatch.setattr(gguf, "_converter", lambda: other / "convert_hf_to_gguf.py")
    with caplog.at_level(logging.INFO):
        gguf._run_converter(view, tmp_path / "ours.gguf", "m")
    assert "this version of gguf-py has another Q8_0" in caplog.text
    _alone(view, converter=gguf._converter())
    assert (tmp_path / "ours.gguf").read_bytes() == (tmp_path / "theirs.gguf").read_bytes()


@pytest.mark.slow
def test_an_unknown_architecture_is_refused_in_the_converters_words(tmp_path: Path) -> None:
    base = tiny.make("3.x-dense", tmp_path / "base")
    config = json.loads((base / "config.json").read_text())
    (base / "config.json").write_text(json.dumps({**config, "architectures": ["NobodyForCausalLM"]}))
    with pytest.raises(EnvironmentFailure, match="converter failed") as caught:
        gguf._run_converter(base, tmp_path / "ours.gguf", "m")
    assert "NobodyForCausalLM is not supported" in caught.value.evidence


def test_the_processes_import_nothing_of_the_product() -> None:
    """Each would pay for it at every conversion and probe."""
    code = "import sys, training.export.llamacpp; print([m for m in sys.modules if m.split('.')[0] in ('pipeline', 'torch', 'numpy')])"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"
