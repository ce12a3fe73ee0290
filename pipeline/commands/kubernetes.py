"""``kubernetes``: manifests for a cluster. ``check``: whether the bytes that are served are those of a fine-tune."""

import hashlib
import json
import re
import shlex
import time
from collections.abc import Callable, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Annotated, Any

import typer
from typer import Option

from pipeline import config, engines
from pipeline.commands import options, show
from pipeline.deploy.container import RUNS, Object, Storage, contained
from pipeline.deploy.flavours import FLAVOURS, Sweep, sweep_job
from pipeline.deploy.kubernetes import IMAGE, PROMETHEUS, Options, Served, to_yaml
from pipeline.engines.base import Engine
from pipeline.errors import InputError, VerificationFailed
from pipeline.machine.named import hardware_from
from pipeline.planning.plan import Request
from pipeline.runs.files import tree_bytes, write_atomic
from pipeline.runs.folder import DEFAULT_NAME, DEFAULT_OUTPUT, RunFolder
from pipeline.runs.hashes import sha256_file
from pipeline.runs.manifest import Manifest
from pipeline.runs.text import mask
from pipeline.serve.artefacts import changed_files, manifest_hash, of_file
from pipeline.serve.start import Options as Start
from pipeline.serve.start import Target, request_for

_HASH = re.compile(r"[0-9a-f]{64}")
_CHUNK = 1 << 20
# between two lines of progress
_SECONDS = 10.0


def kubernetes(
    ctx: typer.Context,
    run: options.Run = DEFAULT_NAME,
    engine: Annotated[str, Option("--engine", help="vllm, llamacpp, ollama or sglang; default: LLM_BACKEND.")] = "",
    sweep: Annotated[
        Path | None, Option("--sweep", metavar="SPEC.yaml", help="A Job that does a sweep, a pod a run, instead.")
    ] = None,
    flavour: Annotated[str, Option("--flavour", help="deployment, lws (one model over several nodes) or kserve.")] = "",
    machine: options.Hardware = None,
    nodes: options.Nodes = 1,
    replicas: Annotated[
        int | None, Option("--replicas", min=1, help="Copies of the whole model (1); of a sweep, runs at once (all).")
    ] = None,
    max_replicas: Annotated[
        int, Option("--max-replicas", min=0, help="Let KEDA add copies while requests wait, up to these.")
    ] = 0,
    storage: Annotated[
        str, Option("--storage", metavar="pvc://CLAIM[/FOLDER]|image://REF@sha256:...", help="Where the run folder is.")
    ] = "pvc://granite-runs",
    image: Annotated[str, Option("--image", help="This product's own image, which reads the bytes first.")] = IMAGE,
    secret: Annotated[
        str, Option("--secret", help="A Secret with the engine's key, e.g. VLLM_API_KEY; the server then asks for it.")
    ] = "",
    runtime_class: Annotated[str, Option("--runtime-class", help="RuntimeClass of GPU pods, e.g. nvidia on Talos.")] = "",
    prometheus: Annotated[str, Option("--prometheus", help="Where KEDA asks for the queue.")] = PROMETHEUS,
    queue: Annotated[str, Option("--queue", help="Kueue's queue for a sweep.")] = "",
    setting: options.Set = None,
    name: options.ServedName = None,
    output: options.Output = DEFAULT_OUTPUT,
    out: Annotated[Path | None, Option("--out", help="Write to this file instead of stdout.")] = None,
    agent: options.Agent = None,
    as_json: options.AsJson = False,
) -> None:
    """Print Kubernetes manifests that serve a run: the planned flags, and a pod that starts only with the bytes of this fine-tune.

    Nothing is sent to a cluster: kubectl apply -f does that. Names and selectors carry the manifest hash, so one address is one
    fine-tune. A Deployment is what most need (replicas are its scale); lws is refused where one node holds the model. Each pod
    checks the run folder first (granite-pipeline check). Keys come from a Secret; only pods with the label
    granite-pipeline.dev/client: "true" reach the server. docs/scale.md says what a cluster must have.

    Examples:
      granite-pipeline kubernetes --run mine --engine vllm --hardware l4 --replicas 2 > mine.yaml
      granite-pipeline kubernetes --run mine --hardware 2xl4 --nodes 2 --flavour lws --storage pvc://shared/runs > mine.yaml
      granite-pipeline kubernetes --sweep sweep.yaml --replicas 8 --image REGISTRY/granite:1 > job.yaml
      granite-pipeline kubernetes --run mine --hardware l4 --max-replicas 8 --secret llm-keys --runtime-class nvidia > mine.yaml
    """
    place, wanted = Storage.of(storage), Options(replicas or 1, max_replicas, image, secret, runtime_class, prometheus)
    if sweep:
        made, said = _job(sweep, place, wanted, replicas or 0, queue)
    else:
        chosen, target, request = _request(options.chosen(agent, run, engine, name), machine, output, options.overrides(setting))
        if nodes > 1:
            chosen.require_nodes()
        flavour = flavour or ("lws" if nodes > 1 else "deployment")
        options.require_known("flavour", flavour, list(FLAVOURS))
        served = _to_serve(chosen, target, replace(request, nodes=nodes), place, wanted)
        made, said = FLAVOURS[flavour](served), _needs(served, flavour)
    _emit(made, [f"Made by: {mask(_command(ctx))}", *said], out, as_json=as_json)


