"""``python -m pipeline.status_server``: the status API as a process."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Awaitable, Callable
from pathlib import Path
from typing import TYPE_CHECKING

from pipeline import config
from pipeline.origins import from_here
from pipeline.proxy import spare_loopback
from pipeline.reach import is_local
from pipeline.runs import DEFAULT_OUTPUT

if TYPE_CHECKING:
    from fastapi import Request, Response


def main(argv: list[str] | None = None) -> int:
    """Serve until SIGTERM."""
    import uvicorn

    from pipeline.status_api import create_app

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
