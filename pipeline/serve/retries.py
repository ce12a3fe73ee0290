"""The retry ladder: which one setting to change after a start that failed, and why - or that no retry can mend it.

    failure                          change
    context-exceeds-kv               --max-model-len to the number the engine computed
    context-exceeds-model            --max-model-len to the model's own
    cpu-kv-too-large                 VLLM_CPU_KVCACHE_SPACE planned anew with the free memory the engine saw
    gpu-shared                       --gpu-memory-utilization to the free share less 0.02
    no-kv-memory, out-of-memory      eager on a GPU, then half the sequences; llama.cpp and Ollama: half the context
    sampler-memory                   half the sequences
    compile-failed                   eager
    no-bfloat16                      float16
    port-taken                       the next free port, unless the user named the port

Everything else is refused at once: a second start of a damaged file ends as the first did. What the user set is never changed.
"""

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace

from pipeline import engines
from pipeline.engines.base import LEAST_CONTEXT, Engine
from pipeline.errors import InputError, StartFailure
from pipeline.planning.plan import Plan, Request, Setting

MAX_RETRIES = 3
_KV_SPACE = "VLLM_CPU_KVCACHE_SPACE"


@dataclass(frozen=True)
class Change:
    """One step down the ladder: settings to change (a bare flag has None) and why; none for another port."""

    reason: str
    settings: Mapping[str, str | None] = field(default_factory=dict)

    @property
    def words(self) -> str:
        """The settings as a person would type them."""
        return ", ".join(name if value is None else f"{name}={value}" for name, value in self.settings.items())


@dataclass(frozen=True)
class _Case:
    failed: StartFailure
    plan: Plan
    request: Request


def next_plan(
    engine: Engine, request: Request, plan: Plan, failed: StartFailure, changes: list[Change], *, port_given: bool
) -> Plan:
    """The plan for the next attempt, its change appended to ``changes``; raises the failure when no retry can mend it."""
    change = propose(failed, plan, request, port_given=port_given) if len(changes) < MAX_RETRIES else None
    if change is None:
        tried = "".join(f"\nretried: {c.reason} {c.words}".rstrip() for c in changes)
        raise _refused(failed, tried=tried) from None
    if not change.settings:
        changes.append(change)
        return plan
    try:
        following = replan(engine, request, [*changes, change])
    except InputError as error:
        raise _refused(failed, f"; {change.words} is not possible: {error.message}") from None
    if not following.feasible:
        why = f"; {change.words} would be the next try, but does not fit: {'; '.join(following.warnings)}"
        raise _refused(failed, why, remedy="; or ".join(following.alternatives)) from None
    changes.append(change)
    return following


def propose(failed: StartFailure, plan: Plan, request: Request, *, port_given: bool) -> Change | None:
    """The change that may mend this failure, or None; StartFailure when it would have to change what the user set."""
    if failed.kind == "port-taken":
        return None if port_given else Change("another process took the port first: the next free one")
    rule = _RULES.get(failed.kind)
    change = rule(_Case(failed, plan, request)) if rule else None
    if change is None:
        return None
    for name, value in change.settings.items():
        if mine := _set_by_user(plan, name):
            given = mine.name if mine.value is None else f"{mine.name}={mine.value}"
            remedy = f"--set {name.lstrip('-')}={value or 'true'} ({change.reason}), or leave it to the plan"
            raise _refused(failed, f"; your --set {given.lstrip('-')} is not changed by a retry", remedy=remedy) from None
    return change


def _refused(failed: StartFailure, why: str = "", *, remedy: str = "", tried: str = "") -> StartFailure:
    """The failure, with the reason why there is no further try."""
    evidence, remedy = failed.evidence + tried, remedy or failed.remedy
    return StartFailure(failed.message + why, evidence=evidence, remedy=remedy, kind=failed.kind, cause=failed.cause)


