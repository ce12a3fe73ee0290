"""The primary backend is killed under load: who answers, with which artefact, and how soon is it seen and used again?

    python benchmarks/failover.py --run generic                          # vLLM and llama.cpp on their documented ports
    python benchmarks/failover.py --primary llamacpp --ports free        # two llama.cpp servers: a minute, 2 GiB

Starts both servers, the status API and the gateway; sends requests through the gateway (every fourth one streamed) and
kills the primary's process group with SIGKILL half way; restarts it. Prints one JSON object; exit code 1 when a request was
not answered, a cut stream did not end with an error, or status took more than five seconds.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import os
import signal
import sys
import threading
import time
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import httpx

from pipeline import config, engines
from pipeline.net.loopback import claim
from pipeline.operate import services
from pipeline.operate.routing import DEFAULT_PORT
from pipeline.runs.folder import DEFAULT_OUTPUT, RunFolder
from pipeline.serve import server, start
from pipeline.serve.server import Server
from pipeline.serve.start import Endpoint, Options, Target
from pipeline.verify.score import read_held_out

MODEL, SECOND_MODEL = "granite-soc-specialist", "granite-soc"
SOON = 5.0


@dataclass(frozen=True)
class Outcome:
    """One request: what ended it, who answered, seconds."""

    streamed: bool
    ended: str  # answered, cut (a stream that ended with an error event), broken (no end at all), or refused
    backend: str
    artefact: str
    fallback: str
    seconds: float
    begun: float


@dataclass
class Watch:
    """Polls the status API and keeps each change of ``healthy`` with its time."""

    url: str
    changes: list[tuple[float, bool]] = field(default_factory=list)
    stopped: bool = False

    def run(self) -> None:
        with httpx.Client(timeout=2) as client:
            while not self.stopped:
                try:
                    healthy = bool(client.get(f"{self.url}/api/v1/inference/status").json()["healthy"])
                except httpx.HTTPError:
                    healthy = not self.changes or self.changes[-1][1]
                if not self.changes or self.changes[-1][1] != healthy:
                    self.changes.append((time.monotonic(), healthy))
                time.sleep(0.2)

    def since(self, begun: float, healthy: bool, patience: float = 30.0) -> float | None:
        """Seconds from ``begun`` until the status said ``healthy``."""
        deadline = time.monotonic() + patience
        while time.monotonic() < deadline:
            for moment, value in self.changes:
                if moment >= begun and value is healthy:
                    return round(moment - begun, 2)
            time.sleep(0.1)
        return None


def main() -> int:
    args = _arguments()
    run = RunFolder(args.run, args.output.resolve())
    stack: list[Callable[[], object]] = []
    try:
        result = _scenario(args, run, stack)
    finally:
        for undo in reversed(stack):
            undo()
    sys.stdout.write(json.dumps(result, indent=2) + "\n")
    return 0 if result["passed"] else 1


def _arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--run", default="generic")
    parser.add_argument("--output", type=Path, default=DEFAULT_OUTPUT)
    parser.add_argument("--primary", choices=("vllm", "llamacpp"), default="vllm")
    parser.add_argument("--requests", type=int, default=200)
    parser.add_argument("--concurrency", type=int, default=16)
    parser.add_argument("--max-tokens", type=int, default=24)
    parser.add_argument("--ports", choices=("documented", "free"), default="documented")
    return parser.parse_args()


def _scenario(args: argparse.Namespace, run: RunFolder, stack: list[Callable[[], object]]) -> dict[str, Any]:
    free = args.ports == "free"
    ports = {"primary": claim("127.0.0.1", 0 if free else 8003), "second": claim("127.0.0.1", 0 if free else 8005)}
    # whatever engine is the primary, it stands in vLLM's place: applications see the same variables
    os.environ |= {
        "LLM_BACKEND": "vllm",
        "VLLM_BASE_URL": f"http://127.0.0.1:{ports['primary']}/v1",
        "VLLM_MODEL": MODEL,
        "LLAMACPP_BASE_URL": f"http://127.0.0.1:{ports['second']}/v1",
        "LLAMACPP_MODEL": SECOND_MODEL,
    }
    primary = _serve(args.primary, run, MODEL, ports["primary"], "primary", stack)
    _serve("llamacpp", run, SECOND_MODEL, ports["second"], "second", stack)
    watch = _watch(run, free, stack)
    gateway, ready = _gateway(run, free, stack)
    watch.since(0, healthy=True)
    killed, outcomes = _load(args, run, gateway.url, lambda: _kill(primary))
    seen_down = watch.since(killed, healthy=False)
    restarted = _serve(args.primary, run, MODEL, ports["primary"], "primary", stack)
    back = time.monotonic()
    seen_up, used = watch.since(killed, healthy=True), _used_again(gateway.url, back)
    ready_at = restarted.ready_seconds
    up_at = next((m for m, value in watch.changes if m > killed and value), back)
    return _report(outcomes, killed, {"seen_down": seen_down, "seen_up": max(0.0, round(up_at - back, 2)) if seen_up else None,
                   "used_again": used, "gateway_ready": ready, "gateway_gib": round(gateway.memory_gib(), 2),
                   "primary_ready": ready_at})  # fmt: skip


def _serve(engine: str, run: RunFolder, name: str, port: int, place: str, stack: list[Callable[[], object]]) -> Endpoint:
    of_run = Target.of_run(run, engine, name)
    target = Target(of_run.model, name, run.output / f".failover-{place}", of_run.modelfile)
    overrides = config.load().overrides(engine) | ({"parallel": "8"} if engine == "llamacpp" else {})
    options = Options("verify" if engine == "vllm" else "serve", port=port, owner=os.getpid(), overrides=overrides)
    begun = time.monotonic()
    endpoint = start.serve(engines.get(engine).name, target, options, lambda _: None)
    sys.stderr.write(f"{place} ({engine}) ready after {time.monotonic() - begun:.0f} s\n")
    process = endpoint.server
    if process is not None:
        stack.append(lambda: server.stop(process))
    return endpoint


def _watch(run: RunFolder, free: bool, stack: list[Callable[[], object]]) -> Watch:
    process = services.start(
        services.status_launch("127.0.0.1", 0 if free else 8080, run.output), run.output, os.getpid(), _quiet
    )
    stack.append(lambda: server.stop(process))
    watch = Watch(process.url)
    thread = threading.Thread(target=watch.run, daemon=True)
    thread.start()

    def end() -> None:
        watch.stopped = True
        thread.join()

    stack.append(end)
    return watch


def _gateway(run: RunFolder, free: bool, stack: list[Callable[[], object]]) -> tuple[Server, float]:
    begun = time.monotonic()
    launch = services.gateway_launch(config.load(), "127.0.0.1", 0 if free else DEFAULT_PORT, run.output)
    process = services.start(launch, run.output, os.getpid(), _quiet)
    stack.append(lambda: server.stop(process))
    return process, round(time.monotonic() - begun, 1)


def _kill(primary: Endpoint) -> float:
    if primary.server is None:
        raise RuntimeError("the primary was not started from here")
    os.killpg(primary.server.pid, signal.SIGKILL)
    return time.monotonic()


def _load(args: argparse.Namespace, run: RunFolder, url: str, kill: Callable[[], float]) -> tuple[float, list[Outcome]]:
    rows = read_held_out(run.heldout)

    async def work() -> tuple[float, list[Outcome]]:
        gate, done, killed = asyncio.Semaphore(args.concurrency), [], 0.0
        limits = httpx.Limits(max_keepalive_connections=0)
        async with httpx.AsyncClient(base_url=url, timeout=600, limits=limits) as client:

            async def one(i: int) -> None:
                nonlocal killed
                async with gate:
                    row = rows[i % len(rows)]
                    body = {"model": MODEL, "messages": list(row.messages), "max_tokens": args.max_tokens, "temperature": 0}
                    done.append(await _ask(client, body, streamed=i % 4 == 3))
                if len(done) == args.requests // 2:
                    killed = kill()

            await asyncio.gather(*(one(i) for i in range(args.requests)))
        return killed, done

    return asyncio.run(work())


async def _ask(client: httpx.AsyncClient, body: dict[str, Any], *, streamed: bool) -> Outcome:
    begun, ended = time.monotonic(), "broken"
    headers: httpx.Headers = httpx.Headers()
    try:
        if streamed:
            async with client.stream("POST", "/v1/chat/completions", json={**body, "stream": True}) as answer:
                headers = answer.headers
                async for line in answer.aiter_lines():
                    if line.startswith('data: {"error"'):
                        ended = "cut"
                    elif line == "data: [DONE]" and ended == "broken":
                        ended = "answered"
                if answer.is_error:
                    ended = "refused"
        else:
            answer = await client.post("/v1/chat/completions", json=body)
            headers = answer.headers
            ended = "answered" if answer.status_code == 200 and answer.json()["choices"][0]["message"]["content"] else "refused"
            if ended == "refused":
                sys.stderr.write(f"{answer.status_code} {answer.text[:300]}\n")
    except httpx.HTTPError as error:
        sys.stderr.write(f"{error!r}\n")
    said = [headers.get(f"x-granite-{name}", "") for name in ("backend", "artefact", "fallback")]
    return Outcome(streamed, ended, *said, time.monotonic() - begun, begun)


def _used_again(url: str, begun: float) -> float | None:
    """Seconds from the primary's return until the gateway answers with it."""
    body = {"model": MODEL, "messages": [{"role": "user", "content": "Hello"}], "max_tokens": 1}
    while time.monotonic() - begun < 30:
        answer = httpx.post(f"{url}/v1/chat/completions", json=body, timeout=60)
        if answer.headers.get("x-granite-fallback") == "no":
            return round(time.monotonic() - begun, 2)
        time.sleep(0.2)
    return None


