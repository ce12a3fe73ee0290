"""What ``report.json`` holds: the contract other tools read, as checked models.

Only the keys of the contract are required; everything else may be missing, and unknown keys are kept.
"""

from collections.abc import Mapping
from dataclasses import replace
from typing import Annotated, Any, Literal

from pydantic import BaseModel, ConfigDict, Field, PlainSerializer, ValidationError

from pipeline.errors import InputError
from pipeline.report.check import Check
from pipeline.runs.text import visible

Share = Annotated[float, Field(ge=0, le=1)]


class _Open(BaseModel):
    """Strict about the types of known keys, silent about unknown ones."""

    model_config = ConfigDict(extra="allow", strict=True, frozen=True)


class Scores(_Open):
    """Held-out scores of one model: shares of ``n`` rows; any further numeric key is one more field."""

    n: int
    json_valid: Share
    severity: Share | None
    technique: Share | None
    exact: Share
    calls: Share | None = None

    @property
    def shares(self) -> dict[str, float]:
        """Every known share by field name, ``exact`` last."""
        every = {
            "json_valid": self.json_valid,
            "severity": self.severity,
            "technique": self.technique,
            "calls": self.calls,
            **(self.model_extra or {}),
        }
        found = {name: float(value) for name, value in every.items() if _is_share(value)}
        return {**found, "exact": self.exact}


class Evaluation(_Open):
    """Scores before (base) and after (tuned) fine-tuning, in process."""

    base: Scores
    tuned: Scores


class BaseModelId(_Open):
    """Which model was fine-tuned; ``note`` says in words what it is."""

    id: str
    note: str | None = None


class Point(_Open):
    """One entry of the loss history."""

    step: int
    loss: float | None = None
    eval_loss: float | None = None


class Became(_Open):
    """A key of the rows, or a text in them, what became of it, and in how many rows."""

    what: str
    became: str
    rows: int


class Account(_Open):
    """What became of everything in the dataset; ``refusals`` are the first refused rows, as (file:line, reason)."""

    table: list[Became] = []
    refused: int = 0
    refusals: list[list[str]] = []


class Training(_Open):
    """How the model was trained."""

    method: str | None = None
    steps: int | None = None
    seconds: float | None = None
    tokens_per_second: float | None = None
    history: list[Point] = []
    parameters: dict[str, Any] = {}
    account: Account = Account()


def _written(checks: list[Check]) -> list[dict[str, str]]:
    return [{"id": check.id, "status": check.status, "detail": check.figure} for check in checks]


Checks = Annotated[list[Check], PlainSerializer(_written)]


class PromptCount(_Open):
    """Held-out prompts sent to a backend, and those answered as they should be."""

    total: int
    passed: int


class Milliseconds(_Open):
    """Median and 95th percentile."""

    p50: float
    p95: float


class Reason(_Open):
    """Why a launch flag or variable has its value."""

    flag: str
    value: str | None = None
    reason: str = ""
    source: str = ""


class Injection(_Open):
    """Whether control tokens in a user's text reach the model as such, raw and neutralised; None: unknown."""

    raw: bool | None = None
    neutralised: bool | None = None
    how: str = "unknown"
    detail: str = ""


class Feature(_Open):
    """A feature tried on an engine: ``result`` is passed, failed, not tested, or not supported by whom."""

    result: str
    detail: str = ""


class PlainClient(_Open):
    """The first rows asked without sampling settings: exact, exact of the same rows with them, and how many answers are the same."""

    rows: int
    exact: Share
    exact_greedy: Share
    same: int
    detail: str = ""