def _request(
    meant: options.Chosen[str], machine: str | None, output: Path, given: dict[str, str]
) -> tuple[Engine, Target, Request]:
    """The engine, the run's artefact that it serves, and what is asked of a plan: as ``plan`` and ``serve`` ask for this machine."""
    settings = config.load()
    chosen, name = engines.get(meant.engine or settings.llm_backend), meant.model
    if machine is None:
        name, given = name or settings.address(chosen.name).model or None, {**settings.overrides(chosen.name), **given}
    target = Target.of_run(RunFolder(meant.run, output), chosen.name, name)
    return chosen, target, request_for(target, Start("serve", overrides=given), hardware_from(machine, output))


def _to_serve(chosen: Engine, target: Target, request: Request, storage: Storage, wanted: Options) -> Served:
    """The fine-tune with its manifest hash; InputError where the files here are not those on record: no pod would start with them."""
    run, vouched = target.folder.name, of_file(target.model)
    if vouched is None:
        what = f"{target.model} is not what the manifest of run {run} recorded: no pod would start with it"
        raise InputError(what, remedy=f"granite-pipeline export --run {run}")
    return Served(run, vouched.fine_tune, contained(chosen, request, Path(RUNS / run / target.model.name)), storage, wanted)


def _job(file: Path, storage: Storage, wanted: Options, parallel: int, queue: str) -> tuple[list[Object], list[str]]:
    """The Job of a sweep whose spec is read and checked here, and again in each pod, at the claim's root."""
    from pipeline.sweep.spec import load
    from training.parameters import FinetuneParameters

    def check(parameters: Mapping[str, Any]) -> None:
        FinetuneParameters.from_notebook(parameters)

    found = load(file, check)
    one = found.resources
    sweep = Sweep(file.name, sha256_file(file), len(found.runs), one.cpus, one.gpus, one.memory_gib)
    at = "/".join(filter(None, (storage.claim, storage.path, file.name)))
    said = [
        f"Needs: this spec as {at}, with what it names beside it; the image {wanted.image} with what training needs (--image).",
        "A spec that was changed is another Job: make it again.",
    ]
    return [sweep_job(sweep, storage, wanted, parallel, queue)], said


def _command(ctx: typer.Context) -> str:
    """The command that makes the file again, as far as it is not what is taken anyway."""
    words = ["granite-pipeline", str(ctx.info_name)]
    for option in ctx.command.params:
        value = ctx.params.get(str(option.name))
        if value not in (None, option.get_default(ctx)):
            each = value if isinstance(value, list | tuple) else [value]
            words += [word for one in each for word in ([option.opts[0]] if one is True else [option.opts[0], str(one)])]
    return shlex.join(words)


def _needs(served: Served, flavour: str) -> list[str]:
    """What the file is planned for, and what the cluster must have for it."""
    inside, storage, wanted = served.inside, served.storage, served.options
    each = f"{served.gpus} GPU(s) a pod" if served.gpus else "no GPU"
    lines = [
        f"{inside.engine.title} planned for {inside.request.hardware.name}, {each}; change flags with --set, nothing here by hand."
    ]
    place = (
        f"the claim {storage.claim}, its folder {'/'.join(filter(None, (storage.path, served.run)))}"
        if storage.claim
        else f"the image {storage.image} (image volumes: Kubernetes 1.35 or later)"
    )
    lines.append(f"Needs: the run folder in {place}; the image {wanted.image} where its nodes can pull it (--image).")
    more = {
        "lws": "LeaderWorkerSet 0.8 or later (leaderworkerset.x-k8s.io/v1)",
        "kserve": "KServe 0.20 or later (serving.kserve.io/v1alpha2)",
    }
    also = [more[flavour]] if flavour in more else []
    also += [f"the Secret {wanted.secret} with {inside.engine.key_variable}"] if wanted.secret else []
    also += ["KEDA 2.18 or later, and a Prometheus that scrapes the pods"] if wanted.most else []
    also += ["a spare pod's worth of GPUs while something is changed"] if served.gpus and flavour != "kserve" else []
    return [*lines, *([f"Needs too: {'; '.join(also)}."] if also else [])]


