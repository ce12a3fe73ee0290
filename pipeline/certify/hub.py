"""The model card: ``README.md`` of a run folder in the hub's format, written from the manifest and the certificate."""

from __future__ import annotations

import os
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from pipeline.certify.certificate import not_proven, read
from pipeline.errors import EnvironmentFailure, InputError, MissingDependency
from pipeline.report.certificate import changed_files
from pipeline.runs.files import read_json, tree_bytes, write_atomic, write_json
from pipeline.runs.folder import RunFolder
from pipeline.runs.hashes import sha256_tree
from pipeline.runs.manifest import BaseRecord, Manifest
from pipeline.runs.stages import LOOKING
from pipeline.runs.text import visible

_MARKS = {"passed": "proven", "failed": "**broken**", "skipped": "not tested", "warning": "with a note"}
_MARKDOWN = str.maketrans({mark: f"\\{mark}" for mark in "\\`*_{}[]<>#|~"})


def write_card(run: RunFolder) -> Path:
    """Write the card; InputError when the run has no training on record."""
    manifest = Manifest(run.manifest)
    manifest.require_training()
    path = run.certificate_file
    target = run.path / "README.md"
    held = read_json(path) if path.is_file() else None
    write_atomic(target, card(run.name, manifest, held, changed_files(run, held) if held else ()))
    return target


def card(name: str, manifest: Manifest, certificate: Mapping[str, Any] | None, changed: Sequence[str] = ()) -> str:
    """The card's text: front matter, what it is, the certificate, scores, how to run it, how it was made.

    ``changed`` are the files that are no longer those that the certificate is about.
    """
    training = manifest.require_training()
    sections = [
        f"---\n{_front_matter(name, manifest)}---\n",
        f"# {plain(name)}\n\n{plain(_title(training.base))} fine-tuned with {plain(training.parameters['method'])} on "
        f"{training.rows['train']} rows, exported to float16 and Q8_0 GGUF by granite-pipeline.\n",
        _certificate(certificate, changed),
        _scores(manifest),
        _usage(name),
        _making(manifest),
    ]
    return "\n".join(sections)


def plain(text: object) -> str:
    """Text that Markdown shows as it is: no markup, no line breaks, nothing invisible."""
    return " ".join(visible(str(text)).split()).translate(_MARKDOWN)


def _title(base: BaseRecord) -> str:
    # a folder's path is its owner's business
    return Path(base.id).name if base.id.startswith((".", "/", "~")) else base.id


def _front_matter(name: str, manifest: Manifest) -> str:
    import yaml

    training, evaluated = manifest.require_training(), _evaluated(manifest, "tuned")
    base = training.base
    fields: dict[str, Any] = {"library_name": "transformers", "pipeline_tag": "text-generation"}
    if base.revision:  # only a hub id has one
        fields["base_model"] = base.id
    if "Apache-2.0" in base.note:
        fields["license"] = "apache-2.0"
    fields["tags"] = ["granite", "gguf", training.parameters["method"], "granite-pipeline"]
    if evaluated:
        metrics = [
            {"type": key, "value": evaluated[key]}
            for key in ("exact", "json_valid", "finish_stop")
            if evaluated.get(key) is not None
        ]
        task = {"type": "text-generation"}
        dataset = {"name": f"held-out rows of {name}", "type": "private"}
        fields["model-index"] = [{"name": name, "results": [{"task": task, "dataset": dataset, "metrics": metrics}]}]
    return str(yaml.safe_dump(fields, sort_keys=False, allow_unicode=True))