class Backend(_Open):
    """One engine: how it was started and what it answered."""

    name: str
    title: str | None = None
    status: Literal["passed", "failed", "skipped"]
    reason: str | None
    engine_version: str | None
    argv: list[str] | None
    ready_seconds: float | None
    prompts: PromptCount
    exact: Share | None
    prompt_parity: bool | None
    finish_stop: Share | None
    ttft_ms: Milliseconds | None
    tokens_per_second: float | None
    env: dict[str, str] | None = None
    fields: dict[str, float | None] = Field(default={}, alias="fields")
    reasons: list[Reason] = []
    memory_gib: dict[str, float | None] | None = None
    memory_measured_gib: float | None = None
    checks: Checks = []
    install: str | None = None
    injection: Injection | None = None
    structured_output: Feature | None = None
    tool_calls: Feature | None = None
    plain_client: PlainClient | None = None
    sha256: str | None = None

    @property
    def shown(self) -> str:
        """The engine's name as its makers write it; the name that it is given with where the report does not say."""
        return visible(self.title or self.name)


class Example(_Open):
    """One held-out prompt with the answers before, after and as served (``answers``: backend name -> text)."""

    prompt: str
    expected: str
    base: str | None = None
    tuned: str | None = None
    answers: dict[str, str | None] = {}


class EffectiveSetting(_Open):
    """A resolved setting and where its value came from."""

    name: str
    value: Any = None
    source: str = ""


class Result(_Open):
    """The whole of ``report.json``."""

    schema_version: Literal[1] = Field(alias="schema")
    run: str
    passed: bool
    base_model: BaseModelId
    evaluation: Evaluation = Field(alias="eval")
    backends: list[Backend]
    checks: Checks
    created_at: str | None = None
    training: Training = Training()
    examples: list[Example] = []
    manifest: dict[str, Any] = {}
    hardware: dict[str, Any] = {}
    settings: list[EffectiveSetting] = []
    not_tested: list[str] = []
    certificate: dict[str, Any] | None = None

    def checks_of(self, backend: Backend) -> list[Check]:
        """Checks about one backend, ids without its prefix, each once: the run's list first, then the backend's own."""
        prefix = f"{backend.name}."
        own = [c for c in self.checks if c.id.startswith(prefix)] + backend.checks
        found: dict[str, Check] = {}
        for check in own:
            short = check.id.removeprefix(prefix)
            known = found.get(short)
            if known is None or (check.status == "failed" and known.status != "failed"):
                found[short] = replace(check, id=short)
        return list(found.values())

    @property
    def line_checks(self) -> list[Check]:
        """Checks about no single backend: training, export, data."""
        prefixes = tuple(f"{b.name}." for b in self.backends)
        return [c for c in self.checks if not c.id.startswith(prefixes)] if prefixes else self.checks

    @property
    def broken(self) -> list[Check]:
        """Failed checks with full ids; a failed backend without a failed check counts as one."""
        found = [c for c in self.line_checks if c.status == "failed"]
        for backend in self.backends:
            failed = [c for c in self.checks_of(backend) if c.status == "failed"]
            found += [replace(c, id=f"{backend.name}.{c.id}") for c in failed]
            if backend.status == "failed" and not failed:
                detail = backend.reason or "the backend failed without naming a check"
                found.append(Check(backend.name, "failed", detail))
        return found


def parse(data: Mapping[str, Any]) -> Result:
    """Check a cleaned result against the contract; InputError names each missing or wrong key."""
    try:
        result = Result.model_validate(dict(data))
    except ValidationError as error:
        problems = [_problem(entry["loc"], entry["type"], entry["msg"]) for entry in error.errors(include_url=False)]
        raise InputError(
            f"the result does not follow the contract of report.json: {problems[0]}",
            evidence="\n".join(problems[1:10]),
            remedy="re-run `granite-pipeline verify`, which writes report.json",
        ) from None
    if result.passed and result.broken:
        first = result.broken[0]
        raise InputError(f"the result says passed, but {first.id} failed: {first.figure}")
    return result


def _is_share(value: Any) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool) and 0 <= value <= 1


def _problem(location: tuple[int | str, ...], kind: str, message: str) -> str:
    path = "".join(f"[{part}]" if isinstance(part, int) else f".{part}" for part in location).lstrip(".")
    return f"{path} is missing" if kind == "missing" else f"{path}: {message[:1].lower()}{message[1:]}"
