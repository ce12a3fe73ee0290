"""Launch plans: what an engine is told, and why; the memory each part will take."""

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, Literal

from pipeline.machine.hardware import Hardware
from pipeline.model.model import Model

Purpose = Literal["verify", "serve", "throughput", "latency"]


@dataclass(frozen=True)
class Adapter:
    """One LoRA adapter: the name clients ask for, its folder, its rank, what it changes, and the base it was trained on."""

    name: str
    path: Path
    rank: int
    targets: tuple[str, ...]
    base: str


@dataclass(frozen=True)
class Request:
    """What is to be served, on what, for what; ``overrides`` are the user's own settings and win.

    ``sampling`` is what the server is to sample with where a client names nothing; empty: as its engine likes. ``hardware``
    is one node where one model is held by several ``nodes``, which are alike.
    """

    model: Model
    hardware: Hardware
    purpose: Purpose = "serve"
    served_name: str = ""
    overrides: Mapping[str, str] = field(default_factory=dict)
    adapters: tuple[Adapter, ...] = ()
    sampling: Mapping[str, float] = field(default_factory=dict)
    nodes: int = 1

    @property
    def name(self) -> str:
        """The name clients ask for."""
        return self.served_name or self.model.name


@dataclass(frozen=True)
class Node:
    """One machine's place among the ``nodes`` that hold one model: rank 0, at ``master``, answers clients, the others are headless.

    ``address`` and ``interface`` are its own in the network between them.
    """

    rank: int
    nodes: int
    master: str
    address: str
    interface: str


@dataclass(frozen=True)
class Setting:
    """One flag (``--name``) or environment variable (``NAME``) with its reason; ``value`` None means a bare flag."""

    name: str
    value: str | None
    reason: str
    source: Literal["planned", "user", "retry"] = "planned"


@dataclass(frozen=True)
class Memory:
    """Predicted memory in GiB, per device (per GPU, or the machine's RAM)."""

    weights: float = 0.0
    kv_cache: float = 0.0
    activation: float = 0.0
    graphs: float = 0.0
    overhead: float = 0.0
    available: float = 0.0

    @property
    def total(self) -> float:
        """Sum of all parts, GiB."""
        return self.weights + self.kv_cache + self.activation + self.graphs + self.overhead


@dataclass(frozen=True)
class Plan:
    """Everything an engine needs to be launched, each setting with its reason; ``parameters`` go into an Ollama Modelfile."""

    engine: str
    feasible: bool
    flags: tuple[Setting, ...] = ()
    env: tuple[Setting, ...] = ()
    dtype: str = ""
    quantization: str | None = None
    tensor_parallel: int = 1
    max_model_len: int = 0
    max_num_seqs: int = 0
    memory: Memory = Memory()
    parameters: tuple[Setting, ...] = ()
    alternatives: tuple[str, ...] = ()
    warnings: tuple[str, ...] = ()
    pipeline_parallel: int = 1
    nodes: int = 1

    @property
    def arguments(self) -> list[str]:
        """The flags as argv words, in order."""
        return [word for flag in self.flags for word in ([flag.name] if flag.value is None else [flag.name, flag.value])]

    @property
    def environment(self) -> dict[str, str]:
        """The environment variables to add."""
        return {setting.name: setting.value or "" for setting in self.env}

    def to_json(self, argv: Sequence[str] | None = None) -> dict[str, Any]:
        """The documented JSON object of ``granite-pipeline plan --json``; ``argv`` is the whole command line where there is one."""
        memory = {**asdict(self.memory), "total": self.memory.total}
        settings = [asdict(setting) for setting in (*self.flags, *self.env, *self.parameters)]
        as_it_is = ("dtype", "quantization", "tensor_parallel", "pipeline_parallel", "nodes", "max_model_len", "max_num_seqs")
        return {
            "engine": self.engine,
            "feasible": self.feasible,
            "argv": self.arguments if argv is None else list(argv),
            "env": self.environment,
            **{name: getattr(self, name) for name in as_it_is},
            "memory_gib": {name: round(value, 3) for name, value in memory.items()},
            "parameters": {setting.name: setting.value for setting in self.parameters},
            "reasons": [{"flag": setting.pop("name"), **setting} for setting in settings],
            "alternatives": list(self.alternatives),
            "warnings": list(self.warnings),
        }
