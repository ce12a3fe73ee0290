"""The status API: what the selected backend is, whether it answers, which fine-tune it serves; for applications, Prometheus and people."""

from __future__ import annotations

import argparse
import base64
import hashlib
import sys
from collections.abc import AsyncIterator, Awaitable, Callable, Mapping
from contextlib import asynccontextmanager
from dataclasses import asdict
from datetime import UTC, datetime
from functools import cache
from pathlib import Path
from typing import TYPE_CHECKING, Any

from fastapi import FastAPI, Response
from fastapi.responses import HTMLResponse, JSONResponse, PlainTextResponse
from markupsafe import Markup

from pipeline import __version__, config
from pipeline.config import Settings
from pipeline.net.loopback import from_here, is_local, spare_loopback
from pipeline.operate.observer import Observer, Seen
from pipeline.report import html
from pipeline.report.certificate import summaries
from pipeline.runs.folder import DEFAULT_OUTPUT
from pipeline.runs.text import without_password

DEFAULT_PORT = 8080


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

    def status() -> dict[str, Any]:
        return inference_status(settings, observer)

    def health() -> Response:
        code = 503 if observer.stale else 200
        body = {"status": "stale" if observer.stale else "ok", "backends": {n: s.healthy for n, s in observer.seen.items()}}
        return JSONResponse(body, code)

    def models() -> dict[str, Any]:
        return {name: backend_json(seen) for name, seen in observer.seen.items()}

    def metrics() -> Response:
        return PlainTextResponse(exposition(settings, observer), media_type="text/plain; version=0.0.4; charset=utf-8")

    def page() -> Response:
        page, policy = status_page(settings, observer)
        headers = {"Content-Security-Policy": policy, "X-Content-Type-Options": "nosniff", "Referrer-Policy": "no-referrer"}
        return HTMLResponse(page, headers={**headers, "Cache-Control": "no-store"})

    app.add_api_route("/api/v1/inference/status", status)
    for path, endpoint in (("/health", health), ("/models", models), ("/metrics", metrics)):
        app.add_api_route(path, endpoint, response_model=None)
        app.add_api_route(f"/api/v1/inference{path}", endpoint, response_model=None, include_in_schema=False)
    app.add_api_route("/", page, response_model=None, include_in_schema=False)


def inference_status(settings: Settings, observer: Observer) -> dict[str, Any]:
    """The documented object: ``backend base_url model orchestrator_model healthy``."""
    address = settings.address()
    seen = observer.seen.get(address.backend)
    return {
        "backend": address.backend,
        "base_url": without_password(address.base_url),
        "model": address.model,
        "orchestrator_model": address.orchestrator_model,
        "healthy": bool(seen and seen.healthy and not observer.stale),
    }


def backend_json(seen: Seen) -> dict[str, Any]:
    """One backend with its models, for ``/models``."""
    return {
        "base_url": without_password(seen.address.base_url),
        "healthy": seen.healthy,
        "detail": seen.detail,
        "changed_at": _moment(seen.changed_at),
        "checked_at": _moment(seen.checked_at),
        "models": [asdict(model) for model in seen.models],
    }


def exposition(settings: Settings, observer: Observer) -> str:
    """Prometheus text: health, latency and selected backend; labels are escaped as the format asks."""
    lines = []
    for name, kind, words in (
        ("granite_backend_healthy", "gauge", "1 when the backend's configured model answers"),
        ("granite_backend_selected", "gauge", "1 for the backend in LLM_BACKEND"),
        ("granite_backend_check_age_seconds", "gauge", "seconds since the backend was last asked"),
        ("granite_model_available", "gauge", "1 when the model is served; run and fine_tune are set for this project's own"),
        ("granite_model_check_latency_seconds", "gauge", "seconds the last status request took"),
    ):
        lines += [f"# HELP {name} {words}", f"# TYPE {name} {kind}"]
        lines += [f"{name}{_labels(labels)} {value:g}" for labels, value in _samples(name, settings, observer)]
    return "\n".join(lines) + "\n"


def status_page(settings: Settings, observer: Observer) -> tuple[str, str]:
    """The page for people and its Content-Security-Policy: no script, nothing fetched, its own style only."""
    css = (html.TEMPLATES / "status.css").read_text(encoding="utf-8")
    digest = base64.b64encode(hashlib.sha256(css.encode()).digest()).decode()
    policy = f"default-src 'none'; style-src 'sha256-{digest}'; base-uri 'none'; form-action 'none'; frame-ancestors 'none'"
    status = inference_status(settings, observer)
    rows = {name: backend_json(seen) for name, seen in observer.seen.items()}
    now = datetime.now(UTC).isoformat(timespec="seconds")
    page = _template().render(status=status, rows=rows, css=Markup(css), now=now, version=__version__, stale=observer.stale)
    return page, policy


def _samples(name: str, settings: Settings, observer: Observer) -> list[tuple[dict[str, str], float]]:
    now = datetime.now(UTC).timestamp()
    values: dict[str, Any] = {
        "granite_backend_healthy": lambda s: float(s.healthy),
        "granite_backend_selected": lambda s: float(s.address.backend == settings.llm_backend),
        "granite_backend_check_age_seconds": lambda s: now - s.checked_at if s.checked_at else float("inf"),
    }
    if name in values:
        return [({"backend": backend}, values[name](seen)) for backend, seen in observer.seen.items()]
    found = []
    for backend, seen in observer.seen.items():
        for model in seen.models:
            ours = model.artefact
            labels = {"backend": backend, "model": model.name, "run": ours.run if ours else ""}
            if name == "granite_model_available":
                found.append(({**labels, "fine_tune": ours.fine_tune if ours else ""}, float(model.available)))
            elif model.latency_ms is not None:
                found.append((labels, model.latency_ms / 1000))
    return found


def _labels(labels: Mapping[str, str]) -> str:
    escaped = (
        (name, value.replace("\\", r"\\").replace('"', r"\"").replace("\r", r"\r").replace("\n", r"\n"))
        for name, value in labels.items()
    )
    return "{" + ",".join(f'{name}="{value}"' for name, value in escaped) + "}"


def _moment(timestamp: float) -> str | None:
    return datetime.fromtimestamp(timestamp, UTC).isoformat(timespec="seconds") if timestamp else None


@cache
def _template() -> Any:
    return html.environment().get_template("status.html.j2")


if TYPE_CHECKING:
    from fastapi import Request, Response


def main(argv: list[str] | None = None) -> int:
    """Serve until SIGTERM."""
    import uvicorn

    spare_loopback()
    parser = argparse.ArgumentParser(prog="status_server")
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
    from fastapi.responses import JSONResponse

    if not from_here(request.scope["headers"]):
        return JSONResponse({"detail": "only this machine is answered: ask as 127.0.0.1 or localhost"}, 403)
    return await answer(request)


if __name__ == "__main__":
    sys.exit(main())
