"""How the report shows a certificate: one line a link, its checks below, a matrix of the backends, charts."""

import contextlib
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from markupsafe import Markup

from pipeline.errors import InputError
from pipeline.report import charts
from pipeline.runs.files import read_json
from pipeline.runs.folder import RunFolder
from pipeline.runs.hashes import HashCache, sha256_tree
from pipeline.runs.text import visible

# columns of the matrix: heading -> id of the check, by backend
_COLUMNS = {
    "Serves this run's file": "served.{}_file",
    "Same prompt tokens": "served.{}_prompts",
    "Same greedy answers": "served.{}_answers",
    "Same distributions": "served.{}_logprobs",
    "Not the base": "tuned.{}",
    "Same drift elsewhere": "tuned.{}_controls",
    "Stops": "stops.{}",
}
_ANSWERS, _LOGPROBS = ("served.", "_answers"), ("served.", "_logprobs")
Checks = Mapping[str, Mapping[str, Any]]


def view(certificate: Mapping[str, Any], titles: Mapping[str, str]) -> dict[str, Any]:
    """What the page shows of ``certificate.json``; ``titles`` are those of the backends, by name."""
    links, known = certificate["links"], certificate.get("titles", {})
    checks = {check["id"]: check for link in links for check in link["findings"]}
    heads, matrix = _matrix(checks, titles)
    return {
        "id": str(certificate["id"]),
        "created_at": str(certificate["created_at"]),
        "offline": bool(certificate["offline"]),
        # an older certificate does not say how its links are called
        "untested": [known.get(key, f"link {key}").lower() for key in certificate["unproven"]],
        "links": [{**link, "lead": _lead(link)} for link in links],
        "heads": heads,
        "matrix": matrix,
        "charts": [(name, Markup(svg)) for name, svg in _charts(checks, titles).items() if svg],
        "classes": _data(checks, "tuned.classes").get("classes", []),
    }


def _lead(link: Mapping[str, Any]) -> Mapping[str, Any]:
    """The check that tells most: the first broken one of a broken link, else the first."""
    checks: list[Mapping[str, Any]] = link["findings"]
    return next((check for check in checks if check["status"] == link["status"]), checks[0])


def _engines(checks: Checks, around: tuple[str, str]) -> list[str]:
    """Backends that have a check whose id has this beginning and end."""
    before, after = around
    return [key.removeprefix(before).removesuffix(after) for key in checks if key.startswith(before) and key.endswith(after)]


def _matrix(checks: Checks, titles: Mapping[str, str]) -> tuple[list[str], list[tuple[str, list[tuple[str, str]]]]]:
    """Headings, and by backend its title and a (status, figure) each; columns that no backend has are left out."""
    engines = _engines(checks, _ANSWERS)
    kept = {head: key for head, key in _COLUMNS.items() if any(key.format(engine) in checks for engine in engines)}
    rows, nothing = [], {"status": "", "figure": ""}
    for engine in engines:
        made = [checks.get(key.format(engine), nothing) for key in kept.values()]
        rows.append((titles.get(engine, visible(engine)), [(check["status"], check["figure"]) for check in made]))
    return list(kept), rows


def _data(checks: Checks, key: str) -> Mapping[str, Any]:
    return (checks.get(key) or {}).get("data") or {}


def _charts(checks: Checks, titles: Mapping[str, str]) -> dict[str, str]:
    compared = {"float16 cast": "merge.cast_logits"}
    compared |= {titles.get(engine, visible(engine)): engine.join(_LOGPROBS) for engine in _engines(checks, _LOGPROBS)}
    spread = {title: _data(checks, key).get("divergences", []) for title, key in compared.items()}
    errors = {name: _data(checks, key).get("errors", []) for name, key in (("merged", "merge.tensors"), ("GGUF", "gguf.tensors"))}
    return {
        "Before and after, with intervals": charts.intervals(_data(checks, "tuned.scores").get("fields", {})),
        "Divergence from the trained model": charts.divergence(spread),
        "Error by tensor": charts.tensor_errors(errors),
    }


def changed_files(run: RunFolder, certificate: Mapping[str, Any], *, read: bool = False) -> list[str]:
    """Artefacts of a certificate that are gone or have another SHA-256 now.

    Files that the file system calls unchanged are not read again, except with ``read``: where a certificate vouches for them.
    """
    sha256_of = sha256_tree if read else HashCache(run.path).tree
    subject = certificate["subject"]
    artefacts: Mapping[str, str] = subject["artefacts"] if read else subject.get("artefacts") or {}
    return [name for name, known in artefacts.items() if not (run.path / name).exists() or sha256_of(run.path / name) != known]


def summary(run: RunFolder) -> dict[str, Any] | None:
    """Id, result and time of a run's certificate, for a status page; None when there is none.

    ``current`` is false once a file that it is about has changed: ``passed`` then says nothing about what is there now.
    """
    path = run.certificate_file
    if not path.is_file():
        return None
    held = read_json(path)
    seen = {key: held.get(key) for key in ("id", "passed", "state", "offline", "unproven", "broken", "created_at")}
    return {**seen, "current": not changed_files(run, held)}


def summaries(output: Path) -> dict[str, dict[str, Any]]:
    """The certificates of every run below a folder, by run name; a file that cannot be read counts as none."""
    certified = {}
    for path in sorted(output.glob("*/certificate/certificate.json")):
        with contextlib.suppress(InputError, AttributeError, KeyError, TypeError, OSError):
            if known := summary(RunFolder(path.parents[1].name, output)):
                certified[path.parents[1].name] = known
    return certified
