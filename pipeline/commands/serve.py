"""``serve`` and ``status``: servers for a run."""

import os
import re
import time
from dataclasses import replace
from pathlib import Path
from typing import Annotated, cast, get_args

from typer import Argument, Option

from pipeline import config, engines
from pipeline.commands import options, show
from pipeline.engines.base import Engine
from pipeline.engines.vllm.lora import base_folder, parse
from pipeline.errors import EnvironmentFailure, InputError
from pipeline.machine.hardware import Hardware
from pipeline.machine.named import hardware_from
from pipeline.net.loopback import towards
from pipeline.planning.plan import Node, Purpose
from pipeline.runs.folder import DEFAULT_NAME, DEFAULT_OUTPUT, RunFolder
from pipeline.serve import backends, records, server, start
from pipeline.serve.start import Endpoint, Options, Target


def serve(
    engine: Annotated[str, Argument(help="vllm, llamacpp, ollama or sglang; default: LLM_BACKEND.")] = "",
    run: options.Run = DEFAULT_NAME,
    output: options.Output = DEFAULT_OUTPUT,
    model: options.ModelPath = None,
    name: options.ServedName = None,
    host: options.Host = start.LOOPBACK,
    port: Annotated[int | None, Option(help="Port; 0 picks a free one. Default: the engine's documented one.")] = None,
    purpose: options.Purposed = "serve",
    setting: options.Set = None,
    adapters: Annotated[
        str | None, Option(metavar="NAME=RUN,...", help="vLLM only: serve these LoRA adapters on their base model.")
    ] = None,
    nodes: options.Nodes = 1,
    node_rank: Annotated[int, Option(min=0, help="With --nodes: which this machine is; 0 answers clients.")] = 0,
    master_addr: Annotated[str, Option(help="With --nodes: address of machine 0, as all others reach it.")] = "",
    machine: options.Hardware = None,
    detach: options.Detach = False,
    replace_model: Annotated[
        bool,
        Option("--replace", help="In an Ollama that runs already: replace a model of that name that was not made from here."),
    ] = False,
    remote_ok: options.RemoteOk = False,
    agent: options.Agent = None,
) -> None:
    """Serve a run (or any model) with flags planned for this machine, each with its reason.

    Runs in the foreground until Ctrl-C; with --detach it returns once the first token has come, and
    granite-pipeline stop ends it. A start that fails for a reason one changed setting may mend (a KV cache that does not
    fit, a failed compilation, memory) is tried again, at most three times, with the reason; your --set is never changed.
    An Ollama that already answers at OLLAMA_BASE_URL or OLLAMA_HOST is used as it is: the model is made in it, unless --port is
    given. One that is started here keeps its models in the run folder, and they go with it.

    With --nodes one model is held by several machines; the same command with another --node-rank starts each one's part, all
    with the flags planned for the same --hardware. It is refused where one machine holds the model.

    Examples:
      granite-pipeline serve vllm
      granite-pipeline serve llamacpp --run mine --port 0 --detach
      granite-pipeline serve vllm --model path/to/merged_fp16 --set max-model-len=32k --set enforce-eager
      granite-pipeline serve vllm --adapters triage=generic,summary=other
      granite-pipeline serve vllm --nodes 2 --node-rank 1 --master-addr 10.0.0.1 --hardware 2xl4
    """
    options.allow_remote(remote_ok)
    settings = config.load()
    run, engine, name = options.chosen(agent, run, engine, name)
    chosen, this = engines.get(engine or settings.llm_backend), RunFolder(run, output)
    if adapters is not None and not chosen.serves_adapters:
        raise InputError(f"{chosen.name} does not serve adapters here", remedy="use vllm, or serve the merged model")
    loras = () if adapters is None else tuple(parse(adapters, output))
    if loras:  # the base model under its own name; logs and records stay in the run's folder
        base = base_folder(loras, model)
        target = Target(base, name or base.name, this.path)
    else:
        target = _target(this, chosen, model, name, settings)
    target = replace(target, key=settings.key(chosen.name))
    given = {**settings.overrides(chosen.name), **options.overrides(setting)}
    options.require_known("purpose", purpose, get_args(Purpose))
    listens = chosen.default_port if port is None else port
    how = Options(cast(Purpose, purpose), host, listens, None if detach else os.getpid(), None, given, loras)
    how = replace(how, replace=replace_model, remote_ok=settings.remote_ok(chosen.name))
    how = replace(how, node=_node(chosen, nodes, node_rank, master_addr), hardware=_every_node(machine, nodes))
    if how.node and how.node.rank:
        _join(chosen.name, target, how, detach=detach)
        return
    # on Linux Ollama is a system service that holds its port; one that runs is used, unless another port is asked for
    mine = not chosen.creates_model or port is not None or host != start.LOOPBACK
    there = None if mine else _there(chosen, settings)
    run_server(chosen.name, target, how, there, detach=detach)


