"""``granite-pipeline hardware`` and ``granite-pipeline plan``: what this machine is, and how a model would be served on it."""

from __future__ import annotations

import json
import shlex
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, cast, get_args

import typer
from rich.console import Console
from rich.markup import escape
from rich.table import Table

from pipeline.errors import InputError
from pipeline.runs.folder import DEFAULT_NAME, DEFAULT_OUTPUT, RunFolder

if TYPE_CHECKING:
    from pipeline.engines.base import Engine
    from pipeline.model.model import Model

MachineOption = Annotated[
    str | None,
    typer.Option(
        "--hardware",
        metavar="NAME|FILE.json|JSON",
        help="Another machine: rtx4060, l4, 2xa10g, h100, cpu-2c-24g, cpu-16c-64g-bf16, ..., a JSON file or inline JSON.",
    ),
]


def register(app: typer.Typer) -> None:
    """Add the ``hardware`` and ``plan`` verbs."""
    app.command("hardware")(hardware)
    app.command("plan")(plan)


def hardware(
    machine: MachineOption = None, as_json: Annotated[bool, typer.Option("--json", help="Print one JSON object.")] = False
) -> None:
    """Show what may really be used here: cores, instruction sets, RAM, disk and GPUs.

    Cores and RAM respect affinity and container limits. The JSON object is what `plan --hardware` reads.

    Examples:
      granite-pipeline hardware --json > machine.json
      granite-pipeline hardware --hardware 2xa10g
    """
    from pipeline.machine.named import hardware_from

    found = hardware_from(machine)
    if as_json:
        typer.echo(json.dumps(found.to_json(), indent=2))
        return
    cpu = found.cpu
    table = Table("what", "here", title=f"machine: {found.name}", show_header=False)
    bfloat16 = "bfloat16 in hardware" if cpu.fast_bfloat16 else "no fast bfloat16"
    table.add_row("CPU", escape(f"{cpu.name or 'CPU'}, {cpu.cores} usable cores, {cpu.numa_nodes} NUMA node(s)"))
    table.add_row("instruction sets", f"{', '.join(cpu.isa) or 'none known'} ({bfloat16})")
    table.add_row("RAM", f"{found.ram_free_gib:.1f} of {found.ram_gib:.1f} GiB available")
    table.add_row("disk", f"{found.disk_free_gib:.1f} GiB free")
    for gpu in found.gpus:
        capability = f", compute capability {gpu.compute_capability}" if gpu.compute_capability else ""
        table.add_row("GPU", escape(f"{gpu.name}, {gpu.free_gib:.1f} of {gpu.memory_gib:.1f} GiB free{capability}"))
    if not found.gpus:
        table.add_row("GPU", "none")
    if found.driver:
        table.add_row("driver", f"{found.driver}{f', CUDA {found.cuda}' if found.cuda else ''}")
    for note in found.notes:
        table.add_row("note", escape(note))
    Console().print(table)


