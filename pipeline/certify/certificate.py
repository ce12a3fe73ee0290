"""The certificate itself: what it is about, links, verdict, an id made of its content; written as JSON and JUnit."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, fields
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from pipeline import __version__
from pipeline.errors import InputError, VerificationFailed
from pipeline.report.check import Check, Status, junit_xml
from pipeline.runs.files import read_json, write_atomic, write_json
from pipeline.runs.folder import RunFolder
from pipeline.runs.hashes import sha256_json, sha256_tree
from pipeline.runs.manifest import Manifest, TrainingRecord
from pipeline.runs.text import clean

SCHEMA = 1
# the links by key, in the chain's order; a check's id starts with the key and a dot
TITLES: dict[str, str] = {
    "adapter": "The adapter moved",
    "merge": "Merged = base + adapter",
    "gguf": "GGUF = merged",
    "served": "Served = exported",
    "tuned": "Tuned is not the base",
    "stops": "It stops",
    "custody": "Chain of custody",
    "own": "Your own checks",
}
_ESSENTIAL = tuple(key for key in TITLES if key != "own")
_AGAIN = "granite-pipeline certify"
_KEYS = {key.name for key in fields(Check)}


@dataclass(frozen=True)
class Data:
    """The dataset as it is now: hash of each file, and held-out prompts that are also training rows (file:line)."""

    sha256: Mapping[str, str]
    leaked: tuple[str, ...] = ()
    train_rows: int = 0


@dataclass(frozen=True)
class Subject:
    """A run and what it was made from; ``missing`` says in words what could not be had here (base, data)."""

    run: RunFolder
    manifest: Manifest
    base: Path | None
    base_sha256: str | None
    data: Data | None
    missing: Mapping[str, str]
    sha256: Mapping[str, str]

    @property
    def training(self) -> TrainingRecord:
        """What the fine-tune recorded; InputError when it never finished."""
        return self.manifest.require_training()


def hashes(run: RunFolder) -> dict[str, str]:
    """SHA-256 of every artefact of a run that is there, by its path in the run folder."""
    parts = [run.adapter, run.heldout, run.merged, run.gguf, run.modelfile, run.reference("base"), run.reference("tuned")]
    return {path.relative_to(run.path).as_posix(): sha256_tree(path) for path in parts if path.exists()}


@dataclass(frozen=True)
class Link:
    """One link with its checks."""

    key: str
    findings: tuple[Check, ...]

    @property
    def number(self) -> int:
        """Place in the chain, from 1."""
        return list(TITLES).index(self.key) + 1

    @property
    def title(self) -> str:
        """The link in words."""
        return TITLES[self.key]

    @property
    def status(self) -> Status:
        """Failed when any check failed, skipped when nothing was measured, a warning when only that is left to say."""
        seen = {check.status for check in self.findings}
        order: tuple[Status, ...] = ("failed", "warning", "passed")
        return next((status for status in order if status in seen), "skipped")

    def to_json(self) -> dict[str, Any]:
        """As in certificate.json."""
        stated = {"number": self.number, "key": self.key, "title": self.title, "status": self.status}
        return {**stated, "findings": [check.to_json() for check in self.findings]}


def by_link(checks: Sequence[Check]) -> tuple[Link, ...]:
    """Checks grouped into links, in the chain's order; a link without a check is left out."""
    return tuple(Link(key, mine) for key in TITLES if (mine := tuple(c for c in checks if c.about == key)))


