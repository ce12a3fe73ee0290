"""``python -m pipeline.operate.proxy``: LiteLLM's proxy with our routing, our answer headers, and nothing else of it reachable."""

import argparse
import asyncio
import contextlib
import hmac
import os
import secrets
import sys
from collections.abc import Awaitable, Callable, Iterable, MutableMapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, cast, get_args

from fastapi import HTTPException
from fastapi.responses import JSONResponse

from pipeline import config
from pipeline.config import Strategy
from pipeline.net.chat import SAMPLING
from pipeline.net.loopback import from_here, spare_loopback
from pipeline.operate.observer import Observer
from pipeline.operate.routing import REQUEST_TIMEOUT, Router, write_config
from pipeline.runs.folder import DEFAULT_OUTPUT, writable_home

Scope = MutableMapping[str, Any]
Receive = Callable[[], Awaitable[MutableMapping[str, Any]]]
Send = Callable[[MutableMapping[str, Any]], Awaitable[None]]
# LiteLLM's proxy has hundreds of routes for administration; applications need these
_MODELS = frozenset({"/v1/models", "/models"})
PATHS = frozenset({"/v1/chat/completions", "/chat/completions", "/v1/completions", *_MODELS})
_KEY_HEADERS = frozenset({b"authorization", b"api-key", b"x-api-key", b"x-goog-api-key", b"ocp-apim-subscription-key"})
# no usage reports, no price list from the network, no pages, no look at a .env of its own
_ENVIRONMENT = {
    **{"LITELLM_MODE": "PRODUCTION", "LITELLM_LOG": "ERROR", "LITELLM_TELEMETRY": "False", "DO_NOT_TRACK": "1"},
    **dict.fromkeys(("NO_DOCS", "NO_REDOC", "DISABLE_ADMIN_UI"), "True"),
    **dict.fromkeys(("LITELLM_LOCAL_MODEL_COST_MAP", "LITELLM_DONT_SHOW_FEEDBACK_BOX"), "True"),
}
# what a client must not say: it would undo the routing or answer without a model
_FORBIDDEN = ("fallbacks", "context_window_fallbacks", "content_policy_fallbacks", "mock_response", "mock_testing_fallbacks")
_FIRST = "granite_first_choice"


def main(argv: list[str] | None = None) -> int:
    """Serve until SIGTERM; keys come from the environment."""
    spare_loopback()
    writable_home()
    parser = argparse.ArgumentParser(prog="python -m pipeline.operate.proxy")
    parser.add_argument("--host", default="127.0.0.1")
    parser.add_argument("--port", type=int, required=True)
    parser.add_argument("--config", type=Path, required=True, help="where LiteLLM's configuration is written")
    parser.add_argument("--strategy", choices=get_args(Strategy), help="default: GATEWAY_STRATEGY")
    parser.add_argument("--timeout", type=float, default=REQUEST_TIMEOUT)
    parser.add_argument("--output", type=Path, default=DEFAULT_OUTPUT)
    args = parser.parse_args(argv)
    settings = config.load()
    observer = Observer.of(settings, args.output)
    router = Router(settings, observer, cast(Strategy, args.strategy or settings.gateway_strategy))
    write_config(args.config, router.deployments, args.timeout)
    os.environ.update(_ENVIRONMENT)
    os.environ["CONFIG_FILE_PATH"] = str(args.config)
    # what .env holds is read by our settings only; LiteLLM resolves its key references in the environment
    os.environ.update({variable: settings.address(backend).key for backend, variable in config.key_variables().items()})
    # LiteLLM is given a key of its own for this start: clients' keys are judged here and never reach it
    os.environ["LITELLM_MASTER_KEY"] = inner = f"sk-{secrets.token_hex(32)}"
    keys = Keys(settings.gateway_api_key.get_secret_value(), inner)
    asyncio.run(_serve(args.host, args.port, router, keys))
    return 0


@dataclass(frozen=True)
class Keys:
    """``asked``: what clients must send (empty: nothing); ``inner``: what LiteLLM accepts."""

    asked: str = field(repr=False)
    inner: str = field(repr=False)

    def admits(self, headers: Iterable[tuple[bytes, bytes]]) -> bool:
        """True when the request carries the key that is asked for, or none is."""
        sent = next((value for name, value in headers if name.lower() == b"authorization"), b"")
        return not self.asked or hmac.compare_digest(sent, b"Bearer " + self.asked.encode())

    def exchanged(self, headers: Iterable[tuple[bytes, bytes]]) -> list[tuple[bytes, bytes]]:
        """The headers with LiteLLM's key instead of the client's; its own control headers are taken out."""
        kept = [(n, v) for n, v in headers if n.lower() not in _KEY_HEADERS and not n.lower().startswith(b"x-litellm")]
        return [*kept, (b"authorization", b"Bearer " + self.inner.encode())]


