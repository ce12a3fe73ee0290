"""The status API: what the selected backend is, whether it answers, which fine-tune it serves; for applications, Prometheus and people.

``python -m pipeline.operate.status --port N`` serves it.
"""

import argparse
import base64
import hashlib
import sys
from collections.abc import AsyncIterator, Awaitable, Callable, Iterator
from contextlib import asynccontextmanager
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from fastapi import FastAPI, Request, Response
from fastapi.responses import HTMLResponse, JSONResponse
from markupsafe import Markup
from prometheus_client import generate_latest
from prometheus_client.core import GaugeMetricFamily
from prometheus_client.exposition import CONTENT_TYPE_PLAIN_0_0_4

from pipeline import __version__, config
from pipeline.config import Settings
from pipeline.net.loopback import from_here, is_local, spare_loopback
from pipeline.operate.observer import Observation, Observer
from pipeline.report import phrases
from pipeline.report.certificate import summaries
from pipeline.runs.folder import DEFAULT_OUTPUT, writable_home
from pipeline.runs.text import without_password


def main(argv: list[str] | None = None) -> int:
    """Serve until SIGTERM."""
    import uvicorn

    spare_loopback()
    writable_home()
    parser = argparse.ArgumentParser(prog="python -m pipeline.operate.status")
    parser.add_argument("--host", default="127.0.0.1")
    parser.add_argument("--port", type=int, required=True)
    parser.add_argument("--output", type=Path, default=DEFAULT_OUTPUT)
    args = parser.parse_args(argv)
    app = create_app(config.load(), args.output)
    if is_local(f"http://{args.host}"):
        app.middleware("http")(only_from_here)
    uvicorn.run(app, host=args.host, port=args.port, log_level="warning", access_log=False)
    return 0


async def only_from_here(request: Request, answer: Callable[[Request], Awaitable[Response]]) -> Response:
    """Refuse a page of another site, and a name that was made to point here."""
    if not from_here(request.scope["headers"]):
        return JSONResponse({"detail": "only this machine is answered: ask as 127.0.0.1 or localhost"}, 403)
    return await answer(request)


def create_app(settings: Settings, output: Path = DEFAULT_OUTPUT) -> FastAPI:
    """The application; its observer asks the backends from start to stop, requests only read what was last seen."""
    observer = Observer.of(settings, output)

    @asynccontextmanager
    async def lifespan(_: FastAPI) -> AsyncIterator[None]:
        async with observer:
            yield

    app = FastAPI(title="granite-pipeline status", version=__version__, lifespan=lifespan, docs_url=None, redoc_url=None)
    add_routes(app, settings, observer)
    # which runs are certified: id, result and time of each run's certificate
    app.add_api_route("/api/v1/inference/certificates", lambda: summaries(output))
    return app


def add_routes(app: FastAPI, settings: Settings, observer: Observer) -> None:
    """The documented paths."""

    def health() -> Response:
        code = 503 if observer.stale else 200
        body = {"status": "stale" if observer.stale else "ok", "backends": {n: s.healthy for n, s in observer.seen.items()}}
        return JSONResponse(body, code)

    def models() -> dict[str, Any]:
        return {name: backend_json(seen) for name, seen in observer.seen.items()}

    def metrics() -> Response:
        return Response(exposition(settings, observer), headers={"Content-Type": CONTENT_TYPE_PLAIN_0_0_4})

    def page() -> Response:
        page, policy = status_page(settings, observer)
        headers = {"Content-Security-Policy": policy, "X-Content-Type-Options": "nosniff", "Referrer-Policy": "no-referrer"}
        return HTMLResponse(page, headers={**headers, "Cache-Control": "no-store"})

    app.add_api_route("/api/v1/inference/status", lambda: inference_status(settings, observer))
    for path, endpoint in (("/health", health), ("/models", models), ("/metrics", metrics)):
        app.add_api_route(path, endpoint, response_model=None)
        app.add_api_route(f"/api/v1/inference{path}", endpoint, response_model=None, include_in_schema=False)
    app.add_api_route("/", page, response_model=None, include_in_schema=False)


