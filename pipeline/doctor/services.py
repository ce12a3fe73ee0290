"""Why an application does not get its answer: connection refused, model not found, an old backend still used, a server that died.

Each function looks for one cause and returns what it found, in the words of ``doctor``'s findings; nothing is changed.
"""

from __future__ import annotations

import json
import shutil
import subprocess
from pathlib import Path

import httpx

from pipeline import engines
from pipeline.config import ENV_FILE, Settings
from pipeline.deploy import PROJECT
from pipeline.doctor import inventory
from pipeline.doctor.findings import Finding, Status, made
from pipeline.doctor.settings import check
from pipeline.net.client import wait_for
from pipeline.operate import registry
from pipeline.operate.registry import ModelStatus
from pipeline.operate.routing import gateway_folder
from pipeline.runs.folder import DEFAULT_OUTPUT, RunFolder
from pipeline.runs.text import mask, without_password
from pipeline.serve import records
from pipeline.serve.logs import classify

_ASK_SECONDS = 3.0
_LONGEST_LOG = 1 << 20


def look(settings: Settings, run: RunFolder, env_file: Path = ENV_FILE) -> list[Finding]:
    """Every check of this file, worst first; one that raises becomes a finding."""
    found = [
        *made("settings", lambda: settings_in_force(settings, env_file)),
        *made("backend", lambda: [backend_answers(settings, run)]),
        *made("LLM_BACKEND", lambda: old_backend(settings, run.output)),
        *made("last starts", lambda: last_failures(run)),
        *made("containers", exited_containers),
    ]
    return sorted(found, key=lambda finding: ("fail", "warn", "ok").index(finding.status))


def settings_in_force(settings: Settings, env_file: Path = ENV_FILE) -> list[Finding]:
    """Contradictions, misspelt variables, and values that the environment hides."""
    return [Finding("settings", "fail" if n.level == "error" else "warn", n.text) for n in check(settings, env_file)]


def backend_answers(settings: Settings, run: RunFolder) -> Finding:
    """Connection refused, a wrong key, a model that is not served - for the backend in LLM_BACKEND."""
    address = settings.address()
    statuses = wait_for(registry.check(address, timeout=_ASK_SECONDS, output=run.output))
    wanted = registry.same_model(statuses, address.model) or statuses[0]
    name = f"{address.backend} answers"
    if wanted.available:
        return Finding(name, "ok", f"{wanted.name} at {without_password(address.base_url)}")
    # a server that is not started is no fault before anyone needs it
    status: Status = "warn" if wanted.kind == "refused" else "fail"
    return Finding(name, status, wanted.detail, _remedy(settings, run, wanted))


def old_backend(settings: Settings, output: Path = DEFAULT_OUTPUT) -> list[Finding]:
    """A status API that was started before LLM_BACKEND changed keeps the settings of its start; a gateway does not tell its own."""
    found = []
    for process in records.running(gateway_folder(output) / "servers"):
        if process.engine != "status-api":
            continue
        try:
            used = str(httpx.get(f"{process.url}/api/v1/inference/status", timeout=_ASK_SECONDS).json()["backend"])
        except (httpx.HTTPError, ValueError, KeyError):
            continue
        if used != settings.llm_backend:
            words = f"LLM_BACKEND={settings.llm_backend}, but the status API at {process.url} was started with {used}"
            found.append(Finding("LLM_BACKEND", "fail", words, "settings are read at start: restart it, and your applications"))
    return found


def last_failures(run: RunFolder) -> list[Finding]:
    """Known causes (CUDA out of memory, a taken port, ...) in the newest log of each engine that is not running now."""
    alive = {process.engine for process in records.running(run.servers)} if run.path.is_dir() else set()
    found = []
    for engine in engines.NAMES:
        logs = [] if engine in alive else inventory.start_logs(run.path, (engine,))
        known = classify(_tail(logs[-1])) if logs else None
        if known:
            seen = f"{known.cause} ({logs[-1]}: {mask(known.line)[:160]})"
            found.append(Finding(f"last start of {engine}", "warn", seen, known.remedy))
    return found


def exited_containers() -> list[Finding]:
    """Containers of our compose file that failed, with the known cause or the last line of their log, secrets masked."""
    docker = shutil.which("docker")
    if docker is None:
        return []
    words = ["ps", "-a", "--filter", "status=exited", "--filter", f"label=com.docker.compose.project={PROJECT}"]
    listed = _docker([docker, *words, "--format", "{{json .}}"])
    found = []
    for line in (listed or "").splitlines():
        try:
            entry = json.loads(line)
            name, status = str(entry["Names"]), str(entry["Status"])
        except (ValueError, KeyError, TypeError):
            continue
        if status.startswith("Exited (0)"):  # it was done, or was asked to stop
            continue
        log = _docker([docker, "logs", "--tail", "200", name]) or ""
        known = classify(log)
        last = (log.strip().splitlines() or ["its log is empty"])[-1]
        remedy = known.remedy if known else f"docker logs {name}"
        found.append(Finding(f"container {name}", "warn", f"{status}: {known.cause if known else mask(last)[:200]}", remedy))
    return found


def _remedy(settings: Settings, run: RunFolder, status: ModelStatus) -> str:
    """The next step for an unavailable model; a server of the run at another address is the likeliest mistake."""
    address = settings.address()
    prefix = "OPENAI_COMPATIBLE" if address.backend == "openai" else address.backend.upper()
    if status.kind == "refused":
        here = [p for p in records.running(run.servers) if p.engine == address.backend] if run.path.is_dir() else []
        if here:
            return f"{address.backend} of run {run.name} runs at {here[0].url}: set {prefix}_BASE_URL={here[0].url}/v1"
        return (
            f"granite-pipeline serve {address.backend} --run {run.name}" if address.backend != "openai" else "start that server"
        )
    if status.kind == "model" and address.backend == "ollama":
        return f"granite-pipeline serve ollama --run {run.name} creates it; or set OLLAMA_MODEL to one of these"
    if status.kind == "model":
        return f"set {prefix}_MODEL to a name that is served, or serve the run as --served-model-name {address.model}"
    if status.kind == "key":
        return "correct OPENAI_COMPATIBLE_API_KEY"
    return f"correct {prefix}_BASE_URL, or look into that server's log"


def _docker(command: list[str]) -> str | None:
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=10, check=False, errors="replace")
    except (OSError, subprocess.SubprocessError):
        return None
    return None if done.returncode else done.stdout + done.stderr


def _tail(log: Path) -> str:
    with log.open("rb") as handle:
        handle.seek(max(0, log.stat().st_size - _LONGEST_LOG))
        return handle.read().decode("utf-8", errors="replace")