def _certificate(certificate: Mapping[str, Any] | None, changed: Sequence[str]) -> str:
    if certificate is None:
        return "## Certificate\n\nNone yet: `granite-pipeline certify` makes one.\n"
    verdict = "Every link holds"
    if certificate["broken"]:
        verdict = f"Broken: {', '.join(plain(one) for one in certificate['broken'])}"
    elif certificate["unproven"]:
        verdict = f"Incomplete, nothing is proven for: {', '.join(plain(one) for one in certificate['unproven'])}"
    if changed:
        files = ", ".join(plain(name) for name in changed)
        verdict = (
            f"**No longer about these files**: {files} changed since; run `granite-pipeline certify` again. It said: {verdict}"
        )
    lines = [f"## Certificate {certificate['id'][:16]}", "", f"{verdict}. Made {plain(certificate['created_at'])}.", "", "| link | | figure | bound |", "| --- | --- | --- | --- |"]  # fmt: skip
    for link in certificate["links"]:
        for finding in link["findings"]:
            cells = (f"{link['number']} {finding['id']}", _MARKS[finding["status"]])
            lines.append(f"| {plain(cells[0])} | {cells[1]} | {plain(finding['figure'])} | {plain(finding['bound'])} |")
    return "\n".join([*lines, ""])


def _evaluated(manifest: Manifest, which: str) -> dict[str, Any]:
    stage = manifest.stage(f"evaluate_{which}")
    return stage.result if stage else {}


def _scores(manifest: Manifest) -> str:
    before, after = _evaluated(manifest, "base"), _evaluated(manifest, "tuned")
    if not after:
        return ""
    rows = [
        f"| {plain(key)} | {before.get(key, '')} | {value} |" for key, value in after.items() if key != "n" and value is not None
    ]
    return "\n".join(
        [f"## Held-out scores, {after['n']} rows", "", "| share right | before | after |", "| --- | --- | --- |", *rows, ""]
    )


def _usage(name: str) -> str:
    return f"""## Use

```
ollama create {name} -f Modelfile && ollama run {name}
vllm serve . --served-model-name {name}
llama-server -m unsloth.Q8_0.gguf --jinja -c 4096 --port 8005
```
"""


def _making(manifest: Manifest) -> str:
    training = manifest.require_training()
    chosen = {k: v for k, v in training.parameters.items() if v is not None and k not in ("base", "data", "eval_data")}
    made = [stage for name, stage in manifest.stages.items() if name not in LOOKING]
    hashes = {path: seal.sha256 for stage in made for path, seal in stage.artefacts.items()}
    hashes |= {f"dataset ({part})": sha256 for part, sha256 in training.data.items()} | {"base": training.base.sha256}
    lines = ["## How it was made", "", ", ".join(f"{plain(k)} {plain(v)}" for k, v in chosen.items()) + ".", ""]
    return "\n".join([*lines, "| part | sha256 |", "| --- | --- |", *(f"| {plain(k)} | `{v}` |" for k, v in hashes.items()), ""])


PARTS = ("merged", "gguf", "adapter")
_PRIVATE = frozenset({"argv", "env", "log", "starts", "cases"})
# an absolute path, or one below the home folder, with at least two parts; not the path of a URL
_PATH = re.compile(r"(?<![\w./:~-])(?:~|/[^\s/\"'`,;:()\[\]]+)(?:/[^\s/\"'`,;:()\[\]]+)+/?")


@dataclass(frozen=True)
class Upload:
    """One file and its place in the repository."""

    file: Path
    path: str
    bytes: int


def plan(run: RunFolder, parts: tuple[str, ...] = PARTS) -> list[Upload]:
    """The files of a run that a repository gets: weights at its root, adapter below ``adapter/``, card and certificate."""
    unknown = [part for part in parts if part not in PARTS]
    if unknown:
        raise InputError(f"no part {unknown[0]!r}", remedy=f"known: {', '.join(PARTS)}")
    chosen: list[tuple[Path, str]] = [(write_card(run), "README.md")]
    chosen += [(_public(run, path), path.name) for path in (run.manifest, run.certificate_file) if path.is_file()]
    if "merged" in parts:
        chosen += [(path, path.name) for path in sorted(run.merged.iterdir()) if path.is_file()]
    if "gguf" in parts:
        chosen += [(run.gguf, run.gguf.name), (run.modelfile, run.modelfile.name)]
    if "adapter" in parts:
        # peft's own card there is a template to fill in, and names folders of this machine
        chosen += [(p, f"adapter/{p.name}") for p in sorted(run.adapter.iterdir()) if p.is_file() and p.name != "README.md"]
    return [Upload(path, name, tree_bytes(path)) for path, name in chosen if path.is_file()]


