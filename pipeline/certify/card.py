"""The model card: ``README.md`` of a run folder in the hub's format, written from the manifest and the certificate."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from pipeline.answers import visible
from pipeline.certify.current import changed_files
from pipeline.certify.subject import training_inputs
from pipeline.files import read_json, write_atomic
from pipeline.manifest import Manifest
from pipeline.runs import RunFolder

_MARKS = {"passed": "proven", "failed": "**broken**", "skipped": "not tested", "warning": "with a note"}
_MARKDOWN = str.maketrans({mark: f"\\{mark}" for mark in "\\`*_{}[]<>#|~"})


def write_card(run: RunFolder) -> Path:
    """Write the card; InputError when the run has no training on record."""
    manifest = Manifest(run.manifest)
    training_inputs(manifest)
    path = run.certificate / "certificate.json"
    target = run.path / "README.md"
    held = read_json(path) if path.is_file() else None
    write_atomic(target, card(run.name, manifest, held, changed_files(run, held) if held else ()))
    return target


def card(name: str, manifest: Manifest, certificate: Mapping[str, Any] | None, changed: Sequence[str] = ()) -> str:
    """The card's text: front matter, what it is, the certificate, scores, how to run it, how it was made.

    ``changed`` are the files that are no longer those that the certificate is about.
    """
    tuned = manifest.stage("finetune")
    base = tuned["inputs"]["base"]
    sections = [
        f"---\n{_front_matter(name, manifest)}---\n",
        f"# {plain(name)}\n\n{plain(_title(base))} fine-tuned with {plain(tuned['inputs']['parameters']['method'])} on "
        f"{tuned['result']['rows']['train']} rows, exported to float16 and Q8_0 GGUF by granite-pipeline.\n",
        _certificate(certificate, changed),
        _scores(manifest),
        _usage(name),
        _making(manifest),
    ]
    return "\n".join(sections)


def plain(text: object) -> str:
    """Text that Markdown shows as it is: no markup, no line breaks, nothing invisible."""
    return " ".join(visible(str(text)).split()).translate(_MARKDOWN)


def _title(base: Mapping[str, Any]) -> str:
    known = str(base["id"])
    # a folder's path is its owner's business
    return Path(known).name if known.startswith((".", "/", "~")) else known


def _front_matter(name: str, manifest: Manifest) -> str:
    import yaml

    tuned, evaluated = manifest.stage("finetune"), manifest.stage("evaluate_tuned").get("result", {})
    base = tuned["inputs"]["base"]
    fields: dict[str, Any] = {"library_name": "transformers", "pipeline_tag": "text-generation"}
    if base.get("revision"):  # only a hub id has one
        fields["base_model"] = base["id"]
    if "Apache-2.0" in base.get("note", ""):
        fields["license"] = "apache-2.0"
    fields["tags"] = ["granite", "gguf", tuned["inputs"]["parameters"]["method"], "granite-pipeline"]
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


def _scores(manifest: Manifest) -> str:
    before, after = (manifest.stage(f"evaluate_{which}").get("result", {}) for which in ("base", "tuned"))
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
    tuned = manifest.stage("finetune")
    chosen = {k: v for k, v in tuned["inputs"]["parameters"].items() if v is not None and k not in ("base", "data", "eval_data")}
    hashes = {path: seen["sha256"] for stage in manifest.data["stages"].values() for path, seen in stage["artefacts"].items()}
    hashes |= {f"dataset ({part})": sha256 for part, sha256 in tuned["inputs"]["data"].items()} | {
        "base": tuned["inputs"]["base"]["sha256"]
    }
    lines = ["## How it was made", "", ", ".join(f"{plain(k)} {plain(v)}" for k, v in chosen.items()) + ".", ""]
    return "\n".join([*lines, "| part | sha256 |", "| --- | --- |", *(f"| {plain(k)} | `{v}` |" for k, v in hashes.items()), ""])
