"""What a link of the certificate found: a figure, the bound it is held to, and where the bound comes from."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from typing import Any, Literal

from pipeline.errors import Interrupted, PipelineError

Status = Literal["passed", "failed", "skipped", "warning"]

# number -> (key, title); a finding's id starts with the key and a dot
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


@dataclass(frozen=True)
class Finding:
    """One thing measured. ``figure`` and ``bound`` are for people; ``data`` holds the numbers, for plots and other tools."""

    id: str
    status: Status
    figure: str
    bound: str = ""
    source: str = ""
    data: Mapping[str, Any] = field(default_factory=dict)

    @property
    def link(self) -> str:
        """The key of the link it belongs to."""
        return self.id.partition(".")[0]

    def to_json(self) -> dict[str, Any]:
        """As in certificate.json."""
        return {**asdict(self), "data": dict(self.data)}


@dataclass(frozen=True)
class Link:
    """One link with its findings, in the order of TITLES."""

    key: str
    findings: tuple[Finding, ...]

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
        """Failed when any finding failed, skipped when nothing was measured, a warning when only that is left to say."""
        seen = {finding.status for finding in self.findings}
        order: tuple[Status, ...] = ("failed", "warning", "passed")
        return next((status for status in order if status in seen), "skipped")

    def to_json(self) -> dict[str, Any]:
        """As in certificate.json."""
        return {
            "number": self.number,
            "key": self.key,
            "title": self.title,
            "status": self.status,
            "findings": [finding.to_json() for finding in self.findings],
        }


def held(check_id: str, ok: bool, figure: str, bound: str, source: str, **data: Any) -> Finding:
    """A finding that can only pass or fail."""
    return Finding(check_id, "passed" if ok else "failed", figure, bound, source, data)


def skipped(check_id: str, why: str) -> Finding:
    """A finding that could not be made here, with the reason."""
    return Finding(check_id, "skipped", why)


def guarded(
    check_id: str, work: Callable[[], Sequence[Finding]], *, fatal: tuple[type[PipelineError], ...] = (Interrupted,)
) -> list[Finding]:
    """What ``work`` finds; when the files or the server it looks at are too damaged for that, one failed finding that says so.

    An error of a ``fatal`` kind is nobody's damage, and raised.
    """
    try:
        return list(work())
    except fatal:
        raise
    except (PipelineError, OSError, ArithmeticError, AttributeError, LookupError, TypeError, ValueError) as error:
        lines = str(error).splitlines() or ["no message"]
        return [Finding(check_id, "failed", f"{type(error).__name__}: {lines[0]}")]


def by_link(findings: Sequence[Finding]) -> tuple[Link, ...]:
    """Findings grouped into links, in the chain's order; a link without a finding is left out."""
    return tuple(Link(key, found) for key in TITLES if (found := tuple(f for f in findings if f.link == key)))
