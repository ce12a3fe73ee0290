"""Several LoRA adapters in one vLLM: read, checked against each other and the base, and turned into rank, slots and memory."""

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

from pipeline.errors import InputError, ModelError
from pipeline.model.shape import Shape
from pipeline.planning.plan import Adapter, Plan, Request, Setting
from pipeline.runs.files import read_json
from pipeline.runs.folder import RunFolder

# vllm/config/lora.py 0.32: the ranks --max-lora-rank takes
RANKS = (1, 8, 16, 32, 64, 128, 256, 320, 512)
# adapters that are computed together in one step; more than this wait in RAM, which costs a copy when they are asked for
_MOST_SLOTS = 8


def parse(text: str, output: Path) -> list[Adapter]:
    """``a=run,b=path/to/adapter``: each name with a run of ``output`` or an adapter folder; InputError for anything else."""
    found = []
    for word in filter(None, (part.strip() for part in text.split(","))):
        name, equals, where = word.partition("=")
        if not equals or not name or not where:
            example = "for example a=generic,b=path/to/adapter"
            raise InputError(f"--adapters {word!r} is not NAME=RUN or NAME=FOLDER", remedy=example)
        folder = Path(where)
        found.append(read(name, folder if (folder / "adapter_config.json").is_file() else RunFolder(where, output).adapter))
    names = [adapter.name for adapter in found]
    twice = next((name for name in names if names.count(name) > 1), None)
    if twice or not found:
        raise InputError(f"adapter name {twice!r} is given twice" if twice else "--adapters names no adapter")
    if len({adapter.base for adapter in found}) > 1:
        lines = "\n".join(f"{adapter.name}: {adapter.base}" for adapter in found)
        raise InputError("the adapters were trained on different base models, one server has one", evidence=lines)
    return found


def read(name: str, folder: Path) -> Adapter:
    """Read adapter_config.json; ModelError when the folder is no LoRA adapter that vLLM serves."""
    path = folder / "adapter_config.json"
    if not path.is_file():
        what = "was fine-tuned as a whole, so there is no adapter" if (folder / "config.json").is_file() else "has no adapter"
        raise ModelError(f"{folder} {what}", remedy="serve its merged folder, or train with --method lora")
    config = read_json(path)
    try:
        kind, rank, targets = str(config["peft_type"]), int(config["r"]), tuple(sorted(config["target_modules"]))
        base = str(config["base_model_name_or_path"])
    except (KeyError, TypeError, ValueError) as error:
        raise ModelError(f"{path} is not a LoRA adapter's configuration ({error!r})") from None
    if kind != "LORA" or config.get("use_dora") or config.get("modules_to_save"):
        what = f"{folder}: vLLM serves plain LoRA adapters, not {kind} with DoRA or whole modules"
        raise ModelError(what, remedy="serve its merged folder")
    if not 1 <= rank <= RANKS[-1]:
        raise ModelError(f"{folder}: rank {rank} is beyond vLLM's {RANKS[-1]}", remedy="serve its merged folder")
    return Adapter(name, folder, rank, targets, base)


def base_folder(adapters: Sequence[Adapter], given: Path | None) -> Path:
    """The base model all adapters sit on: ``given``, else the folder that they name; InputError when it is not here."""
    base = given or Path(adapters[0].base)
    if not (base / "config.json").is_file():
        remedy = "give it with --model; it is the base, not a merged folder"
        raise InputError(f"the adapters' base model {base} is not a folder here", remedy=remedy)
    return base


def planned_rank(adapters: Sequence[Adapter]) -> int:
    """The smallest rank vLLM allows that holds every adapter."""
    return next(rank for rank in RANKS if rank >= max(adapter.rank for adapter in adapters))


def slots_gib(shape: Shape, rank: int, slots: int, element: float) -> float:
    """GiB that vLLM reserves: for each slot, A (rank x in) and B (out x rank) of attention and feed-forward projections."""
    q, kv = shape.heads * shape.head_dim, shape.kv_heads * shape.head_dim
    attention = (shape.hidden + q) + 2 * (shape.hidden + kv) + (q + shape.hidden)
    feed_forward = 3 * (shape.hidden + shape.intermediate)
    widths = shape.attention_layers * attention + shape.layers * feed_forward
    return slots * rank * widths * element / 2**30


def with_adapters(plan: Plan, request: Request) -> Plan:
    """The plan with LoRA switched on: rank, slots and their memory; eager on a CPU, where LoRA rules compiling out."""
    if not request.adapters:
        return plan
    rank, slots = planned_rank(request.adapters), min(len(request.adapters), _MOST_SLOTS)
    most = max(adapter.rank for adapter in request.adapters)
    settings = [
        Setting("--enable-lora", None, f"{len(request.adapters)} adapters share one base model"),
        Setting("--max-lora-rank", str(rank), f"the largest adapter has rank {most}; vLLM allows {', '.join(map(str, RANKS))}"),
        Setting("--max-loras", str(slots), "adapters computed together in one step"),
    ]
    if len(request.adapters) > slots:
        settings.append(Setting("--max-cpu-loras", str(len(request.adapters)), "the others wait in RAM"))
    names = {flag.name for flag in plan.flags}
    if not request.hardware.gpus and "--enforce-eager" not in names:
        settings.append(Setting("--enforce-eager", None, "vLLM's CPU build does not compile with LoRA"))
    element = 4.0 if plan.dtype == "float32" else 2.0
    added = slots_gib(request.model.shape, rank, slots, element)
    memory = replace(plan.memory, overhead=plan.memory.overhead + added)
    short = memory.total > memory.available
    why = f"the adapters' slots take {added:.2f} GiB more: {memory.total:.1f} of {memory.available:.1f} GiB"
    flags = (*plan.flags, *(s for s in settings if s.name not in names))
    warnings = (*plan.warnings, why) if short else plan.warnings
    return replace(plan, flags=flags, memory=memory, feasible=plan.feasible and not short, warnings=warnings)