def replan(engine: Engine, request: Request, changes: list[Change]) -> Plan:
    """The plan with all changes so far laid over it, marked as retries with their reasons."""
    asked = {name: "true" if value is None else value for change in changes for name, value in change.settings.items()}
    # a flag may have become a parameter of the model: --ctx-size, ctx_size
    reasons = {key: change.reason for change in changes for name in change.settings for key in (name, _parameter(name))}
    plan = engine.plan(replace(request, overrides={**request.overrides, **asked}))

    def marked(settings: tuple[Setting, ...]) -> tuple[Setting, ...]:
        why = [reasons.get(setting.name) for setting in settings]
        pairs = zip(settings, why, strict=True)
        return tuple(replace(setting, source="retry", reason=f"retry: {said}") if said else setting for setting, said in pairs)

    return replace(plan, flags=marked(plan.flags), env=marked(plan.env), parameters=marked(plan.parameters))


def _parameter(flag: str) -> str:
    return flag.lstrip("-").replace("-", "_")


def _set_by_user(plan: Plan, name: str) -> Setting | None:
    names = (name, name.replace("--", "--no-", 1), _parameter(name))
    every = (*plan.flags, *plan.env, *plan.parameters)
    return next((s for s in every if s.source == "user" and s.name in names), None)


def _length(case: _Case) -> Change | None:
    if not case.failed.numbers or case.failed.numbers[0] < LEAST_CONTEXT:
        return None
    length = min(int(case.failed.numbers[0]), case.request.model.shape.max_positions)
    return Change(f"{case.failed.cause}: {length} tokens is what the engine says fits", {"--max-model-len": str(length)})


def _kv_space(case: _Case) -> Change | None:
    """What the plan would have been with the memory the engine saw, and less than it was: the cache is really written to."""
    if not case.failed.numbers:
        return None
    free = case.failed.numbers[0]
    # weights and processes were in memory already when the engine looked
    machine = replace(case.request.hardware, ram_free_gib=free + case.plan.memory.total - case.plan.memory.kv_cache)
    smaller = engines.get(case.plan.engine).plan(replace(case.request, hardware=machine)).environment.get(_KV_SPACE, "0")
    was = case.plan.environment.get(_KV_SPACE, "0")
    space = min(int(smaller), int(free * 0.9), int(was) - 1)
    return Change(f"only {free:.1f} GiB were free when the KV cache was made", {_KV_SPACE: str(space)}) if space >= 1 else None


def _share(case: _Case) -> Change | None:
    if len(case.failed.numbers) < 2 or case.failed.numbers[0] / case.failed.numbers[1] < 0.1:
        return None
    free, total = case.failed.numbers[:2]
    share = math.floor((free / total - 0.02) * 100) / 100
    reason = f"another process holds part of the GPU: {free:.1f} of {total:.1f} GiB are free"
    return Change(reason, {"--gpu-memory-utilization": f"{share:.2f}"})


def _eager(case: _Case) -> Change | None:
    flag = engines.get(case.plan.engine).eager_flag
    if not flag or any(s.name == flag for s in case.plan.flags):
        return None
    return Change(f"{case.failed.cause}: without compilation and graphs", {flag: None})


def _fewer(case: _Case) -> Change | None:
    name = engines.get(case.plan.engine).sequences_flag
    now = next((int(s.value) for s in case.plan.flags if s.name == name and s.value and s.value.isdigit()), 0)
    return Change(f"{case.failed.cause}: half the sequences at once", {name: str(now // 2)}) if now > 1 else None


def _smaller(case: _Case) -> Change | None:
    """Less memory: half the context where that frees it, else eager on a GPU, then fewer sequences."""
    if half := engines.get(case.plan.engine).half_context(case.plan, case.request):
        return Change(f"{case.failed.cause}: half the context", half)
    first = _eager(case) if case.request.hardware.gpus else None
    return first or _fewer(case)


_RULES: dict[str, Callable[[_Case], Change | None]] = {
    "context-exceeds-kv": _length,
    "context-exceeds-model": _length,
    "cpu-kv-too-large": _kv_space,
    "gpu-shared": _share,
    "no-kv-memory": _smaller,
    "out-of-memory": _smaller,
    "sampler-memory": _fewer,
    "compile-failed": _eager,
    "no-bfloat16": lambda case: Change(case.failed.cause, {"--dtype": "float16"}),
}