def redacted(value: Any) -> Any:
    """A copy for others: without command lines, environments, logs and cases of own checks; a path of this machine is its name."""
    if isinstance(value, str):
        return _PATH.sub(lambda found: found[0].rstrip("/").rpartition("/")[2], value)
    if isinstance(value, dict):
        return {redacted(key): redacted(item) for key, item in value.items() if key not in _PRIVATE}
    if isinstance(value, list):
        return [redacted(item) for item in value]
    return value


def _public(run: RunFolder, path: Path) -> Path:
    """The redacted copy of a JSON file; a certificate's keeps the id of the whole one, and its own checks only their verdicts."""
    content = redacted(read_json(path))
    for link in content.get("links", []):
        if link["key"] == "own":  # figures quote prompts and answers
            link["findings"] = [{**finding, "figure": "", "data": {}} for finding in link["findings"]]
    target = run.certificate / "public" / path.name
    write_json(target, {**content, "redacted": True})
    return target


def require_current_certificate(run: RunFolder) -> None:
    """InputError unless every link is proven, by a certificate with servers that is about the files as they are now."""
    path = run.certificate_file
    remedy = f"granite-pipeline certify --run {run.name}, or push with --uncertified"
    if not path.is_file():
        raise InputError(f"run {run.name} has no certificate", remedy=remedy)
    held, claimed = read(path)
    if held.id != claimed:
        raise InputError(f"{path} was edited: its id is not that of its content", remedy=remedy)
    if held.broken:
        raise InputError(f"run {run.name} is not certified: {', '.join(one.id for one in held.broken)}", remedy=remedy)
    if held.offline or held.unproven:
        why = "it is from files alone" if held.offline else f"nothing is proven for {not_proven(held)}"
        raise InputError(f"the certificate of run {run.name} is incomplete: {why}", remedy=remedy)
    for name, sha256 in held.subject["artefacts"].items():
        if not (run.path / name).exists() or sha256_tree(run.path / name) != sha256:
            raise InputError(f"{name} has changed since the certificate was made", remedy=remedy)


def push(run: RunFolder, repository: str, uploads: list[Upload], *, private: bool = True) -> str:
    """Create the repository if needed and upload everything in one commit; returns its address.

    The token is HF_TOKEN's, or the one of an earlier login. Raises EnvironmentFailure with the hub's own words.
    """
    try:
        from huggingface_hub import CommitOperationAdd, HfApi
        from huggingface_hub.errors import HfHubHTTPError, HFValidationError, OfflineModeIsEnabled
    except ImportError:
        raise MissingDependency("huggingface_hub is not installed", remedy="pip install huggingface_hub") from None
    import httpx

    api = HfApi(token=os.environ.get("HF_TOKEN") or None)
    try:
        address = api.create_repo(repository, private=private, exist_ok=True)
        operations = [CommitOperationAdd(path_in_repo=one.path, path_or_fileobj=str(one.file)) for one in uploads]
        api.create_commit(repository, operations, commit_message=f"granite-pipeline: run {run.name}")
    except HFValidationError as error:
        raise InputError(f"{repository!r} is no repository name: {error}", remedy="give owner/name") from None
    except (HfHubHTTPError, OfflineModeIsEnabled, httpx.HTTPError, OSError) as error:
        raise EnvironmentFailure(
            f"the hub did not take {repository}", evidence=str(error)[:500], remedy="check the network, HF_TOKEN and its rights"
        ) from None
    return str(address)
