"""``agents.yaml``: which run, backend and model each agent uses, and what the gateway may do.

agents:
  triage: {run: generic}                                  # that run, on the backend in LLM_BACKEND
  triage-gpu: {run: generic, backend: vllm, model: granite-soc-specialist}
prices: {openai: 0.60}                                    # per million tokens; backends not named cost nothing
sampling: {openai: {}}                                    # what a request that names none is given; default: the run's settings
allow_fallback: {granite-soc-specialist: [gpt-oss-20b]}   # models that are not the same fine-tune, allowed by name
"""

from collections.abc import Mapping
from contextlib import suppress
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Annotated, Any

from pydantic import BaseModel, ConfigDict, Field, ValidationError

from pipeline import engines
from pipeline.config import Backend
from pipeline.engines.base import Engine
from pipeline.engines.vllm.lora import base_folder, read
from pipeline.errors import InputError, PipelineError
from pipeline.machine.hardware import Hardware
from pipeline.model.model import Model
from pipeline.net.chat import SAMPLING
from pipeline.planning.plan import Adapter, Plan, Request
from pipeline.runs.folder import RunFolder
from pipeline.runs.manifest import Manifest

# settings of OpenAI's API that a request may leave out
Sampling = dict[Annotated[str, Field(pattern=r"^(temperature|top_p)$")], Annotated[float, Field(ge=0, le=2)]]


class Agent(BaseModel):
    """One agent: its run, and (optional) a backend and the name its model is served under."""

    model_config = ConfigDict(extra="forbid", frozen=True)
    run: str
    backend: Backend | None = None
    model: str | None = None


class Agents(BaseModel):
    """The whole file; unknown keys are refused."""

    model_config = ConfigDict(extra="forbid", frozen=True)
    agents: dict[str, Agent] = Field(default_factory=dict)
    prices: dict[Backend, float] = Field(default_factory=dict)
    sampling: dict[Backend, Sampling] = Field(default_factory=dict)
    allow_fallback: dict[str, list[str]] = Field(default_factory=dict)

    @classmethod
    def load(cls, path: Path) -> "Agents":
        """Read the file, or an empty one when it does not exist; InputError names the place that is wrong."""
        if not path.is_file():
            return cls()
        import yaml

        try:
            found = cls.model_validate(yaml.safe_load(path.read_text(encoding="utf-8")) or {})
        except (yaml.YAMLError, UnicodeDecodeError) as error:
            raise InputError(f"{path} is not valid YAML", evidence=str(error)) from None
        except ValidationError as error:
            lines = [f"{'.'.join(str(part) for part in e['loc'])}: {e['msg']}" for e in error.errors()]
            raise InputError(f"{path} has entries that do not fit", evidence="\n".join(lines)) from None
        for agent in found.agents.values():
            RunFolder(agent.run)
        return found

    def get(self, name: str) -> Agent:
        """The agent of that name; InputError listing the known ones."""
        if name not in self.agents:
            known = ", ".join(self.agents) or "none: agents.yaml is missing or empty"
            raise InputError(f"no agent {name!r}", remedy=f"known agents: {known}")
        return self.agents[name]


@dataclass(frozen=True)
class Cost:
    """What some servers take: GPUs (0 on a CPU machine) and GiB of GPU memory or RAM, all together."""

    servers: int
    gpus: int
    memory_gib: float

    def words(self, times: int = 1) -> str:
        """As said to people, for so many copies."""
        gpus = f"{self.gpus * times} GPU{'s' if self.gpus * times > 1 else ''} and " if self.gpus else ""
        return f"{gpus}{self.memory_gib * times:.1f} GiB"


@dataclass(frozen=True)
class Sharing:
    """Agents whose fine-tunes share a base: their adapters on one server, against a server each.

    ``agents`` is each one's entry in agents.yaml then; ``left_out`` says why a run of that base is not among the adapters,
    ``refused`` why none of it can be done here.
    """

    base: str
    engine: str
    agents: Mapping[str, Mapping[str, str]]
    apart: Cost
    together: Cost
    command: str = ""
    lost: tuple[str, ...] = ()
    left_out: Mapping[str, str] = field(default_factory=dict)
    refused: str = ""

    def to_json(self) -> dict[str, Any]:
        """For ``choose --json``."""
        return asdict(self)