def _emit(made: list[Object], head: list[str], out: Path | None, *, as_json: bool) -> None:
    """Manifests as YAML, or as one List in JSON, to stdout or a file; kubectl reads both."""
    text = to_yaml(made, head)
    if as_json:
        text = json.dumps({"apiVersion": "v1", "kind": "List", "items": made}, indent=2) + "\n"
    if out:
        write_atomic(out, text)
        show.line(f"{len(made)} manifests in {out}", err=True)
    else:
        typer.echo(text, nl=False)


def check(
    manifest: Annotated[str, Option("--manifest", metavar="HASH", help="The manifest hash of the fine-tune: 64 hex digits.")],
    run: options.Run = DEFAULT_NAME,
    output: options.Output = DEFAULT_OUTPUT,
    engine: Annotated[str, Option("--engine", help="Only what this engine serves; default: all of the run.")] = "",
    agent: options.Agent = None,
    as_json: options.AsJson = False,
) -> None:
    """Read every byte of what is served of a run and compare it with the run's record, which must be that of a fine-tune.

    Nothing is written and nothing that was read earlier is believed: on Kubernetes this runs before a server starts, on a volume that is
    read only. Exit code 0, or 1 with the name of each file that is changed, missing or not recorded - or when the run is another
    fine-tune -, or 2 for a run or a hash that is none. The gateway tells the hash of what answered in x-granite-manifest.

    Example: granite-pipeline check --run mine --manifest 4f0c... --engine vllm
    """
    if not _HASH.fullmatch(manifest):
        raise InputError(f"--manifest {manifest[:80]!r} is not a manifest hash", remedy="give all 64 hex digits of it")
    folder = options.folder(agent, run, output)
    run = folder.name
    if not folder.manifest.is_file():
        raise InputError(f"there is no run {run} in {output}", remedy=f"granite-pipeline runs --output {output}")
    record = Manifest(folder.manifest)
    names = _served(folder, record, engine)
    size = sum(tree_bytes(folder.path / name) for name in names if (folder.path / name).exists())
    found = [] if (is_now := _fine_tune(record)) == manifest else [f"manifest.json: this run is fine-tune {is_now}"]
    with show.progress(f"reading {size / 2**30:.2f} GiB") as progress:
        read = _Reading(size, progress)
        found += [] if found else [line for name in names for line in changed_files(record, name, read.sha256)]
    if as_json:
        show.as_json({"run": run, "manifest": manifest, "checked": names, "bytes": read.done, "differences": found})
    if found:
        what = f"run {run} is not fine-tune {manifest}" if is_now != manifest else f"run {run} is not as its manifest recorded it"
        remedy = "copy the run folder again from where it was made, or name the fine-tune that is meant"
        raise VerificationFailed(what, evidence="\n".join(found), remedy=remedy)
    show.line(f"{run} is fine-tune {manifest}: {', '.join(names)} as recorded ({read.done / 2**30:.2f} GiB read)", err=True)


def _fine_tune(record: Manifest) -> str:
    """The manifest hash of a run; InputError where nothing was merged yet."""
    try:
        return manifest_hash(record)
    except KeyError:
        remedy = f"granite-pipeline export --run {record.run}"
        raise InputError(f"run {record.run} has no record of a merged model", remedy=remedy) from None


def _served(folder: RunFolder, record: Manifest, engine: str) -> list[str]:
    """What an engine loads of a run, by name; without one, everything on record that some engine does."""
    if engine:
        chosen = engines.get(engine)
        if not (artefact := chosen.artefact(folder)):
            raise InputError(f"{chosen.title} serves nothing of a run", remedy="leave --engine out")
        return [artefact.name, *([folder.modelfile.name] if chosen.creates_model else [])]
    paths = [*(each.artefact(folder) for each in engines.every()), folder.adapter, folder.modelfile]
    recorded = {name for stage in record.stages.values() for name in stage.artefacts}
    return [name for name in dict.fromkeys(path.name for path in paths if path) if name in recorded]


class _Reading:
    """Hashes files, and says now and then how much of all that is."""

    def __init__(self, size: int, progress: Callable[[str], None]) -> None:
        self.size, self.progress, self.done, self._said = size, progress, 0, time.monotonic()

    def sha256(self, path: Path) -> str:
        """Hex SHA-256 of a file's bytes."""
        digest = hashlib.sha256()
        with path.open("rb") as handle:
            while block := handle.read(_CHUNK):
                digest.update(block)
                self.done += len(block)
                if time.monotonic() - self._said > _SECONDS:
                    self._said = time.monotonic()
                    self._say(path)
        return digest.hexdigest()

    def _say(self, path: Path) -> None:
        words = f"read {self.done / 2**30:.1f} of {self.size / 2**30:.1f} GiB, {path.name}"
        self.progress(words)
        # in a pod's log there is no spinner
        if not show.console(err=True).is_terminal:
            show.line(words, err=True)
