"""A certificate shown: in the run's report, on the terminal, and in the model card (``README.md`` of a run, in the hub's format)."""

import shlex
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import yaml
from jinja2 import Environment, FileSystemLoader, StrictUndefined
from markupsafe import Markup
from rich.table import Table
from rich.text import Text

from pipeline import engines
from pipeline.certify.certificate import Certificate, Link, not_proven, place
from pipeline.engines.base import Engine
from pipeline.net.chat import SAMPLING
from pipeline.report.certificate import changed_files
from pipeline.report.check import STYLES
from pipeline.report.write import ReportPaths, paths_in, write_report
from pipeline.runs import lock
from pipeline.runs.files import read_json, write_atomic
from pipeline.runs.folder import RunFolder
from pipeline.runs.manifest import Manifest
from pipeline.runs.stages import LOOKING
from pipeline.runs.text import visible
from pipeline.verify.assemble import titled

_PREFIX = "certificate."
_MARKS = {"passed": "proven", "failed": "**broken**", "skipped": "not tested", "warning": "with a note"}
_MARKDOWN = str.maketrans({mark: f"\\{mark}" for mark in "\\`*_{}[]<>#|~"})


def add_to_report(run: RunFolder, certificate: Certificate) -> ReportPaths | None:
    """Put the certificate into the run's report, one check a link; None when the run has no report yet."""
    path = paths_in(run.report).json
    if not path.is_file():
        return None
    return write_report(with_certificate(titled(read_json(path)), certificate), run.report)


def publish(run: RunFolder, certificate: Certificate) -> ReportPaths | None:
    """Write the run's model card and put the certificate into its report, where it does not stand beside a fuller one."""
    with lock.held(run, "certify"):
        write_card(run)
        return add_to_report(run, certificate) if place(certificate, run.certificate).stem == "certificate" else None


def rows(certificate: Certificate) -> list[dict[str, Any]]:
    """One row a finding, for a table."""
    return [
        {"link": f"{link.number} {link.title}", "check": f.id, "status": f.status, "figure": f.figure, "bound": f.bound}
        for link in certificate.links
        for f in link.findings
    ]


def with_certificate(report: dict[str, Any], certificate: Certificate) -> dict[str, Any]:
    """The report with this certificate instead of an earlier one; it passes when both do."""
    others = [check for check in report["checks"] if not check["id"].startswith(_PREFIX)]
    checks = [*others, *(_check(link) for link in certificate.links)]
    passed = all(check["status"] != "failed" for check in checks)
    return {**report, "checks": checks, "passed": passed, "certificate": certificate.to_json()}


def _check(link: Link) -> dict[str, str]:
    telling = [finding for finding in link.findings if finding.status == link.status] or list(link.findings)
    detail = "; ".join(f"{finding.id}: {finding.figure}" for finding in telling[:3])
    return {"id": f"{_PREFIX}{link.key}", "status": link.status, "detail": detail}


def table(certificate: Certificate) -> Table:
    """One line a finding, for the terminal, with the bound where it did not hold; untrusted text cannot style or control it."""
    title = Text(f"{certificate.state}: run {certificate.run}, certificate {certificate.id[:12]}")
    if certificate.unproven:
        title.append(f"; nothing is proven for {not_proven(certificate)}")
    title.stylize({"certified": "bold green", "incomplete": "bold yellow"}.get(certificate.state, "bold red"))
    shown = Table(title=title, title_justify="left", show_header=False, box=None, pad_edge=False)
    for column in ("", "", ""):
        shown.add_column(column, overflow="fold")
    for link in certificate.links:
        shown.add_row(Text(f"{link.number}"), Text(link.title, style="bold"), Text(link.status, style=STYLES[link.status]))
        for finding in link.findings:
            detail = finding.detail if finding.status == "failed" else finding.figure
            name = Text(f"  {finding.id.partition('.')[2]}", style=STYLES[finding.status])
            shown.add_row("", name, Text(visible(detail)))
    return shown


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
        flags={engine.name: _sampling_flags(engine) for engine in engines.every()},
        sampling=" and ".join(f"{setting} {value:g}" for setting, value in SAMPLING.items()),
        raw=Markup,
    )


def plain(text: object) -> str:
    """Text that Markdown shows as it is: no markup, no line breaks, nothing invisible."""
    return text if isinstance(text, Markup) else " ".join(visible(str(text)).split()).translate(_MARKDOWN)


def _sampling_flags(engine: Engine) -> str:
    flags = engine.default_flags(SAMPLING)
    return shlex.join(word for flag in flags for word in (flag.name, flag.value) if word is not None)


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
        known = [key for key in ("exact", "calls", "json_valid", "finish_stop") if evaluated.get(key) is not None]
        metrics = [{"type": key, "value": evaluated[key]} for key in known]
        task = {"type": "text-generation"}
        dataset = {"name": f"held-out rows of {name}", "type": "private"}
        fields["model-index"] = [{"name": name, "results": [{"task": task, "dataset": dataset, "metrics": metrics}]}]
    return str(yaml.safe_dump(fields, sort_keys=False, allow_unicode=True))
