"""One training by several processes, one for each GPU: torchrun's agent starts them, and they end with who asked for them.

The parent - a notebook's kernel or the command line - holds the lock, prepares the rows and records the result. Each process (rank)
does the whole training on its part of every step's rows; the first one writes checkpoints and adapter. They find each other through
a file and talk over the loopback interface: no port is open.
"""

import ctypes
import json
import logging
import math
import os
import pickle
import select
import signal
import subprocess
import sys
import tempfile
import threading
import time
import traceback
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from datetime import timedelta
from pathlib import Path
from typing import Any, TypeVar

import psutil

from pipeline import errors
from pipeline.errors import EnvironmentFailure, InputError, PipelineError
from pipeline.machine.hardware import Hardware
from pipeline.runs import interrupt
from pipeline.runs import log as runlog
from pipeline.runs.files import read_json, write_json
from training.memory import Need, finetune_need
from training.parameters import FinetuneParameters

log = logging.getLogger(__name__)
_T = TypeVar("_T")
# the first process seals checkpoints of many gigabytes while the others wait
_WAITS = timedelta(hours=1)
_POLL_SECONDS, _END_SECONDS = 0.3, 10.0
_WEIGHTS, _MOMENTS, _SCHEDULE = "weights.pt", "optimizer.pt", "scheduler.pt"
_JOB, _RESULT, _STOP, _ENDED, _MEETING = "job", "result.json", "stop", "ended.json", "meeting"
# what a process raises whose counterpart is gone: the consequence, not the cause
_LOST = ("gloo", "NCCL", "Connection closed", "Connection reset", "Broken pipe", "DistBackendError", "DistNetworkError")
_REMEDY = "run the same command again to go on from the last checkpoint; with --processes 1 it trains in one process"


@dataclass(frozen=True)
class Plan:
    """How many processes train together and why, what each of them needs, and the memory that each may have in GiB.

    ``sharded``: each keeps its part of the weights (FSDP); else all of them (DDP).
    """

    processes: int
    sharded: bool
    reason: str
    need: Need
    free: float
    where: str

    @property
    def kind(self) -> str:
        """``one``, ``ddp`` or ``fsdp``."""
        return "one" if self.processes == 1 else "fsdp" if self.sharded else "ddp"

    def told(self, params: FinetuneParameters) -> str:
        """The division for a log: who computes how many rows."""
        size, batches = batch(params, self.processes)
        name = {"ddp": "data-parallel (DDP)", "fsdp": "sharded (FSDP)"}[self.kind]
        return f"{self.processes} processes, {name}, each with {batches} batches of {size} rows of a step's {params.rows_a_step}"


def planned(params: FinetuneParameters, base: Path, longest: int, machine: Hardware | None = None) -> Plan:
    """One process for each GPU, or as many as were asked for; sharded where the model does not fit one GPU.

    ``auto`` takes the most GPUs over which a step's rows divide, so that what is computed is what one process would compute.
    Raises InputError when more were asked for than there are GPUs.
    """
    machine = machine or Hardware.detect()
    free = [gpu.free_gib for gpu in machine.gpus]
    # of the slices of divided GPUs (MIG) a process sees one
    gpus, reason = len([gpu for gpu in machine.gpus if not gpu.mig]) or min(1, len(free)), ""
    if params.processes != "auto":
        count = int(params.processes)
        if gpus and count > gpus:
            raise InputError(
                f"{count} processes were asked for, one a GPU, and there are {gpus} GPUs", remedy="use --processes auto"
            )
    elif gpus < 2 or params.trainer == "unsloth":
        count, reason = 1, "unsloth trains in one process" if gpus > 1 else ""
    else:
        count = max(n for n in range(1, gpus + 1) if params.rows_a_step % n == 0)
        if count < gpus:
            reason = f"a step's {params.rows_a_step} rows cannot be divided over {gpus} GPUs, see --gradient-accumulation"
    # one process alone takes the best GPU into account, as it always has; of several, the smallest decides
    least = (max(free) if count == 1 else min(free)) if gpus else machine.ram_free_gib / count
    where = "GPU memory" if gpus else "memory"
    here = replace(params, batch_size=batch(params, count)[0], gradient_accumulation=1, processes="auto")
    need = finetune_need(base, here, longest)
    # four-bit weights cannot be cut into parts
    sharded = count > 1 and need.gib > least and params.method != "qlora"
    if sharded:
        said = f"{need.gib:.1f} GiB do not fit the {least:.1f} that are free, so each process keeps a part of the weights"
        reason = f"{said}; {reason}" if reason else said
        need = finetune_need(base, here, longest, parts=count)
    return Plan(count, sharded, reason, need, least, where)


