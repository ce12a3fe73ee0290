"""What became of one backend in a verification: its entry in report.json, its checks and its answers."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

from pipeline.checks import Check
from pipeline.score import Answer
from pipeline.serving import Endpoint


@dataclass
class Outcome:
    """What one backend did: its report entry, its checks and its answers."""

    entry: dict[str, Any]
    checks: list[Check] = field(default_factory=list)
    answers: list[Answer] = field(default_factory=list)


def launched(endpoint: Endpoint) -> dict[str, Any]:
    """The part of a report entry that says which server it was and how it was started."""
    plan, process = endpoint.plan or {}, endpoint.server
    return {
        "name": endpoint.engine,
        "engine_version": endpoint.version,
        "argv": list(process.argv) if process else None,
        "env": process.env if process else None,
        "sha256": endpoint.sha256,
        "ready_seconds": endpoint.ready_seconds,
        "reasons": plan.get("reasons", []),
        "memory_gib": plan.get("memory_gib"),
        "memory_measured_gib": round(process.memory_gib(), 2) if process else None,
    }


_NOTHING = {
    "engine_version": None, "argv": None, "ready_seconds": None, "exact": None, "prompt_parity": None,
    "finish_stop": None, "ttft_ms": None, "tokens_per_second": None,
}  # fmt: skip


def absent(name: str, status: str, reason: str, endpoint: Endpoint | None = None) -> Outcome:
    """A backend without figures: skipped because it is not installed, or failed."""
    check = Check(
        f"{name}.available" if status == "skipped" else f"{name}.serving",
        "skipped" if status == "skipped" else "failed",
        reason,
    )
    what, _, install = reason.partition("; to have it: ")
    known = launched(endpoint) if endpoint else {}
    entry = {
        **_NOTHING,
        **known,
        "name": name,
        "status": status,
        "reason": what,
        "install": install or None,
        "prompts": {"total": 0, "passed": 0},
        "checks": [check.to_json()],
    }
    return Outcome(entry, [check])
