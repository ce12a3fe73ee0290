"""``granite-pipeline hardware`` and ``granite-pipeline plan``: what this machine is, and how a model would be served on it."""

import shlex
from collections.abc import Sequence
from pathlib import Path
from typing import Annotated, Any, cast, get_args

from rich.text import Text
from typer import Argument, Option

from pipeline import config, engines
from pipeline.commands import options, show
from pipeline.engines.base import Engine, Launch
from pipeline.engines.flags import require_known_flags
from pipeline.errors import InputError
from pipeline.machine.named import hardware_from
from pipeline.model.model import Model
from pipeline.net.chat import SAMPLING
from pipeline.planning.nodes import HEAD, placed
from pipeline.planning.plan import Purpose, Request
from pipeline.runs.folder import DEFAULT_OUTPUT


def hardware(machine: options.Hardware = None, as_json: options.AsJson = False) -> None:
    """Show what may really be used here: cores, instruction sets, RAM, disk and GPUs.

    Cores and RAM respect affinity and container limits. The JSON object is what `plan --hardware` reads.

    Examples:
      granite-pipeline hardware --json > machine.json
      granite-pipeline hardware --hardware 2xa10g
    """
    here = hardware_from(machine)
    if as_json:
        show.as_json(here.to_json())
        return
    cpu = here.cpu
    bfloat16 = "bfloat16 in hardware" if cpu.fast_bfloat16 else "no fast bfloat16"
    rows = [
        ("CPU", f"{cpu.name or 'CPU'}, {cpu.cores} usable cores, {cpu.numa_nodes} NUMA node(s)"),
        ("instruction sets", f"{', '.join(cpu.isa) or 'none known'} ({bfloat16})"),
        ("RAM", f"{here.ram_free_gib:.1f} of {here.ram_gib:.1f} GiB available"),
        ("disk", f"{here.disk_free_gib:.1f} GiB free"),
    ]
    for gpu in here.gpus:
        capability = f", compute capability {gpu.compute_capability}" if gpu.compute_capability else ""
        rows.append(("GPU", f"{gpu.name}, {gpu.free_gib:.1f} of {gpu.memory_gib:.1f} GiB free{capability}"))
    rows += [] if here.gpus else [("GPU", "none")]
    rows += [("driver", f"{here.driver}{f', CUDA {here.cuda}' if here.cuda else ''}")] if here.driver else []
    show.table(f"machine: {here.name}", ("", ""), [*rows, *(("note", note) for note in here.notes)])


def plan(
    engine: Annotated[str, Argument(help="vllm, llamacpp, ollama, sglang or openai.")] = "",
    engine_option: Annotated[str, Option("--engine", help="The same.")] = "",
    run: options.SomeRun = None,
    model: options.ModelPath = None,
    model_shape: Annotated[str | None, Option(help="Plan for a published model by name, e.g. granite-4.1-8b.")] = None,
    machine: options.Hardware = None,
    nodes: options.Nodes = 1,
    master_addr: Annotated[str, Option(help="With --nodes: address of the first machine.")] = HEAD,
    purpose: options.Purposed = "serve",
    setting: options.Set = None,
    check: Annotated[bool, Option("--check", help="Ask the installed engine whether it knows every flag.")] = False,
    output: options.Output = DEFAULT_OUTPUT,
    agent: options.Agent = None,
    as_json: options.AsJson = False,
) -> None:
    """Choose an engine's flags for a model, a machine and a purpose - with a reason each and the memory they will take.

    Nothing is started. --set takes what serve takes. For a model here, on this machine, the documented variables hold as in serve. A model that does not fit
    is refused with the numbers and the nearest things that do fit.
    The exit code is 0 for a refusal too: it is in the plan ("feasible"). With --nodes one model is spread over several
    machines, and "ranks" has the command line and environment of each; refused where one machine holds it.

    Examples:
      granite-pipeline plan vllm --run generic
      granite-pipeline plan --engine vllm --model-shape granite-4.1-8b --hardware rtx4060
      granite-pipeline plan --engine llamacpp --gguf model.gguf --set parallel=2 --set ctx-size=32k --json
      granite-pipeline plan --engine vllm --run generic --set enforce-eager --set max-model-len=auto
    """
    if engine and engine_option not in ("", engine):
        raise InputError(f"the engine is {engine}, --engine says {engine_option}", remedy="give one of the two")
    run, engine, _ = options.chosen(agent, run, engine or engine_option)
    if not engine:
        raise InputError("no engine is named", remedy=f"granite-pipeline plan ENGINE, one of {', '.join(engines.NAMES)}")
    chosen = engines.get(engine)
    if nodes > 1:
        chosen.require_nodes()
    options.require_known("purpose", purpose, get_args(Purpose))
    source, name = _model(chosen, run, model, model_shape, output)
    given = options.overrides(setting)
    # as serve does; what is set for this machine's servers says nothing of another machine or a model that is not here
    if machine is None and model_shape is None:
        settings = config.load()
        name = settings.address(chosen.name).model or name
        given = {**settings.overrides(chosen.name), **given}
    sampling = SAMPLING if model is None and model_shape is None else {}
    request = Request(source, hardware_from(machine, output), cast(Purpose, purpose), name, given, sampling=sampling, nodes=nodes)
    made = chosen.plan(request)
    if check and made.feasible:
        require_known_flags(chosen, made)
    launches = list[Launch]()
    if made.feasible and chosen.default_port:
        where: dict[str, Any] = {"host": "127.0.0.1", "port": chosen.default_port}
        launches = [chosen.rank(made, request, node, **where) for node in placed(nodes, master_addr)] if nodes > 1 else []
        launches = launches or [chosen.launch(made, request, **where)]
    argv = list(launches[0].argv) if launches else []
    described = made.to_json(argv) | {"model": source.name, "machine": request.hardware.name, "purpose": purpose}
    if nodes > 1:
        described["ranks"] = [{"argv": list(launch.argv), "env": dict(launch.env)} for launch in launches]
    if as_json:
        show.as_json(described)
    else:
        _show(described, launches)