def batch(params: FinetuneParameters, processes: int) -> tuple[int, int]:
    """Rows of a batch and batches a step of each process: no batch is larger than was asked for, and a step has the same rows."""
    rows = params.rows_a_step // processes
    size = max(n for n in range(1, min(rows, params.batch_size) + 1) if rows % n == 0)
    return size, rows // size


class Share:
    """Batches of row numbers for one of several processes: of each step's rows an equal part, in the order of ``numbers``.

    Every process has as many batches; one for which a last, smaller step leaves no row gets ``nothing``, the number of a row
    without loss. A batch sampler of PyTorch.
    """

    def __init__(self, numbers: Any, step: int, size: int, rank: int, processes: int) -> None:
        self.numbers, self.step, self.size, self.rank, self.processes = numbers, step, size, rank, processes
        self.nothing = len(numbers)

    @property
    def batch_sampler(self) -> "Share":
        """Where transformers looks for what it tells the epoch."""
        return self

    def set_epoch(self, epoch: int) -> None:
        """Shuffle as in this epoch."""
        self.numbers.set_epoch(epoch)

    def __len__(self) -> int:
        whole, left = divmod(len(self.numbers), self.step)
        return whole * self._batches(self.step) + self._batches(left)

    def __iter__(self) -> Iterator[list[int]]:
        numbers = list(self.numbers)
        for start in range(0, len(numbers), self.step):
            rows = numbers[start : start + self.step]
            mine = rows[len(rows) * self.rank // self.processes : len(rows) * (self.rank + 1) // self.processes]
            made = [mine[i : i + self.size] for i in range(0, len(mine), self.size)]
            yield from made
            yield from [[self.nothing]] * (self._batches(len(rows)) - len(made))

    def _batches(self, rows: int) -> int:
        most = math.ceil(rows / self.processes)
        return math.ceil(most / self.size)


# --- in a process -------------------------------------------------------------------------------------------------------------


def world() -> int:
    """How many processes train together: 1 outside of a training by several."""
    return int(os.environ["WORLD_SIZE"]) if _of_several() else 1


def rank() -> int:
    """The number of this process among those that train together, from 0."""
    return int(os.environ["RANK"]) if _of_several() else 0


def _of_several() -> bool:
    dist = sys.modules.get("torch.distributed")
    return bool(dist and dist.is_available() and dist.is_initialized())


def once(work: Callable[[], _T]) -> _T:
    """What the first process makes, in all of them."""
    if world() == 1:
        return work()
    import torch.distributed as dist

    made = [work() if rank() == 0 else None]
    dist.broadcast_object_list(made, src=0)
    return made[0]  # type: ignore[return-value]


def agreed(asked: bool) -> bool:
    """Whether any of the processes says so; all wait for each other."""
    if world() == 1:
        return asked
    import torch
    import torch.distributed as dist

    said = torch.tensor([int(asked)])
    dist.all_reduce(said, op=dist.ReduceOp.MAX)
    return bool(said.item())


def shard(model: Any) -> None:
    """Cut the weights of a model into parts, one for each process (FSDP2): a decoder layer's are together while it computes."""
    import torch
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.fsdp import fully_shard

    mesh = init_device_mesh("cuda" if torch.cuda.is_available() else "cpu", (world(),))
    inner = model.get_base_model() if hasattr(model, "peft_config") else model
    layers = set(inner._no_split_modules or ())
    for module in model.modules():
        if type(module).__name__ in layers:
            fully_shard(module, mesh=mesh)
    # also of what lies outside of layers: an optimizer that is made after a scoring must find the parts
    fully_shard(model, mesh=mesh, reshard_after_forward=True)


def together(model: Any) -> bool:
    """Whether the processes' gradients of a model are put together: by DDP around it, or because it was cut by :func:`shard`."""
    from torch.distributed.fsdp import FSDPModule
    from torch.nn.parallel import DistributedDataParallel

    return isinstance(model, DistributedDataParallel | FSDPModule)


def whole(tensor: Any) -> Any:
    """A weight of which each process has a part, put together; any other as it is. All processes take part."""
    return tensor.full_tensor() if hasattr(tensor, "full_tensor") else tensor


def trained_weights(model: Any) -> dict[str, Any]:
    """What training changes of a sharded model, whole and on the CPU in the first process, empty in the others."""
    from torch.distributed.checkpoint.state_dict import get_model_state_dict

    # a weight that is there under two names (embedding and head) once, as a model is saved
    trained = {name for name, weight in model.named_parameters() if weight.requires_grad}
    return {name: value for name, value in get_model_state_dict(model, options=_whole_state()).items() if name in trained}


def _whole_state() -> Any:
    from torch.distributed.checkpoint.state_dict import StateDictOptions

    return StateDictOptions(full_state_dict=True, cpu_offload=True, strict=False)


def sharded_trainer(plain: type[Any]) -> type[Any]:
    """A Trainer of a model that :func:`shard` has cut: its checkpoints hold whole tensors, so any number of processes goes on from them."""
    import torch
    from torch.distributed.checkpoint import state_dict as states

    class Sharded(plain):  # type: ignore[misc]
        def _move_model_to_device(self, model: Any, device: Any) -> None:
            """It is there already."""

        def _clip_grad_norm(self, model: Any) -> Any:
            return whole(super()._clip_grad_norm(model))

        def save_model(self, output_dir: str | None = None, _internal_call: bool = False) -> None:
            weights = trained_weights(self.model)
            if rank() == 0:
                folder = Path(str(output_dir))
                folder.mkdir(parents=True, exist_ok=True)
                torch.save(weights, folder / _WEIGHTS)

        def _load_from_checkpoint(self, resume_from_checkpoint: str, model: Any = None) -> None:
            weights = torch.load(Path(resume_from_checkpoint) / _WEIGHTS, map_location="cpu", weights_only=True)
            states.set_model_state_dict(self.model, weights, options=_whole_state())

        def _save_optimizer_and_scheduler(self, output_dir: str) -> None:
            moments = states.get_optimizer_state_dict(self.model, self.optimizer.optimizer, options=_whole_state())
            if rank() == 0:
                torch.save(moments, Path(output_dir) / _MOMENTS)
                torch.save(self.lr_scheduler.state_dict(), Path(output_dir) / _SCHEDULE)

        def _load_optimizer_and_scheduler(self, checkpoint: str | None) -> None:
            if checkpoint is not None:
                moments, schedule = (
                    torch.load(Path(checkpoint) / name, map_location="cpu", weights_only=True) for name in (_MOMENTS, _SCHEDULE)
                )
                states.set_optimizer_state_dict(self.model, self.optimizer.optimizer, moments, options=_whole_state())
                self.lr_scheduler.load_state_dict(schedule)

    return Sharded


class _Lines(logging.Handler):
    """What is logged as lines of JSON, which the parent logs anew."""

    def emit(self, record: logging.LogRecord) -> None:
        """One line; a parent that is gone ends this process anyway."""
        text = record.getMessage()
        if record.exc_info:
            text += "\n" + logging.Formatter().formatException(record.exc_info)
        line = json.dumps({"level": record.levelno, "name": record.name, "text": text})
        sys.stdout.write(f"{line}\n")
        sys.stdout.flush()


def _work(folder: Path) -> None:
    """One of the processes: do the job; the first one leaves the result in ``folder``."""
    number = int(os.environ["RANK"])
    handler = _Lines()
    # that something went wrong is said once, by whom it went wrong for first
    runlog.begin(handler, level=logging.INFO if number == 0 else logging.ERROR, again=True)
    try:
        import torch
        import torch.distributed as dist

        work, job = pickle.loads((folder / _JOB).read_bytes())
        on_gpu = torch.cuda.is_available()
        if on_gpu:
            torch.cuda.set_device(int(os.environ["LOCAL_RANK"]))
        else:
            # accelerate would say cpu:0, as which torch loads no checkpoint
            os.environ["ACCELERATE_TORCH_DEVICE"] = "cpu"
        address: dict[str, Any] = {"rank": number, "world_size": int(os.environ["WORLD_SIZE"]), "timeout": _WAITS}
        address["init_method"] = (folder / _MEETING).absolute().as_uri()
        dist.init_process_group("cuda:nccl,cpu:gloo" if on_gpu else "gloo", **address)
        _stopped_by(folder / _STOP)
        result = work(job)
        if number == 0:
            write_json(folder / _RESULT, result)
        agreed(False)
        dist.destroy_process_group()
    except BaseException as error:
        _tell(folder / f"error-{number}.json", error)
        sys.stdout.flush()
        os._exit(1)  # taking down a group that has lost a member may wait for it


def _stopped_by(file: Path) -> None:
    """Make this process one that is asked to stop by a file; see :func:`asked`."""
    global _stop
    _stop = file


_stop: Path | None = None


def asked() -> bool:
    """Whether the user has asked to stop: the same answer in all processes, which wait for each other."""
    if world() == 1:
        return interrupt.asked()
    if agreed(rank() == 0 and _stop is not None and _stop.exists()):
        interrupt.ask()
    return interrupt.asked()


def _tell(path: Path, error: BaseException) -> None:
    known = isinstance(error, PipelineError)
    kind, text = type(error).__name__, str(error.message if isinstance(error, PipelineError) else error)
    said = {"at": time.time(), "kind": kind, "known": known, "message": text}
    if isinstance(error, PipelineError):
        said |= {"evidence": error.evidence, "remedy": error.remedy}
    else:
        said["lost"] = any(word in f"{kind} {text}" for word in _LOST)
        said["evidence"] = "".join(traceback.format_exception(error)[-4:]).strip()
    write_json(path, said)


# --- in the agent -------------------------------------------------------------------------------------------------------------


def _agent(folder: Path, processes: int) -> int:
    """Start the processes and wait for them; when one fails, end the others and write which ended how."""
    from torch.distributed.elastic.multiprocessing import DefaultLogsSpecs, Std
    from torch.distributed.elastic.multiprocessing.errors import ChildFailedError
    from torch.distributed.launcher.api import LaunchConfig, elastic_launch

    config = LaunchConfig(
        min_nodes=1,
        max_nodes=1,
        nproc_per_node=processes,
        run_id=folder.name,
        rdzv_backend="c10d",
        rdzv_endpoint=str(folder / "agent"),
        rdzv_configs={"store_type": "file"},
        max_restarts=0,
        local_addr="127.0.0.1",
        logs_specs=DefaultLogsSpecs(log_dir=str(folder), redirects=Std.ERR),
        shutdown_timeout=5,
    )
    try:
        elastic_launch(config, sys.executable)("-u", "-m", __spec__.name, "work", str(folder), str(os.getpid()))
    except ChildFailedError as error:
        ended = {str(number): {"code": one.exitcode, "pid": one.pid} for number, one in error.failures.items()}
        write_json(folder / _ENDED, ended)
        return 1
    return 0


def _end_with(parent: int) -> None:
    """Let this process be killed when its parent ends, however that ends."""
    if sys.platform == "linux":
        set_parent_death_signal = 1
        ctypes.CDLL(None).prctl(set_parent_death_signal, signal.SIGKILL)
    else:
        threading.Thread(target=_watch, args=(parent,), daemon=True).start()
    if os.getppid() != parent:
        os._exit(1)


def _watch(parent: int) -> None:
    while os.getppid() == parent:
        time.sleep(_POLL_SECONDS)
    os._exit(1)


# --- in the parent ------------------------------------------------------------------------------------------------------------


def run(work: Callable[[Any], dict[str, Any]], job: Any, processes: int, beside: Path) -> dict[str, Any]:
    """Do ``work(job)`` in so many processes that can talk to each other, and return the first one's result.

    Both are pickled; ``beside`` is a folder for scratch. Raises the error of the process that failed first, Interrupted when the user
    asked to stop and all have saved, and EnvironmentFailure for a process that was killed. When this returns none of them is left.
    """
    with tempfile.TemporaryDirectory(prefix=".training.", dir=beside) as scratch:
        folder = Path(scratch)
        (folder / _JOB).write_bytes(pickle.dumps((work, job)))
        command = [sys.executable, "-m", __name__, "agent", str(folder), str(os.getpid()), str(processes)]
        with (folder / "agent.log").open("wb") as said:
            agent = subprocess.Popen(
                command,
                stdin=subprocess.DEVNULL,
                stdout=subprocess.PIPE,
                stderr=said,
                env=_environment(processes),
                start_new_session=True,  # Ctrl-C is the parent's, which tells the processes
            )
        try:
            _follow(agent, folder / _STOP)
            agent.wait()
        finally:
            _end(agent)
        if agent.returncode == 0 and (folder / _RESULT).is_file():
            return dict(read_json(folder / _RESULT))
        raise _failure(folder, agent.returncode)


def _environment(processes: int) -> dict[str, str]:
    """For the agent and its processes: our packages, cores divided, the loopback interface, and no store that listens on a port."""
    loopback = next((name for name, held in psutil.net_if_addrs().items() if any(a.address == "127.0.0.1" for a in held)), "lo")
    given = {
        "PYTHONPATH": os.pathsep.join(path for path in sys.path if path),
        "TORCH_DISABLE_SHARE_RDZV_TCP_STORE": "1",
        "PYTHONUNBUFFERED": "1",
    }
    usual = {"GLOO_SOCKET_IFNAME": loopback, "NCCL_SOCKET_IFNAME": loopback}
    usual["OMP_NUM_THREADS"] = str(max(1, Hardware.detect().cpu.cores // processes))
    return {**usual, **os.environ, **given}


def _follow(agent: "subprocess.Popen[bytes]", stop: Path) -> None:
    """Log what the processes log until all of them have ended; tell them when the user has asked to stop."""
    assert agent.stdout is not None
    pipe, kept = agent.stdout.fileno(), b""
    while True:
        if interrupt.asked() and not stop.exists():
            stop.touch()
        if not select.select([pipe], [], [], _POLL_SECONDS)[0]:
            continue
        read = os.read(pipe, 2**16)
        *lines, kept = (kept + read).split(b"\n")
        for line in lines:
            _log(line)
        if not read:
            return


def _log(line: bytes) -> None:
    try:
        said = json.loads(line)
        level, name, text = int(said["level"]), str(said["name"]), str(said["text"])
    except (ValueError, KeyError, TypeError):
        level, name, text = logging.DEBUG, __name__, line.decode(errors="replace")
    logging.getLogger(name).log(level, "%s", text)


def _end(agent: "subprocess.Popen[bytes]") -> None:
    """See to it that the agent and its processes are gone: they die with it, and hold the pipe until they do."""
    assert agent.stdout is not None
    if agent.poll() is None:
        agent.kill()
        deadline = time.monotonic() + _END_SECONDS
        while (left := deadline - time.monotonic()) > 0 and select.select([agent.stdout], [], [], left)[0]:
            if not os.read(agent.stdout.fileno(), 2**16):
                break
    agent.wait()
    agent.stdout.close()


def _failure(folder: Path, code: int) -> PipelineError:
    """The error of the process that failed first: what the others say who lost it is a consequence."""
    told = {int(p.stem.removeprefix("error-")): read_json(p) for p in folder.glob("error-*.json")}
    ended = read_json(folder / _ENDED) if (folder / _ENDED).is_file() else {}
    killed = [(int(number), how["code"]) for number, how in ended.items() if how["code"] < 0 and int(number) not in told]
    own = {number: said for number, said in told.items() if not said.get("lost")}
    if own or (told and not killed):
        candidates = own or told
        number = min(candidates, key=lambda n: candidates[n]["at"])
        said = candidates[number]
        kind = getattr(errors, said["kind"], None) if said["known"] else None
        if kind is not None:
            return kind(said["message"], evidence=said["evidence"], remedy=said["remedy"])  # type: ignore[no-any-return]
        what = f"training process {number} failed: {said['kind']}: {said['message']}"
        return EnvironmentFailure(what, evidence=said["evidence"], remedy=_REMEDY)
    if killed:
        number, how = killed[0]
        name = signal.Signals(-how).name if -how in iter(signal.Signals) else str(-how)
        hint = ", the system's way when memory runs out" if -how == signal.SIGKILL else ""
        what = f"training process {number} was ended by {name}{hint}"
        return EnvironmentFailure(what, evidence=_last_lines(folder.rglob(f"{number}/stderr.log")), remedy=_REMEDY)
    return EnvironmentFailure(
        f"the training processes ended with exit code {code}", evidence=_last_lines([folder / "agent.log"]), remedy=_REMEDY
    )


def _last_lines(paths: Iterator[Path] | Sequence[Path]) -> str:
    texts = [path.read_text(encoding="utf-8", errors="replace") for path in paths if path.is_file()]
    return "\n".join(line for text in texts for line in text.splitlines()[-10:])


if __name__ == "__main__":
    role, where, owner, *more = sys.argv[1:]
    _end_with(int(owner))
    if role == "agent":
        sys.exit(_agent(Path(where), int(more[0])))
    # by its own name, so that there is one module of it
    from training.tuning import distributed

    distributed._work(Path(where))