def _report(outcomes: list[Outcome], killed: float, figures: dict[str, Any]) -> dict[str, Any]:
    plain = [o for o in outcomes if not o.streamed]
    streams = [o for o in outcomes if o.streamed]
    lost = [o for o in plain if o.ended != "answered" or not o.artefact or o.artefact == "unknown"]
    bad_streams = [o for o in streams if o.ended not in ("answered", "cut")]
    after = [o for o in outcomes if o.begun > killed]
    in_time = all(figures[name] is not None and figures[name] <= SOON for name in ("seen_down", "seen_up", "used_again"))
    seconds = sorted(o.seconds for o in outcomes)
    return {
        "passed": not lost and not bad_streams and in_time and any(o.fallback == "yes" for o in after),
        "requests": len(outcomes),
        "answered": Counter(o.ended for o in plain),
        "streams": Counter(o.ended for o in streams),
        "by_backend": Counter(f"{o.backend}, fallback {o.fallback}" for o in outcomes),
        "by_artefact": Counter(o.artefact for o in outcomes),
        "in_flight_at_kill": sum(o.begun <= killed < o.begun + o.seconds for o in outcomes),
        "seconds_p50_max": [round(seconds[len(seconds) // 2], 2), round(seconds[-1], 2)],
        **{f"{name}_s" if not name.endswith("gib") else name: value for name, value in figures.items()},
    }


def _quiet(_: str) -> None:
    return


if __name__ == "__main__":
    sys.exit(main())