def _model(engine: Engine, run: str | None, path: Path | None, shape: str | None, output: Path) -> tuple[Model, str]:
    """The model to plan for and the name it is served under."""
    if sum(value is not None for value in (run, path, shape)) > 1:
        raise InputError("give only one of --run, --model and --model-shape")
    if shape is not None or path is not None:
        model = Model.from_shape(shape) if shape is not None else Model.open(cast(Path, path))
        return model, model.name
    folder = options.folder(None, run, output)
    artefact = engine.artefact(folder) or folder.merged
    if not artefact.exists():
        raise InputError(f"run {folder.name} has no {artefact.name}", remedy=f"granite-pipeline export --run {folder.name}")
    return Model.open(artefact), folder.name


def _show(plan: dict[str, Any], launches: Sequence[Launch]) -> None:
    verdict = "fits" if plan["feasible"] else "does not fit"
    machine = plan["machine"] if plan["nodes"] == 1 else f"{plan['nodes']} nodes of {plan['machine']}"
    title = f"{plan['engine']}: {plan['model']} on {machine}, purpose {plan['purpose']} - {verdict}"
    if plan["feasible"]:
        styles = {"planned": ""}  # what somebody set stands out
        rows = [(r["flag"], r["value"], Text(r["reason"], styles.get(r["source"], "yellow"))) for r in plan["reasons"]]
        show.table(title, ("setting", "value", "reason"), rows)
    else:
        show.line(title, style="bold red")
    heads = [name.replace("_", " ") for name in plan["memory_gib"]]
    show.table("predicted memory, GiB per device", heads, [[f"{value:.2f}" for value in plan["memory_gib"].values()]])
    facts = f"dtype {plan['dtype']}, quantization {plan['quantization'] or 'none'}, tensor parallel {plan['tensor_parallel']}"
    facts += f", pipeline parallel {plan['pipeline_parallel']}" if plan["nodes"] > 1 else ""
    show.line(f"{facts}, context {plan['max_model_len']}, {plan['max_num_seqs']} requests at once")
    for label, style in (("warnings", "yellow"), ("alternatives", "cyan")):
        for text in plan[label]:
            show.line(f"{label.removesuffix('s')}: {text}", style=style)
    for rank, launch in enumerate(launches):
        if len(launches) > 1:
            show.line(f"node {rank}: granite-pipeline serve --nodes starts it, or", style="bold")
        show.line(" ".join([*(f"{key}={shlex.quote(value)}" for key, value in launch.env.items()), shlex.join(launch.argv)]))
