"""The runs of a sweep on a Ray cluster, each a core task on whichever machine is free; nothing else here knows Ray.

The product is installed on every machine, the output folder is at one path. When a machine is lost Ray starts its runs elsewhere,
and they go on from what is in the folder; when the driver is lost Ray ends the tasks, and with them the runs.
"""

import io
import logging
import os
import signal
import socket
import sys
import threading
import time
from collections import deque
from collections.abc import Generator, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, TextIO

from pipeline.errors import EnvironmentFailure, InputError, MissingDependency
from pipeline.runs import interrupt
from pipeline.sweep import guarded
from pipeline.sweep.guarded import MACHINE, STOPPED, Job, Outcome
from pipeline.sweep.spec import Resources

log = logging.getLogger(__name__)
_POLL_SECONDS = 0.5
_MOST_PENDING = 1000
_THREADS = "ray_"  # how the names of those that print what happens in the cluster begin
_NO_CLUSTER = (
    "ray start --head on one machine, ray start --address=HEAD:6379 on the others, then RAY_ADDRESS=HEAD:6379 here "
    "(one token and one version of Ray and Python for all: see docs/scale.md), or use --on local"
)


def map(jobs: Sequence[Job], resources: Resources, at_once: int | None = None, *, aside: Path) -> Generator[Outcome, None, None]:
    """Do the runs and yield how each ended, in the order in which they do; what Ray says goes into the file ``aside``.

    As :func:`pipeline.sweep.local.map`. Raises MissingDependency without Ray, EnvironmentFailure without a cluster.
    """
    with _apart(aside):
        ray = _connected(aside)
        try:
            yield from _done(ray, jobs, _options(ray, resources), at_once or _MOST_PENDING)
        finally:
            # what is not over ends with its job
            ray.shutdown()


def _done(ray: Any, jobs: Sequence[Job], options: dict[str, Any], most: int) -> Generator[Outcome, None, None]:
    attempt = ray.remote(_attempt).options(**options)
    waiting: deque[tuple[Job, int, float]] = deque((job, 1, 0.0) for job in jobs)
    pending: dict[Any, tuple[Job, int]] = {}
    told = False
    while waiting or pending:
        if interrupt.asked() and not told:
            told = True
            waiting.clear()
            for reference in pending:
                ray.cancel(reference, force=False)
        now = time.monotonic()
        for entry in [entry for entry in waiting if entry[2] <= now][: most - len(pending)]:
            waiting.remove(entry)
            job, tries, _ = entry
            pending[attempt.remote(job)] = (job, tries)
        if not pending:
            time.sleep(_POLL_SECONDS)
            continue
        for reference in ray.wait(list(pending), timeout=_POLL_SECONDS)[0]:
            job, tries = pending.pop(reference)
            outcome = _outcome(ray, reference, job, tries, stopping=told)
            if outcome is None:
                continue
            if outcome.again and not told:
                waiting.append((job, tries + 1, time.monotonic() + outcome.pause))
            else:
                yield outcome


def _outcome(ray: Any, reference: Any, job: Job, tries: int, *, stopping: bool) -> Outcome | None:
    """How a task ended; None for one that had not begun when it was cancelled: its run still waits."""
    try:
        code, where, seconds, said = ray.get(reference)
    except ray.exceptions.RayError as error:
        # the task, not the run in it: the product or the folder is not there on that machine, or it was cancelled
        if stopping:
            return None
        lines = [line for line in str(error).splitlines() if line.strip()]
        return Outcome(job.name, MACHINE, "Ray", tries, said=lines[-1] if lines else repr(error))
    return Outcome(job.name, STOPPED if stopping and code == MACHINE else code, where, tries, seconds, said)


def _attempt(job: Job) -> tuple[int, str, float, str]:
    """One try of a run, in a worker of Ray: exit code, machine, seconds, last words. Cancelling the task lets the run save."""
    # Ray cancels by SIGINT, which it blocks in all that ray start starts, and which may have been ignored where that was typed
    signal.signal(signal.SIGINT, signal.default_int_handler)
    signal.pthread_sigmask(signal.SIG_UNBLOCK, [signal.SIGINT])
    begun, stopping = time.monotonic(), False
    process = guarded.start(job, {})
    try:
        while process.poll() is None:
            try:
                time.sleep(0.2)
            except KeyboardInterrupt:
                if stopping:
                    raise
                stopping = True
                guarded.ask_to_stop(process)
    finally:
        guarded.end([process])
    code = guarded.meaning(process.returncode, stopping=stopping)
    return code, socket.gethostname(), time.monotonic() - begun, guarded.last_words(job.log) if code else ""


