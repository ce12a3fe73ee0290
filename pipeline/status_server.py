"""``python -m pipeline.status_server``: the status API as a process."""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

from pipeline import config
from pipeline.proxy import spare_loopback
from pipeline.runs import DEFAULT_OUTPUT


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
    uvicorn.run(app, host=args.host, port=args.port, log_level="warning", access_log=False)
    return 0


if __name__ == "__main__":
    sys.exit(main())
