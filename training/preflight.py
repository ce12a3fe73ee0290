"""What the stages after training will ask, asked before it: nothing known at the start may end a run hours later."""

import logging
import tempfile
import time
from dataclasses import dataclass, replace
from pathlib import Path

from pipeline.errors import MissingDependency, ModelError, OutOfMemory
from pipeline.machine.hardware import Hardware
from pipeline.model.safetensors import read_folder
from pipeline.modelfile.modelfile import build_modelfile
from pipeline.prompts.chat import ChatTemplate
from pipeline.runs.files import require_free_space, write_json
from pipeline.runs.folder import RunFolder
from pipeline.runs.hashes import sha256_json, sha256_tree
from training import base_check, memory
from training.base import BaseModel
from training.export import gguf
from training.export.weights import save_config, save_tokenizer
from training.memory import GIB, Need
from training.parameters import FinetuneParameters
from training.tuning import distributed

log = logging.getLogger(__name__)
_RECIPE = 1
# of a merged float16 weight: 32 of them are 64 bytes there and 34 in Q8_0
_Q8_SHARE = 34 / 64
_SMALLER = "use a smaller base, free memory, or work on a machine with more"


@dataclass(frozen=True)
class Stage:
    """A stage's need of memory, the advice when it does not fit, and whether the line can be finished without it."""

    name: str
    need: Need
    lower: str
    optional: bool = False


def ask(run: RunFolder, base: BaseModel, params: FinetuneParameters, *, exports: bool = True) -> None:
    """Check base, disk, memory, tokenizer, stops, converter and template in seconds, a line of log each.

    Without ``exports`` what comes after training may be done on another machine: that it does not fit this one is a warning.
    Raises ModelError for a base that cannot be trained or exported, DiskFull and OutOfMemory for a stage that surely cannot
    fit, EnvironmentFailure when the converter refuses the vocabulary. What only export needs and is not installed is a warning.
    """
    started = time.monotonic()
    base_check.require_whole(base.folder)
    log.info("preflight: base: every tensor of %s is where its config says, every token has an embedding", base.id)
    _require_disk(run, base.folder, params)
    _require_memory(base.folder, params, exports=exports)
    run.path.mkdir(parents=True, exist_ok=True)
    # named as the writers' scratch is, so that what a kill leaves is swept with it
    with tempfile.TemporaryDirectory(prefix=".preflight.", dir=run.path) as scratch:
        _ask_export(base.folder, Path(scratch), run.base_cache)
    log.info("preflight: done in %.1f s", time.monotonic() - started)


def disk_need(base: Path, params: FinetuneParameters) -> int:
    """Bytes that a run takes at least, from first checkpoint to GGUF: an estimate on the low side, from the headers."""
    tensors = read_folder(base)
    elements = sum(t.elements for t in tensors)
    linear = [t.shape for t in tensors if len(t.shape) == 2 and ".layers." in t.name and "router" not in t.name]
    trained = elements if params.method == "full" else params.rank * sum(sum(shape) for shape in linear)
    # weights and Adam's two moments in each of three checkpoints, which are gone before the export begins; 16 bits at least
    return max(2 * trained * 10, 2 * trained + int(2 * elements * (1 + _Q8_SHARE)))


def memory_needs(base: Path, params: FinetuneParameters, on_gpu: bool) -> list[Stage]:
    """What each stage needs at least; fine-tuning with rows of one token, for none is tokenized yet."""
    lower = "lower --batch-size (and raise --gradient-accumulation) or --max-length, or use a smaller base"
    return [
        Stage("fine-tuning", memory.finetune_need(base, params, 1), lower),
        Stage("merge", memory.merge_need(), _SMALLER),
        Stage("GGUF conversion", memory.gguf_need(base), _SMALLER),
        Stage("answering the held-out prompts", memory.evaluate_need(base, on_gpu, mapped=not on_gpu), _SMALLER),
        Stage("certify", memory.evaluate_need(base, on_gpu=False), "certify --offline loads no model", optional=True),
    ]


def _require_disk(run: RunFolder, base: Path, params: FinetuneParameters) -> None:
    needed = disk_need(base, params)
    require_free_space(run.path, needed, "the whole run (adapter, checkpoints, merged model and GGUF)")
    log.info("preflight: disk: the run takes %.2f GiB at least, and they are free", needed / GIB)


def _require_memory(base: Path, params: FinetuneParameters, *, exports: bool) -> None:
    """Refuse what surely cannot fit: fine-tuning what is free now, later stages what the machine has at all."""
    machine = Hardware.detect()
    on_gpu = bool(machine.gpus)
    said, plan = [], distributed.planned(params, base, 1, machine)
    for stage in memory_needs(base, params, on_gpu):
        if stage.name == "fine-tuning":
            stage = replace(stage, need=plan.need)
        here = on_gpu and stage.name not in ("merge", "GGUF conversion")
        where = "GPU memory" if here else "memory"
        if stage.name == "fine-tuning":
            had, left = plan.free, "free"
        else:
            had, left = max(gpu.memory_gib for gpu in machine.gpus) if here else machine.ram_gib, "there"
        said.append(f"{stage.name} {stage.need.gib:.1f}")
        if stage.need.gib <= had:
            continue
        what = f"{stage.name} needs at least {stage.need.gib:.1f} GiB of {where} ({stage.need.made_of}), {had:.1f} GiB are {left}"
        if not stage.optional and (exports or stage.name == "fine-tuning"):
            raise OutOfMemory(what, remedy=stage.lower)
        log.warning("preflight: memory: %s; %s", what, stage.lower)
    log.info("preflight: memory: GiB at least: %s", ", ".join(said))


def _ask_export(base: Path, scratch: Path, cache: Path) -> None:
    """Write tokenizer and config as the merge will, and show them to the converter and to the Modelfile's writer."""
    model = scratch / "model"
    model.mkdir()
    save_config(base, model)
    end = save_tokenizer(base, model)
    log.info("preflight: stops: %s (%d) ends a turn, %d repairs", end["end_token"], end["end_token_id"], len(end["repaired"]))
    try:
        gguf.require_packages()
    except MissingDependency as error:
        log.warning("preflight: export: %s; training goes on, export will not (%s)", error.message, error.remedy)
    else:
        _ask_converter(model, scratch, cache)
    try:
        build_modelfile(gguf="./model.gguf", template=ChatTemplate.from_folder(model), parameters={"num_ctx": 2048})
        log.info("preflight: modelfile: a TEMPLATE can be derived from the chat template")
    except ModelError as error:
        log.warning("preflight: modelfile: none will be written, so Ollama will be left out: %s", error)


def _ask_converter(model: Path, scratch: Path, cache: Path) -> None:
    """The converter's vocabulary check, once for each tokenizer, config and converter."""
    known = cache / f"vocabulary-{sha256_json([_RECIPE, sha256_tree(model), gguf.converter_version()])[:16]}.json"
    if not known.is_file():
        gguf.check_vocabulary(model, scratch)
        write_json(known, {"converter": gguf.converter_version()})
    log.info("preflight: vocabulary: %s takes it", gguf.converter_version())
