"""Why an application does not get its answer: connection refused, model not found, an old backend still used, a server that died.

Each examiner looks for one cause; nothing is changed.
"""

import json
import shutil
import subprocess
from collections.abc import Iterator

from pipeline import engines
from pipeline.deploy.compose import PROJECT
from pipeline.doctor.findings import Examiner, Facts, Finding, Status
from pipeline.doctor.settings import settings
from pipeline.net.client import wait_for
from pipeline.net.reach import get_json
from pipeline.operate import registry, services
from pipeline.operate.registry import ModelStatus
from pipeline.operate.services import start_logs
from pipeline.runs.text import mask, without_password
from pipeline.serve import records
from pipeline.serve.logs import classify, end_of

_ASK_SECONDS = 3.0
_LONGEST_LOG = 1 << 20


def backend(facts: Facts) -> Iterator[Finding]:
    """Connection refused, a wrong key, a model that is not served - for the backend in LLM_BACKEND."""
    address = facts.settings.address()
    statuses = wait_for(registry.check(address, timeout=_ASK_SECONDS, output=facts.run.output))
    wanted = registry.same_model(statuses, address.model) or statuses[0]
    name = f"{address.backend} answers"
    if wanted.available:
        yield Finding(name, "ok", f"{wanted.name} at {without_password(address.base_url)}")
    else:
        # a server that is not started is no fault before anyone needs it
        status: Status = "warn" if wanted.kind == "refused" else "fail"
        yield Finding(name, status, wanted.detail, _remedy(facts, wanted))


def status_api(facts: Facts) -> Iterator[Finding]:
    """A status API that was started before LLM_BACKEND changed keeps the settings of its start; a gateway does not tell its own."""
    wanted = facts.settings.llm_backend
    for process in records.running(services.folder(facts.run.output)):
        if process.engine != "status-api":
            continue
        seen = wait_for(get_json(process.url, "/api/v1/inference/status", timeout=_ASK_SECONDS))
        used = seen.data.get("backend") if seen.ok and isinstance(seen.data, dict) else None
        if used and used != wanted:
            words = f"LLM_BACKEND={wanted}, but the status API at {process.url} was started with {used}"
            yield Finding("LLM_BACKEND", "fail", words, "settings are read at start: restart it, and your applications")


def last_starts(facts: Facts) -> Iterator[Finding]:
    """Known causes (CUDA out of memory, a taken port, ...) in the newest log of each engine that is not running now."""
    alive = {process.engine for process in facts.servers}
    for engine in engines.NAMES:
        logs = [] if engine in alive else start_logs(facts.run.path, engine)
        if logs and (known := classify(end_of(logs[-1], _LONGEST_LOG))):
            evidence = f"{known.cause} ({logs[-1]}: {mask(known.line)[:160]})"
            yield Finding(f"last start of {engine}", "warn", evidence, known.remedy)


def containers(_: Facts) -> Iterator[Finding]:
    """Containers of our compose file that failed, with the known cause or the last line of their log, secrets masked."""
    words = ["ps", "-a", "--filter", "status=exited", "--filter", f"label=com.docker.compose.project={PROJECT}"]
    for line in _docker(*words, "--format", "{{json .}}").splitlines():
        try:
            entry = json.loads(line)
            name, status = str(entry["Names"]), str(entry["Status"])
        except (ValueError, KeyError, TypeError):
            continue
        if status.startswith("Exited (0)"):  # it was done, or was asked to stop
            continue
        log = _docker("logs", "--tail", "200", name)
        known = classify(log)
        last = (log.strip().splitlines() or ["its log is empty"])[-1]
        remedy = known.remedy if known else f"docker logs {name}"
        yield Finding(f"container {name}", "warn", f"{status}: {known.cause if known else mask(last)[:200]}", remedy)


APPLICATIONS: tuple[Examiner, ...] = (settings, backend, status_api, last_starts, containers)


def _remedy(facts: Facts, status: ModelStatus) -> str:
    """The next step for an unavailable model; a server of the run at another address is the likeliest mistake."""
    address, run = facts.settings.address(), facts.run.name
    engine = engines.get(address.backend)
    prefix = engine.prefix
    if status.kind == "refused":
        for process in facts.servers:
            if process.engine == address.backend:
                words = f"{address.backend} of run {run} runs at {process.url}"
                return f"{words}: set {prefix}_BASE_URL={process.url}/v1"
        return f"granite-pipeline serve {address.backend} --run {run}" if engine.serves != "url" else "start that server"
    if status.kind == "model" and engine.creates_model:
        return f"granite-pipeline serve {engine.name} --run {run} creates it; or set {prefix}_MODEL to one of these"
    if status.kind == "model":
        return f"set {prefix}_MODEL to a name that is served, or serve the run as --served-model-name {address.model}"
    if status.kind == "key":
        return f"correct {engine.key_variable or 'OPENAI_COMPATIBLE_API_KEY'}"
    return f"correct {prefix}_BASE_URL, or look into that server's log"


def _docker(*words: str) -> str:
    """What docker says; "" without docker, or when it fails."""
    program = shutil.which("docker")
    if program is None:
        return ""
    try:
        done = subprocess.run([program, *words], capture_output=True, text=True, timeout=10, check=False, errors="replace")
    except (OSError, subprocess.SubprocessError):
        return ""
    return "" if done.returncode else done.stdout + done.stderr