def plan(
    engine: Annotated[str, typer.Option("--engine", help="vllm, llamacpp, ollama, sglang or openai.")],
    run: Annotated[str | None, typer.Option("--run", "--name", help="Plan for what this run exported.")] = None,
    model: Annotated[Path | None, typer.Option("--model", "--gguf", help="Plan for this model folder or GGUF file.")] = None,
    model_shape: Annotated[
        str | None, typer.Option("--model-shape", help="Plan for a published model by name, e.g. granite-4.1-8b.")
    ] = None,
    machine: MachineOption = None,
    purpose: Annotated[str, typer.Option("--purpose", help="verify (fast start), serve, throughput or latency.")] = "serve",
    setting: Annotated[list[str] | None, typer.Option("--set", metavar="KEY=VALUE", help="Your own value. Repeatable.")] = None,
    check: Annotated[bool, typer.Option("--check", help="Ask the installed engine whether it knows every flag.")] = False,
    output: Annotated[Path, typer.Option("--output", help="Folder that holds the runs.")] = DEFAULT_OUTPUT,
    as_json: Annotated[bool, typer.Option("--json", help="Print one JSON object.")] = False,
) -> None:
    """Choose an engine's flags for a model, a machine and a purpose - with a reason each and the memory they will take.

    Nothing is started. For a model here, on this machine, the documented variables hold as in serve. A model that does not fit is refused with the numbers and the nearest things that do fit.
    The exit code is 0 for a refusal too: it is in the plan ("feasible").

    Examples:
      granite-pipeline plan --engine vllm --run generic
      granite-pipeline plan --engine vllm --model-shape granite-4.1-8b --hardware rtx4060
      granite-pipeline plan --engine llamacpp --gguf model.gguf --set parallel=2 --json
    """
    from pipeline import engines
    from pipeline.config import load
    from pipeline.engines.flags import require_known_flags
    from pipeline.machine.named import hardware_from
    from pipeline.planning.plan import Purpose, Request

    chosen = engines.get(engine)
    if purpose not in get_args(Purpose):
        raise InputError(f"no purpose {purpose!r}", remedy="use " + ", ".join(get_args(Purpose)))
    source, name = _model(chosen, (run, model, model_shape), output)
    overrides = dict(_pair(text) for text in setting or [])
    # as serve does; what is set for this machine's servers says nothing of another machine or a model that is not here
    if machine is None and model_shape is None:
        settings = load()
        name = settings.served_name(chosen.name) or name
        overrides = {**settings.overrides(chosen.name), **overrides}
    request = Request(source, hardware_from(machine, output), cast(Purpose, purpose), name, overrides)
    made = chosen.plan(request)
    if check and made.feasible:
        require_known_flags(chosen, made)
    argv: list[str] = []
    if made.feasible and chosen.default_port:
        argv = list(chosen.launch(made, request, host="127.0.0.1", port=chosen.default_port).argv)
    described = made.to_json(argv) | {"model": source.name, "machine": request.hardware.name, "purpose": purpose}
    if as_json:
        typer.echo(json.dumps(described, indent=2))
    else:
        _show(described, argv)


def _model(engine: Engine, given: tuple[str | None, Path | None, str | None], output: Path) -> tuple[Model, str]:
    """The model to plan for and the name it is served under."""
    from pipeline.model.model import Model

    run, path, shape = given
    if sum(value is not None for value in given) > 1:
        raise InputError("give only one of --run, --model and --model-shape")
    if shape is not None:
        found = Model.from_shape(shape)
        return found, found.name
    if path is not None:
        found = Model.open(path)
        return found, found.name
    folder = RunFolder(run or DEFAULT_NAME, output)
    artefact = engine.artefact(folder) or folder.merged
    if not artefact.exists():
        raise InputError(f"run {folder.name} has no {artefact.name}", remedy=f"granite-pipeline export --run {folder.name}")
    return Model.open(artefact), folder.name


def _pair(text: str) -> tuple[str, str]:
    key, separator, value = text.partition("=")
    if not separator or not key.strip():
        raise InputError(f"--set {text!r} is not KEY=VALUE", remedy="for example --set max_model_len=4096")
    return key.strip(), value


def _show(plan: dict[str, Any], argv: list[str]) -> None:
    console = Console()
    verdict = "fits" if plan["feasible"] else "does not fit"
    title = f"{plan['engine']}: {plan['model']} on {plan['machine']}, purpose {plan['purpose']} - {verdict}"
    if plan["feasible"]:
        settings = Table(title=escape(title))
        settings.add_column("setting", no_wrap=True)
        settings.add_column("value", overflow="fold")
        settings.add_column("reason")
        for row in plan["reasons"]:
            value = "" if row["value"] is None else str(row["value"])
            reason = row["reason"] if row["source"] == "planned" else f"[yellow]{row['reason']}[/yellow]"
            settings.add_row(escape(row["flag"]), escape(value), reason if row["source"] == "user" else escape(reason))
        console.print(settings)
    else:
        console.print(escape(title), style="bold red")
    memory = Table(*(name.replace("_", " ") for name in plan["memory_gib"]), title="predicted memory, GiB per device")
    memory.add_row(*(f"{value:.2f}" for value in plan["memory_gib"].values()))
    console.print(memory)
    facts = f"dtype {plan['dtype']}, quantization {plan['quantization'] or 'none'}, tensor parallel {plan['tensor_parallel']}"
    console.print(f"{facts}, context {plan['max_model_len']}, {plan['max_num_seqs']} requests at once", soft_wrap=True)
    for label, style in (("warnings", "yellow"), ("alternatives", "cyan")):
        for text in plan[label]:
            console.print(f"{label.removesuffix('s')}: {escape(text)}", style=style, soft_wrap=True)
    if argv:
        words = [f"{key}={shlex.quote(value)}" for key, value in plan["env"].items()]
        console.print(escape(" ".join([*words, shlex.join(argv)])), soft_wrap=True, highlight=False)