def _node(engine: Engine, nodes: int, rank: int, master: str) -> Node | None:
    """This machine's place among several; None for one alone."""
    if nodes == 1:
        if rank or master:
            raise InputError("--node-rank and --master-addr are for one model on several machines", remedy="add --nodes")
        return None
    engine.require_nodes()
    if rank >= nodes:
        raise InputError(f"--node-rank {rank}: {nodes} nodes have ranks 0 to {nodes - 1}")
    if not master:
        raise InputError("--nodes needs the address of machine 0", remedy="add --master-addr, the same on every machine")
    return Node(rank, nodes, master, *towards(master))


def _every_node(machine: str | None, nodes: int) -> Hardware | None:
    """What every node is said to be, so that all plan alike."""
    if machine is None:
        return None
    if nodes == 1:
        raise InputError("serve plans for this machine", remedy="leave --hardware out, or add --nodes")
    return hardware_from(machine)


def _join(engine: str, target: Target, how: Options, *, detach: bool) -> None:
    """Run a headless node in the foreground until interrupted, or (``detach``) leave it running."""
    with show.progress(f"starting {engine}") as progress:
        process = start.join(engine, target, how, progress)
    folder = process.log.parents[1]
    show.line(f"it is up when machine 0 is; granite-pipeline stop --run {folder.name} ends it", err=True)
    if not detach:
        attend(process, folder / "servers")


def _there(engine: Engine, settings: config.Settings) -> Endpoint | None:
    """The server to make the model in, if one runs; EnvironmentFailure when one that is meant cannot be used, and none be started."""
    there, seen = backends.look(engine, settings)
    if there is None and (seen.there or settings.named_servers(engine.name)):
        if not engine.available().usable:
            raise EnvironmentFailure(seen.reason, remedy=seen.remedy)
        show.line(f"{seen.reason}; one is started from here", err=True, style="yellow")
    return there


def run_server(engine: str, target: Target, how: Options, there: Endpoint | None = None, *, detach: bool) -> None:
    """Serve in the foreground until interrupted, or (``detach``) leave the server running; in ``there`` where one already runs."""
    with show.progress(f"starting {engine}") as progress:
        endpoint = backends.bring_up(engine, target, how, progress, there)
    _ready(endpoint)
    served = engines.get(engine)
    if target.manifest.is_file() and not served.default_flags(served.sampling):
        show.line(f"clients of {endpoint.url}/v1: {served.to_clients()}", err=True)
    if endpoint.server is None:
        there_already = (
            f"made in the Ollama that already runs at {endpoint.url}; it goes on running (--port 0 starts another one)"
        )
        show.line(there_already, err=True)
    elif not detach:
        attend(endpoint.server, target.servers)


def attend(process: server.Server, folder: Path) -> None:
    """Stay beside a server until Ctrl-C, and stop it then; EngineError when it dies first."""
    try:
        while process.alive:
            time.sleep(0.5)
        raise server.failure(process, "died while serving")
    except KeyboardInterrupt:
        show.line("stopping", err=True)
    finally:
        records.end(process, folder)


def _ready(endpoint: Endpoint) -> None:
    """Print the flags with their reasons, and how to talk to the endpoint."""
    reasons = (endpoint.plan or {}).get("reasons", [])
    rows = [(reason["flag"], reason["value"] or "", reason["source"], reason["reason"]) for reason in reasons]
    show.table(f"{endpoint.engine} {endpoint.version or ''}", ("setting", "value", "source", "reason"), rows, err=True)
    show.line(f"ready after {endpoint.ready_seconds:.0f} s: {endpoint.url}/v1, model {endpoint.model}", err=True)


def status(
    run: options.Run = DEFAULT_NAME,
    output: options.Output = DEFAULT_OUTPUT,
    agent: options.Agent = None,
    as_json: options.AsJson = False,
) -> None:
    """Show which servers of a run are up and whether each answers.

    Example: granite-pipeline status --run mine --json
    """
    this = options.folder(agent, run, output)
    rows, table = [], []
    for s in records.running(this.servers):
        healthy = start.reachable(s.url + s.ready_path)
        rows.append({"backend": s.engine, "url": s.url, "model": s.model, "pid": s.pid, "healthy": healthy, "log": str(s.log)})
        table.append((s.engine, s.url, s.model, "yes" if healthy else "no", f"{s.memory_gib():.2f}"))
    if as_json:
        show.as_json({"run": this.name, "servers": rows})
    elif rows:
        show.table(f"servers of run {this.name}", ("backend", "url", "model", "healthy", "memory, GiB"), table)
    else:
        show.line(f"no server of run {this.name} is running")


def _target(run: RunFolder, engine: Engine, model: Path | None, name: str | None, settings: config.Settings) -> Target:
    served = name or settings.address(engine.name).model or run.name
    if model is None:
        return Target.of_run(run, engine.name, served)
    if not model.exists():
        raise InputError(f"{model}: no such file or folder", remedy="give a model folder or a .gguf file")
    modelfile = model.parent / "Modelfile"
    # a model inside a run belongs to it; for any other, a folder of its name beside the runs, where ps and stop look
    inside = model.resolve().parent.parent == run.output.resolve()
    own = re.sub(r"[^A-Za-z0-9._-]", "-", model.resolve().stem if model.is_file() else model.resolve().name)
    folder = model.parent if inside else run.output / (own.lstrip("._-")[:64] or "model")
    return Target(model, served, folder, modelfile if engine.creates_model else None)
