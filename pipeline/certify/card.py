"""The model card: ``README.md`` of a run folder in the hub's format, written from the manifest and the certificate."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import yaml
from jinja2 import Environment, FileSystemLoader, StrictUndefined
from markupsafe import Markup

from pipeline.report.certificate import changed_files
from pipeline.runs.files import read_json, write_atomic
from pipeline.runs.folder import RunFolder
from pipeline.runs.manifest import Manifest
from pipeline.runs.stages import LOOKING
from pipeline.runs.text import visible

_MARKS = {"passed": "proven", "failed": "**broken**", "skipped": "not tested", "warning": "with a note"}
_MARKDOWN = str.maketrans({mark: f"\\{mark}" for mark in "\\`*_{}[]<>#|~"})


def write_card(run: RunFolder) -> Path:
    """Write the card; InputError when the run has no training on record."""
    manifest = Manifest(run.manifest)
    held = read_json(run.certificate_file) if run.certificate_file.is_file() else None
    target = run.path / "README.md"
    write_atomic(target, card(run.name, manifest, held, changed_files(run, held) if held else ()))
    return target


def card(name: str, manifest: Manifest, certificate: Mapping[str, Any] | None, changed: Sequence[str] = ()) -> str:
    """The card's text: front matter, what it is, the certificate, scores, how to run it, how it was made.

    ``changed`` are the files that are no longer those that the certificate is about.
    """
    training = manifest.require_training()
    made = [stage for stage_name, stage in manifest.stages.items() if stage_name not in LOOKING]
    hashes = {path: seal.sha256 for stage in made for path, seal in stage.artefacts.items()}
    hashes |= {f"dataset ({part})": sha256 for part, sha256 in training.data.items()} | {"base": training.base.sha256}
    scores, not_shown = _evaluated(manifest, "tuned"), ("base", "data", "eval_data")
    environment = Environment(
        loader=FileSystemLoader(Path(__file__).parent), finalize=plain, undefined=StrictUndefined, trim_blocks=True
    )
    return environment.get_template("card.md.j2").render(
        front=Markup(_front_matter(name, manifest)),
        name=name,
        training=training,
        # a folder's path is its owner's business
        base=Path(training.base.id).name if training.base.id.startswith((".", "/", "~")) else training.base.id,
        certificate=certificate,
        changed=changed,
        marks={status: Markup(mark) for status, mark in _MARKS.items()},
        before=_evaluated(manifest, "base"),
        after={key: value for key, value in scores.items() if value is not None},
        chosen={k: v for k, v in training.parameters.items() if v is not None and k not in not_shown},
        hashes=hashes,
        raw=Markup,
    )


def plain(text: object) -> str:
    """Text that Markdown shows as it is: no markup, no line breaks, nothing invisible."""
    return text if isinstance(text, Markup) else " ".join(visible(str(text)).split()).translate(_MARKDOWN)


def _evaluated(manifest: Manifest, which: str) -> dict[str, Any]:
    stage = manifest.stage(f"evaluate_{which}")
    return stage.result if stage else {}


def _front_matter(name: str, manifest: Manifest) -> str:
    training, evaluated = manifest.require_training(), _evaluated(manifest, "tuned")
    base = training.base
    fields: dict[str, Any] = {"library_name": "transformers", "pipeline_tag": "text-generation"}
    if base.revision:  # only a hub id has one
        fields["base_model"] = base.id
    if "Apache-2.0" in base.note:
        fields["license"] = "apache-2.0"
    fields["tags"] = ["granite", "gguf", training.parameters["method"], "granite-pipeline"]
    if evaluated:
        known = [key for key in ("exact", "json_valid", "finish_stop") if evaluated.get(key) is not None]
        metrics = [{"type": key, "value": evaluated[key]} for key in known]
        task = {"type": "text-generation"}
        dataset = {"name": f"held-out rows of {name}", "type": "private"}
        fields["model-index"] = [{"name": name, "results": [{"task": task, "dataset": dataset, "metrics": metrics}]}]
    return str(yaml.safe_dump(fields, sort_keys=False, allow_unicode=True))