def inference_status(settings: Settings, observer: Observer) -> dict[str, Any]:
    """The documented object: ``backend base_url model orchestrator_model healthy``."""
    address = settings.address()
    seen = observer.seen.get(address.backend)
    models = {"model": address.model, "orchestrator_model": address.orchestrator_model}
    healthy = bool(seen and seen.healthy and not observer.stale)
    return {"backend": address.backend, "base_url": without_password(address.base_url), **models, "healthy": healthy}


def backend_json(seen: Observation) -> dict[str, Any]:
    """One backend with its models, for ``/models``."""
    said = {"base_url": without_password(seen.address.base_url), "healthy": seen.healthy, "detail": seen.detail}
    moments = {"changed_at": _moment(seen.changed_at), "checked_at": _moment(seen.checked_at)}
    return {**said, **moments, "models": [model.to_json() for model in seen.models]}


def exposition(settings: Settings, observer: Observer) -> str:
    """Prometheus text: health, latency and selected backend."""
    return str(generate_latest(Metrics(settings, observer)).decode())


@dataclass(frozen=True)
class Metrics:
    """What was last seen, as a Prometheus collector: nothing is kept between two requests."""

    settings: Settings
    observer: Observer

    def collect(self) -> Iterator[GaugeMetricFamily]:
        """The documented gauges."""
        now = datetime.now(UTC).timestamp()
        healthy = _gauge("backend_healthy", "1 when the backend's configured model answers", "backend")
        selected = _gauge("backend_selected", "1 for the backend in LLM_BACKEND", "backend")
        age = _gauge("backend_check_age_seconds", "seconds since the backend was last asked", "backend")
        labels = ("backend", "model", "run")
        words = "1 when the model is served; run and fine_tune are set for this project's own"
        available = _gauge("model_available", words, *labels, "fine_tune")
        latency = _gauge("model_check_latency_seconds", "seconds the last status request took", *labels)
        for backend, seen in self.observer.seen.items():
            healthy.add_metric([backend], seen.healthy)
            selected.add_metric([backend], backend == self.settings.llm_backend)
            age.add_metric([backend], now - seen.checked_at if seen.checked_at else float("inf"))
            for model in seen.models:
                run, fine_tune = (model.artefact.run, model.artefact.fine_tune) if model.artefact else ("", "")
                available.add_metric([backend, model.name, run, fine_tune], model.available)
                if model.latency_ms is not None:
                    latency.add_metric([backend, model.name, run], model.latency_ms / 1000)
        yield from (healthy, selected, age, available, latency)


def _gauge(name: str, words: str, *labels: str) -> GaugeMetricFamily:
    return GaugeMetricFamily(f"granite_{name}", words, labels=labels)


def status_page(settings: Settings, observer: Observer) -> tuple[str, str]:
    """The page for people and its Content-Security-Policy: no script, nothing fetched, its own style only."""
    css = (phrases.TEMPLATES / "status.css").read_text(encoding="utf-8")
    digest = base64.b64encode(hashlib.sha256(css.encode()).digest()).decode()
    policy = f"default-src 'none'; style-src 'sha256-{digest}'; base-uri 'none'; form-action 'none'; frame-ancestors 'none'"
    status = inference_status(settings, observer)
    rows = {name: backend_json(seen) for name, seen in observer.seen.items()}
    now = datetime.now(UTC).isoformat(timespec="seconds")
    template = phrases.environment().get_template("status.html.j2")
    page = template.render(status=status, rows=rows, css=Markup(css), now=now, version=__version__, stale=observer.stale)
    return page, policy


def _moment(timestamp: float) -> str | None:
    return datetime.fromtimestamp(timestamp, UTC).isoformat(timespec="seconds") if timestamp else None


if __name__ == "__main__":
    sys.exit(main())