def _options(ray: Any, resources: Resources) -> dict[str, Any]:
    """What a task asks for; Ray gives its GPUs and threads by the usual variables."""
    nodes = [node["Resources"] for node in ray.nodes() if node["Alive"]]
    has_gpus = any(node.get("GPU") for node in nodes)
    wanted = {"CPU": resources.cpus or 1, "GPU": (1 if has_gpus else 0) if resources.gpus is None else resources.gpus}
    if resources.memory_gib:
        wanted["memory"] = int(resources.memory_gib * 2**30)
    if not any(all(node.get(name, 0) >= value for name, value in wanted.items()) for node in nodes):
        asked = ", ".join(f"{value:g} {name}" for name, value in wanted.items() if value)
        log.warning("no machine of the cluster has what a run asks for (%s): the runs wait until one joins", asked)
    log.info("Ray: %d machines, %g CPUs, %g GPUs", len(nodes), *(sum(n.get(name, 0) for n in nodes) for name in ("CPU", "GPU")))
    # lost machines are Ray's to retry, for ever; a run that failed is ours, after a pause
    asked_for = {"num_cpus": wanted["CPU"], "num_gpus": wanted["GPU"], "memory": wanted.get("memory")}
    return {**asked_for, "max_retries": -1, "retry_exceptions": False, "scheduling_strategy": "SPREAD"}


def _connected(aside: Path) -> Any:
    address = os.environ.get("RAY_ADDRESS") or "auto"
    if "://" in address:
        raise InputError(f"RAY_ADDRESS={address} is not HEAD:6379", remedy="run the sweep on a machine of the cluster")
    handlers = {number: signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)}
    try:
        import ray
    except ImportError:
        remedy = "make setup, or pip install 'granite-pipeline[scale]', on every machine of the cluster"
        raise MissingDependency("ray is not installed", remedy=remedy) from None
    try:
        ray.init(address=address, log_to_driver=False, logging_level=logging.ERROR, configure_logging=True)
    except (ConnectionError, RuntimeError, ValueError, ray.exceptions.RayError) as error:
        lines = [line for line in str(error).splitlines() if line.strip()][:4]
        evidence = "\n".join([*lines, f"Ray's own words: {aside}"])
        raise EnvironmentFailure(f"no Ray cluster could be joined at {address}", evidence=evidence, remedy=_NO_CLUSTER) from None
    finally:
        # Ray has its own for SIGTERM, after which the exit code would say something else
        for number, handler in handlers.items():
            signal.signal(number, handler)
    return ray


@contextmanager
def _apart(file: Path) -> Iterator[None]:
    """Send what this process's libraries write to stderr, and Ray's threads print, into a file; what else Python writes stays."""
    before, out_before = sys.stderr, sys.stdout
    before.flush()
    kept = os.dup(2)
    with file.open("ab") as out:
        os.dup2(out.fileno(), 2)
    ours = os.fdopen(os.dup(kept), "w", buffering=1, encoding="utf-8", errors="replace")
    theirs = file.open("a", buffering=1, encoding="utf-8")
    mine = [
        h for h in logging.getLogger().handlers if isinstance(h, logging.StreamHandler) and getattr(h, "stream", None) is before
    ]
    for handler in mine:
        handler.setStream(ours)
    sys.stderr, sys.stdout = _Sorted(ours, theirs), _Sorted(out_before, theirs)
    try:
        yield
    finally:
        for handler in mine:
            handler.setStream(before)
        out_before.flush()
        sys.stderr, sys.stdout = before, out_before
        os.dup2(kept, 2)
        os.close(kept)
        ours.close()
        theirs.close()


class _Sorted(io.TextIOBase):
    """A stream that gives what Ray's own threads print to another one."""

    def __init__(self, ours: TextIO, theirs: TextIO) -> None:
        self._ours, self._theirs = ours, theirs

    def write(self, text: str) -> int:
        """Write to the stream of the thread that it is called in."""
        return (self._theirs if threading.current_thread().name.startswith(_THREADS) else self._ours).write(text)

    def flush(self) -> None:
        """Flush ours; the other is written by lines."""
        self._ours.flush()

    def isatty(self) -> bool:
        """Whether ours is a terminal."""
        return self._ours.isatty()

    def fileno(self) -> int:
        """That of ours."""
        return self._ours.fileno()

    @property
    def encoding(self) -> str:  # type: ignore[override]
        """That of ours."""
        return self._ours.encoding