def sharing(agents: Agents, output: Path, hardware: Hardware) -> list[Sharing]:
    """Bases that several runs of agents.yaml were trained on, each with what one server of their adapters takes and loses."""
    engine = next((engine for engine in engines.every() if engine.serves_adapters), None)
    groups: dict[str, dict[str, Agent]] = {}
    for name, agent in agents.agents.items():
        with suppress(PipelineError):  # a damaged run is another verb's news
            training = Manifest(RunFolder(agent.run, output).manifest).training
            if training is not None and training.base.sha256:
                groups.setdefault(training.base.sha256, {})[name] = agent
    several = [group for group in groups.values() if len({agent.run for agent in group.values()}) > 1]
    return [_shared(engine, group, output, hardware) for group in several] if engine else []


def _shared(engine: Engine, group: Mapping[str, Agent], output: Path, hardware: Hardware) -> Sharing:
    adapters, left_out, entries = dict[str, Adapter](), dict[str, str](), dict[str, Mapping[str, str]]()
    for name, agent in group.items():
        model = agent.model or agent.run
        try:
            if agent.backend not in (None, engine.name):
                raise InputError(f"agents.yaml gives it backend {agent.backend}")
            if model in {one.name for run, one in adapters.items() if run != agent.run}:
                raise InputError(f"another run is called {model} too")
            adapters.setdefault(agent.run, read(model, RunFolder(agent.run, output).adapter))
            entries[name] = {"run": agent.run, "backend": engine.name, "model": adapters[agent.run].name}
        except PipelineError as error:
            left_out[name] = error.message
    nothing = Sharing("", engine.name, entries, Cost(0, 0, 0.0), Cost(0, 0, 0.0), left_out=left_out)
    if len(adapters) < 2:
        return replace(nothing, refused=f"fewer than two of {', '.join(group)} have an adapter that {engine.title} serves")
    loras = tuple(adapters.values())
    try:
        base = base_folder(loras, None)
        request = Request(Model.open(base), hardware, "serve", base.name, sampling=SAMPLING)
        alone, all_of_them = engine.plan(request), engine.plan(replace(request, adapters=loras))
    except PipelineError as error:
        return replace(nothing, refused=error.message)
    if not all_of_them.feasible:
        return replace(nothing, base=str(base), refused="; ".join(all_of_them.warnings))
    words = ",".join(f"{adapter.name}={run}" for run, adapter in adapters.items())
    return replace(
        nothing,
        base=str(base),
        apart=_cost(alone, len(loras), hardware),
        together=_cost(all_of_them, 1, hardware),
        command=f"granite-pipeline serve {engine.name} --model {base} --adapters {words}",
        lost=_lost(engine, all_of_them, loras),
    )


def _cost(plan: Plan, servers: int, hardware: Hardware) -> Cost:
    devices = servers * plan.tensor_parallel
    return Cost(servers, devices if hardware.gpus else 0, round(devices * plan.memory.total, 2))


def _lost(engine: Engine, plan: Plan, loras: tuple[Adapter, ...]) -> tuple[str, ...]:
    """What sharing costs beside nothing: to be read before it is done."""
    merged = " and ".join(one.title for one in engines.every() if one.serves == "gguf")
    rank = max(adapter.rank for adapter in loras)
    eager = any(flag.name == engine.eager_flag for flag in plan.flags)
    return (
        f"the Q8_0 GGUF: {merged} serve the merged model; one server holds the base in {plan.dtype}",
        f"adapters that it refuses: the slots are for rank {rank}, and DoRA, whole modules and full fine-tunes are not served so",
        f"a KV cache of their own: {plan.memory.kv_cache * plan.tensor_parallel:.1f} GiB are all agents', a burst at one waits at the others",
        "failures of their own: when that server is down, all agents are; run a second copy where that matters",
        f"speed: each adapter's product is computed beside the base's{', and nothing is compiled' if eager else ''}",
        "the certificate of the merged model: what is served is base + adapter (granite-pipeline certify --unmerged)",
    )
