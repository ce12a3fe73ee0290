"""Run the line in a killable process, kill it at a chosen moment of a chosen stage, and look at what it left."""

from __future__ import annotations

import json
import os
import queue
import random
import re
import signal
import subprocess
import sys
import threading
import time
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from pipeline.model.gguf import read_gguf_header
from pipeline.runs.files import leftovers
from pipeline.runs.folder import RunFolder
from pipeline.runs.hashes import sha256_tree
from training.tuning import checkpoints

STAGES = ("finetune", "merge", "gguf", "modelfile", "evaluate_base", "evaluate_tuned")
FINAL = (
    "adapter",
    "heldout.jsonl",
    "merged_fp16",
    "unsloth.Q8_0.gguf",
    "Modelfile",
    "reference/base.jsonl",
    "reference/tuned.jsonl",
)
_STARTED = re.compile(r"(\w+): started")
_RESUMED = re.compile(r"resuming from checkpoint-(\d+)")


@dataclass
class Kill:
    """One kill: in which stage, how long after its start, the newest checkpoint that was there, whole or not, and the step
    that the next training went on from (0: from the start, or there was none)."""

    stage: str
    after: float
    newest: int
    logged: int  # characters of the log by then
    resumed: int = 0


class Line:
    """The forking process of ``line.py`` and what its children log."""

    def __init__(self, log: Path) -> None:
        environment = {**os.environ, "HF_HUB_OFFLINE": "1", "TOKENIZERS_PARALLELISM": "false", "OMP_NUM_THREADS": "1"}
        command = [sys.executable, str(Path(__file__).with_name("line.py"))]
        self.process = subprocess.Popen(
            command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, env=environment
        )
        self.lines: queue.Queue[str] = queue.Queue()
        self.log = log
        self._reader = threading.Thread(target=self._read, daemon=True)
        self._reader.start()
        assert self._answer() == "ready"

    def _read(self) -> None:
        assert self.process.stderr
        with self.log.open("a") as out:
            for text in self.process.stderr:
                out.write(text)
                out.flush()
                self.lines.put(text)

    def _answer(self) -> str:
        assert self.process.stdout
        return self.process.stdout.readline().strip()

    def start(self, request: dict[str, Any]) -> int:
        while not self.lines.empty():
            self.lines.get()
        assert self.process.stdin
        self.process.stdin.write(json.dumps(request) + "\n")
        self.process.stdin.flush()
        return int(self._answer())

    def wait(self) -> int:
        """Exit status of the child."""
        return int(self._answer())

    def seen(self, pid: int, stage: str, seconds: float = 120) -> str | None:
        """Wait until a child starts a stage, or one after it when that is done; which one, None when it ends before."""
        deadline = time.monotonic() + seconds
        while time.monotonic() < deadline:
            try:
                found = _STARTED.search(self.lines.get(timeout=0.05))
            except queue.Empty:
                if _gone(pid):
                    return None
                continue
            if found and STAGES.index(found[1]) >= STAGES.index(stage):
                return found[1]
        raise TimeoutError(f"{stage} was not reached; see {self.log}")

    def said(self) -> str:
        """Everything the children have logged."""
        time.sleep(0.05)  # the reader is a thread
        return self.log.read_text()

    def close(self) -> None:
        assert self.process.stdin and self.process.stdout and self.process.stderr
        self.process.stdin.close()
        self.process.wait(30)
        self._reader.join(10)
        self.process.stdout.close()
        self.process.stderr.close()


def _gone(pid: int) -> bool:
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] == "Z"
    except OSError:
        return True


@dataclass
class Watcher:
    """Looks at the final names all the time; whatever is there must be whole, which is to say as in the reference run."""

    run: RunFolder
    expected: dict[str, str]
    wrong: list[str] = field(default_factory=list)
    _seen: dict[str, tuple[int, int]] = field(default_factory=dict)
    _stop: threading.Event = field(default_factory=threading.Event)

    def __enter__(self) -> Watcher:
        self._thread = threading.Thread(target=self._watch, daemon=True)
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._stop.set()
        self._thread.join()
        self.look()

    def _watch(self) -> None:
        while not self._stop.wait(0.02):
            self.look()

    def look(self) -> None:
        """Compare each final name that appeared, or changed, since the last look."""
        for name, digest in self.expected.items():
            path = self.run.path / name
            try:
                state = path.stat()
                mark = (state.st_ino, state.st_mtime_ns)
                if self._seen.get(name) != mark:
                    self._seen[name] = mark
                    if (found := sha256_tree(path)) != digest:
                        self.wrong.append(f"{name}: {found} instead of {digest}")
            except FileNotFoundError:
                continue


def artefacts(run: RunFolder) -> dict[str, str]:
    """Hash of each artefact of a run."""
    return {name: sha256_tree(run.path / name) for name in FINAL if (run.path / name).exists()}


def newest_checkpoint(run: RunFolder) -> int:
    """Step of the newest checkpoint folder, whole or not; 0 when there is none."""
    found = checkpoints.found(run.checkpoints) if run.checkpoints.is_dir() else []
    return int(found[0].name.rpartition("-")[2]) if found else 0


def round_of_kills(line: Line, request: dict[str, Any], seed: int, plan: list[str], seconds: dict[str, float]) -> list[Kill]:
    """Kill the line once in each stage of ``plan`` (in order), then let it finish; the moment within the stage is random."""
    chance, run, kills = random.Random(seed), RunFolder("t", Path(request["output"])), []
    for stage in plan:
        pid = line.start(request)
        started = line.seen(pid, stage)
        if started is None:
            line.wait()  # everything is done
            break
        after = chance.uniform(0, seconds[started])
        time.sleep(after)
        os.killpg(pid, signal.SIGKILL) if not _gone(pid) else None
        status = line.wait()
        if status == -signal.SIGKILL:
            kills.append(Kill(started, round(after, 3), newest_checkpoint(run), len(line.said())))
    line.start(request)
    assert line.wait() == 0, f"the last run failed; see {line.log}"
    said, ends = line.said(), [*(kill.logged for kill in kills[1:]), None]
    for kill, end in zip(kills, ends, strict=False):
        found = _RESUMED.search(said[kill.logged : end])
        kill.resumed = int(found[1]) if found else 0
    return kills


def require_tidy(run: RunFolder) -> None:
    """Nothing of the killed processes is left, and what is there can be read."""
    assert leftovers(run.path) == []
    assert not run.checkpoints.exists()
    if run.gguf.exists():
        assert read_gguf_header(run.gguf).tensors
    json.loads(run.manifest.read_text())
