"""The runs of a sweep on this machine, as many at once as its GPUs, cores and memory take."""

import os
import socket
import subprocess
import time
from collections import deque
from collections.abc import Generator, Sequence

from pipeline.errors import InputError
from pipeline.machine.hardware import Hardware
from pipeline.runs import interrupt
from pipeline.sweep import guarded
from pipeline.sweep.guarded import Job, Outcome
from pipeline.sweep.spec import Resources

_POLL_SECONDS = 0.2


def map(jobs: Sequence[Job], resources: Resources, at_once: int | None = None) -> Generator[Outcome, None, None]:
    """Do the runs and yield how each ended, in the order in which they do; InputError when ``at_once`` are more than fit.

    A run that the machine failed is tried again after a pause. When the user asks to stop, no more are started, those that
    work save and end. However this ends, no run outlives it.
    """
    slots = _slots(resources, at_once)
    waiting: deque[tuple[Job, int, float]] = deque((job, 1, 0.0) for job in jobs)
    running: dict[subprocess.Popen[bytes], tuple[Job, int, float, dict[str, str]]] = {}
    told = False
    try:
        while waiting or running:
            if interrupt.asked() and not told:
                told = True
                waiting.clear()
                for process in running:
                    guarded.ask_to_stop(process)
            now = time.monotonic()
            for entry in [entry for entry in waiting if entry[2] <= now][: len(slots)]:
                waiting.remove(entry)
                job, tries, _ = entry
                slot = slots.pop(0)
                running[guarded.start(job, slot)] = (job, tries, now, slot)
            for process in [process for process in running if process.poll() is not None]:
                job, tries, begun, slot = running.pop(process)
                slots.append(slot)
                code = guarded.meaning(process.returncode, stopping=told)
                said = guarded.last_words(job.log) if code else ""
                outcome = Outcome(job.name, code, socket.gethostname(), tries, time.monotonic() - begun, said)
                if outcome.again and not told:
                    waiting.append((job, tries + 1, time.monotonic() + outcome.pause))
                else:
                    yield outcome
            time.sleep(_POLL_SECONDS)
    finally:
        guarded.end(list(running))


def _slots(resources: Resources, at_once: int | None) -> list[dict[str, str]]:
    """The environment of each run that may be done at the same time: its GPUs and its threads."""
    machine = Hardware.detect()
    needed = resources.gpus if resources.gpus is not None else (1 if machine.accelerator == "nvidia" else 0)
    if needed:
        gpus = _gpus(machine)
        size = max(1, int(needed))
        found = [",".join(gpus[i : i + size]) for i in range(0, len(gpus) - size + 1, size)] * int(1 / min(needed, 1))
        if not found or (at_once or 0) > len(found):
            what = f"{at_once or 1} runs at once with {needed:g} GPUs each do not fit the {len(gpus)} GPUs of this machine"
            raise InputError(what, remedy=f"use --jobs {len(found)}" if found else "lower gpus in the spec's resources")
        slots = [{"CUDA_VISIBLE_DEVICES": ids} for ids in found[:at_once]]
    else:
        # cores and memory can be shared, so that more may be asked for than there are
        fits = [machine.cpu.cores // resources.cpus] if resources.cpus else []
        fits += [machine.ram_free_gib // resources.memory_gib] if resources.memory_gib else []
        slots = [{} for _ in range(at_once or max(1, int(min(fits, default=1))))]
    if resources.cpus or (len(slots) > 1 and "OMP_NUM_THREADS" not in os.environ):
        threads = str(max(1, int(resources.cpus or machine.cpu.cores // len(slots))))
        slots = [{**slot, "OMP_NUM_THREADS": threads} for slot in slots]
    return slots


def _gpus(machine: Hardware) -> list[str]:
    """The names by which CUDA knows the GPUs that may be used."""
    named = os.environ.get("CUDA_VISIBLE_DEVICES", "")
    if any(gpu.mig for gpu in machine.gpus) and not named:
        what = "the slices of a GPU (MIG) have no numbers to give to runs"
        raise InputError(what, remedy="name their UUIDs in CUDA_VISIBLE_DEVICES (nvidia-smi lists them)")
    return named.split(",") if named else [str(i) for i in range(len(machine.gpus))]
