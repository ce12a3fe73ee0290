"""``agents.yaml``: which run, backend and model each agent uses, and what the gateway may do.

agents:
  triage: {run: generic}                                  # that run, on the backend in LLM_BACKEND
  triage-gpu: {run: generic, backend: vllm, model: granite-soc-specialist}
prices: {openai: 0.60}                                    # per million tokens; backends not named cost nothing
sampling: {openai: {}}                                    # what a request that names none is given; default: the run's settings
allow_fallback: {granite-soc-specialist: [gpt-oss-20b]}   # models that are not the same fine-tune, allowed by name
"""

from pathlib import Path
from typing import Annotated

from pydantic import BaseModel, ConfigDict, Field, ValidationError

from pipeline.config import Backend
from pipeline.errors import InputError
from pipeline.runs.folder import RunFolder

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
