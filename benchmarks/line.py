"""The whole line of another checkout and of this one in turn: the seconds of every stage, and their ratio.

    python -m benchmarks.line --against ../before                # two fresh runs, each then run once more unchanged
    python -m benchmarks.line --against ../before --quick        # 20 steps of training: what surrounds it
    python -m benchmarks.line                                    # this checkout alone

Each run goes to a fresh folder of its own with the same settings, through ``python -m pipeline run``. Prints a table, and writes JSON
to ``--out``. Exit code 3 when a run did not end with a report (a failed check is one, and is said).
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

HERE = Path(__file__).resolve().parents[1]
NAME = "line"


@dataclass(frozen=True)
class Line:
    """One whole run: wall seconds (and of the second one, unchanged), seconds by notebook, stage and start, what was measured."""

    checkout: str
    code: int
    passed: bool
    seconds: float
    unchanged: float | None
    parts: Mapping[str, float]
    exact: Mapping[str, float | None]


def run(checkout: Path, folder: Path, arguments: Sequence[str]) -> Line:
    """A fresh run of a checkout below ``folder``, then the same again."""
    python = checkout / ".venv/bin/python"
    command = [
        str(python if python.is_file() else sys.executable),
        "-m",
        "pipeline",
        "run",
        "--name",
        NAME,
        "--output",
        str(folder),
    ]
    environment = {**os.environ, "PYTHONPATH": str(checkout)}
    took, codes = [], []
    for _ in range(2):
        begun = time.monotonic()
        codes.append(subprocess.run([*command, *arguments], cwd=checkout, env=environment, check=False).returncode)
        took.append(time.monotonic() - begun)
        if codes[0] != 0:  # what failed is done again, which says nothing
            break
    report = read(folder / NAME / "report/report.json")
    exact = {"in process": report.get("eval", {}).get("tuned", {}).get("exact")}
    exact |= {backend["name"]: backend["exact"] for backend in report.get("backends", [])}
    unchanged = took[1] if len(took) > 1 else None
    return Line(str(checkout), codes[0], bool(report.get("passed")), took[0], unchanged, parts(folder / NAME), exact)


def parts(run_folder: Path) -> dict[str, float]:
    """Seconds of each notebook (from its executed copy), of each stage and of each engine's start (from the manifest)."""
    manifest, found = read(run_folder / "manifest.json"), dict[str, float]()
    for copy in sorted((run_folder / "notebooks").glob("*.ipynb")):
        seconds = read(copy).get("metadata", {}).get("papermill", {}).get("duration")
        if seconds is not None:
            found[f"notebook {copy.stem}"] = float(seconds)
    found |= {name: float(stage["seconds"]) for name, stage in manifest.get("stages", {}).items() if name != "run"}
    for begun in manifest.get("starts", []):
        if begun["ready_seconds"] is not None:
            found[f"start of {begun['engine']}"] = float(begun["ready_seconds"])
    return found


def read(path: Path) -> dict[str, Any]:
    """A JSON object; empty where there is none."""
    return dict(json.loads(path.read_text(encoding="utf-8"))) if path.is_file() else {}


def table(lines: Sequence[Line]) -> str:
    """Seconds by part, one column a checkout, and with two their ratio (the last to the first)."""
    rows = [("whole run", [line.seconds for line in lines]), ("again, unchanged", [line.unchanged for line in lines])]
    for name in dict.fromkeys(name for line in lines for name in line.parts):
        rows.append((name, [line.parts.get(name) for line in lines]))
    heads = ["seconds", *(f"{Path(line.checkout).name}{'' if line.passed else ' (not passed)'}" for line in lines)]
    heads += ["ratio"] if len(lines) == 2 else []
    text = [f"| {' | '.join(heads)} |", f"|{' --- |' * len(heads)}"]
    for name, values in rows:
        cells = ["" if value is None else f"{value:.1f}" for value in values]
        first, last = values[0], values[-1]
        ratio = [f"{last / first:.2f}" if first and last is not None else ""] if len(lines) == 2 else []
        text.append(f"| {' | '.join([name, *cells, *ratio])} |")
    return "\n".join(text)


def main(argv: list[str] | None = None) -> int:
    """Run the comparison; returns 0 when every run left a report, 3 otherwise."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--against", type=Path, help="folder of the other checkout, run first")
    parser.add_argument("--quick", action="store_true", help="20 steps of training; its answers are bad ones")
    parser.add_argument("--backends", default="vllm,llamacpp", help="as for granite-pipeline run")
    parser.add_argument("--keep", type=Path, help="folder for the runs, kept afterwards (default: a temporary one)")
    parser.add_argument("--out", type=Path, default=Path("benchmarks/results/line.json"), help="file for the JSON")
    args, lines = parser.parse_args(argv), list[Line]()
    arguments = ["--backends", args.backends, *(["-p", "MAX_STEPS=20"] if args.quick else [])]
    with tempfile.TemporaryDirectory(prefix="benchmark-line-") as scratch:
        for number, checkout in enumerate([*([args.against.resolve()] if args.against else []), HERE]):
            lines.append(run(checkout, (args.keep or Path(scratch)).resolve() / f"{number}", arguments))
            args.out.parent.mkdir(parents=True, exist_ok=True)
            args.out.write_text(json.dumps([asdict(line) for line in lines], indent=2) + "\n", encoding="utf-8")
    sys.stdout.write(table(lines) + "\n")
    return 0 if all(any(value is not None for value in line.exact.values()) for line in lines) else 3


if __name__ == "__main__":
    sys.exit(main())