@dataclass(frozen=True)
class Certificate:
    """What was certified, how each link held, when, and (``judged_on``) which server said what it was judged on, and when."""

    run: str
    links: tuple[Link, ...]
    subject: Mapping[str, Any]
    offline: bool
    created_at: str
    judged_on: Mapping[str, Any] = field(default_factory=dict)

    @property
    def passed(self) -> bool:
        """No check failed and, unless only files were looked at, every link is proven."""
        return not self.broken and (self.offline or not self.unproven)

    @property
    def state(self) -> str:
        """``broken``, ``incomplete`` (nothing failed, but a link is unproven) or ``certified``."""
        return "broken" if self.broken else "incomplete" if self.unproven else "certified"

    @property
    def checks(self) -> list[Check]:
        """Every check, in the chain's order."""
        return [check for link in self.links for check in link.findings]

    @property
    def broken(self) -> list[Check]:
        """Failed checks, in the chain's order: the first one names the broken link."""
        return [check for check in self.checks if check.status == "failed"]

    @property
    def unproven(self) -> list[str]:
        """Keys of links that nothing was measured for."""
        measured = {link.key for link in self.links if link.status != "skipped"}
        return [key for key in _ESSENTIAL if key not in measured]

    @property
    def id(self) -> str:
        """SHA-256 of the content (without the time), so that equal evidence gives an equal id."""
        links = [link.to_json() for link in self.links]
        return sha256_json({"subject": dict(self.subject), "links": links, "offline": self.offline})

    def to_json(self) -> dict[str, Any]:
        """``certificate.json``."""
        verdict = {"passed": self.passed, "state": self.state, "offline": self.offline, "unproven": self.unproven}
        verdict |= {"broken": [check.id for check in self.broken]}
        origin = {"created_at": self.created_at, "made_by": f"granite-pipeline {__version__}"}
        about = {"subject": dict(self.subject), "judged_on": dict(self.judged_on), "titles": TITLES}
        links = [link.to_json() for link in self.links]
        return {"schema": SCHEMA, "id": self.id, "run": self.run, **verdict, **origin, **about, "links": links}


def make(
    run: RunFolder,
    checks: Sequence[Check],
    subject: Mapping[str, Any],
    *,
    offline: bool,
    judged_on: Mapping[str, Any] | None = None,
) -> Certificate:
    """Assemble a certificate; text and numbers are made fit for JSON first, so that its id can be checked on the file."""
    links = by_link([Check(**clean(check.to_json())) for check in checks])
    now = datetime.now(UTC).isoformat(timespec="seconds")
    return Certificate(run.name, links, clean(subject), offline, now, clean(judged_on or {}))


def read(path: Path) -> tuple[Certificate, str]:
    """A certificate as its file says, verdict and id to be made anew from the content, and the id that the file claims."""
    held = read_json(path)
    try:
        written = [check for link in held["links"] for check in link["findings"]]
        if unknown := {key for check in written for key in check} - _KEYS:
            raise KeyError(*unknown)
        links = by_link([Check(**check) for check in written])
        said = (held["subject"], held["offline"] is not False, held["created_at"], held.get("judged_on", {}))
        return Certificate(held["run"], links, *said), str(held["id"])
    except (KeyError, TypeError, AttributeError, ValueError) as error:
        raise InputError(f"{path} is not a certificate ({error!r})", remedy=f"{_AGAIN} makes one") from None


def save(certificate: Certificate, folder: Path) -> Path:
    """Write ``certificate.json`` and ``junit.xml`` (see :func:`place` for ``offline.json``); returns the first."""
    path, run = place(certificate, folder), certificate.run
    suites = [(f"{link.number} {link.title}", f"{run}.certificate.{link.key}", link.findings) for link in certificate.links]
    xml = junit_xml(f"certificate of {run}", suites)
    write_atomic(folder / ("offline.xml" if path.stem == "offline" else "junit.xml"), xml)
    write_json(path, certificate.to_json())
    return path


def place(certificate: Certificate, folder: Path) -> Path:
    """Where a certificate is written: an offline one stands beside a fuller one, which may be signed, and not in its place."""
    path = folder / "certificate.json"
    try:
        fuller = certificate.offline and path.is_file() and read_json(path)["offline"] is False
    except (InputError, KeyError, TypeError):
        fuller = False
    return folder / "offline.json" if fuller else path


def require_certified(certificate: Certificate) -> None:
    """Raise VerificationFailed, naming the first broken link or those that nothing was proven for."""
    if certificate.broken:
        title = _title(certificate.broken[0].about)
        raise VerificationFailed(
            f"not certified: {title}, is broken",
            evidence="\n".join(f"{check.id}: {check.figure}" for check in certificate.broken),
            remedy="export again from an untouched adapter (granite-pipeline export --force), or see the run's report",
        )
    if not certificate.passed:
        raise VerificationFailed(
            f"not certified: nothing is proven for {not_proven(certificate)}",
            evidence="\n".join(f"{check.id}: {check.figure}" for check in certificate.checks if check.status == "skipped"),
            remedy=f"make available what was skipped, then {_AGAIN}; --offline certifies what files alone prove",
        )


def not_proven(certificate: Certificate) -> str:
    """The links that nothing was measured for, in words."""
    return ", ".join(map(_title, certificate.unproven))


def _title(key: str) -> str:
    return f"link {list(TITLES).index(key) + 1}, {TITLES[key].lower()}"