async def _serve(host: str, port: int, router: Router, keys: Keys) -> None:
    import litellm
    import uvicorn
    from litellm.proxy.proxy_server import app

    litellm.callbacks.append(routing_hook(router))
    ready = asyncio.Event()
    guarded_app = guarded(app, router, keys, ready)
    served = uvicorn.Server(uvicorn.Config(guarded_app, host=host, port=port, log_level="warning", access_log=False))
    async with router.observer:
        warming = asyncio.create_task(_warm(served, guarded_app, keys, ready))
        await served.serve()
        warming.cancel()


async def _warm(served: Any, app: Any, keys: Keys, ready: asyncio.Event) -> None:
    """Make LiteLLM import what its first request would, for seconds and with nothing else answered, before we say ready."""
    import httpx
    import litellm

    while not served.started:
        await asyncio.sleep(0.05)
    body = {"messages": [{"role": "user", "content": "Hello"}], "max_tokens": 1}
    with contextlib.suppress(Exception):
        # port 9 refuses: the provider's code is loaded, nobody is asked
        await litellm.acompletion(model="openai/none", api_base="http://127.0.0.1:9", api_key="none", max_retries=0, **body)
    async with httpx.AsyncClient(transport=httpx.ASGITransport(app), base_url="http://127.0.0.1") as client:
        headers = {"Authorization": f"Bearer {keys.asked}"}
        await client.post("/v1/chat/completions", json={**body, "model": "no such model"}, headers=headers)
    ready.set()


def routing_hook(router: Router) -> Any:
    """LiteLLM's callback object: choose deployments before the call, say afterwards which one answered."""
    from litellm.integrations.custom_logger import CustomLogger

    class Routing(CustomLogger):  # type: ignore[misc]
        async def async_pre_call_hook(self, user_api_key_dict: Any, cache: Any, data: dict[str, Any], call_type: Any) -> Any:
            name = str(data.get("model") or "")
            route = router.route(name)
            if route is None:
                message = f"no backend serves {name!r} here; known: {', '.join(router.names())}"
                raise HTTPException(404, {"error": {"message": message, "type": "model_not_found", "code": 404}})
            for word in _FORBIDDEN:
                data.pop(word, None)
            for word in SAMPLING:
                # null means left out, and would go before what the deployment fills in
                if data.get(word, "") is None:
                    del data[word]
            data["model"] = route.order[0].id
            if route.order[1:]:
                data["fallbacks"] = [deployment.id for deployment in route.order[1:]]
            data.setdefault("metadata", {})[_FIRST] = route.first.id
            return data

        async def async_post_call_response_headers_hook(
            self,
            data: dict[str, Any],
            user_api_key_dict: Any,
            response: Any,
            request_headers: Any = None,
            litellm_call_info: dict[str, Any] | None = None,
        ) -> dict[str, str] | None:
            answered = str((litellm_call_info or {}).get("model_id") or "")
            return router.headers(answered, str((data.get("metadata") or {}).get(_FIRST))) or None

    return Routing()


def guarded(app: Any, router: Router, keys: Keys, ready: asyncio.Event) -> Any:
    """LiteLLM's application behind a list of paths and the clients' key."""

    async def wrapped(scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] == "websocket":
            return
        if scope["type"] == "http":
            if (answer := answer_of_ours(scope, router, keys, ready.is_set())) is not None:
                await answer(scope, receive, send)
                return
            scope = {**scope, "headers": keys.exchanged(scope["headers"])}
        await app(scope, receive, send)

    return wrapped


def answer_of_ours(scope: Scope, router: Router, keys: Keys, ready: bool) -> JSONResponse | None:
    """A refusal, or health and model list from what was observed; None for a request that LiteLLM is to answer."""
    path = scope["path"].rstrip("/") or "/"
    # without a key any page in the user's browser could ask here: LiteLLM allows every origin
    if not keys.asked and not from_here(scope["headers"]):
        words = "without GATEWAY_API_KEY only this machine is answered: Origin and Host must be 127.0.0.1 or localhost"
        return _refusal(403, words, "origin")
    if path == "/health":
        observer = router.observer
        backends = {name: seen.healthy and not observer.outdated(seen) for name, seen in observer.seen.items()}
        return JSONResponse({"status": "ok" if ready else "starting", "backends": backends}, 200 if ready else 503)
    if path not in PATHS:
        return _refusal(404, f"the gateway has no {path}", "not_found")
    if not keys.admits(scope["headers"]):
        return _refusal(401, "the gateway's key is missing or wrong: send GATEWAY_API_KEY as a bearer token", "key")
    if path in _MODELS:
        return JSONResponse({"object": "list", "data": [{"id": name, "object": "model"} for name in router.names()]})
    return None


def _refusal(status: int, message: str, kind: str) -> JSONResponse:
    return JSONResponse({"error": {"message": message, "type": kind}}, status)


if __name__ == "__main__":
    sys.exit(main())
