"""A backend that chats and streams as an OpenAI-compatible server does, and dies when it is told to; run as a process.

python tests/support/upstream.py PORT NAME [die-in-stream|hang|refuse]
"""

from __future__ import annotations

import asyncio
import os
import signal
import sys
from typing import Any

import uvicorn
from fastapi import FastAPI, Request
from fastapi.responses import JSONResponse, StreamingResponse

PORT, NAME, MODE = int(sys.argv[1]), sys.argv[2], (sys.argv[3:] or [""])[0]
app = FastAPI()
# the last request's body
SEEN: dict[str, Any] = {}


@app.get("/health")
async def health() -> dict[str, str]:
    return {}


@app.get("/v1/models")
async def models() -> dict[str, Any]:
    return {"data": [{"id": NAME, "root": os.environ["MODEL_PATH"]}]}


@app.get("/props")
async def props() -> dict[str, Any]:
    return {"model_path": os.environ["MODEL_PATH"], "default_generation_settings": {"n_ctx": 512}}


@app.get("/seen")
async def seen() -> dict[str, Any]:
    return SEEN


@app.post("/v1/completions")
async def complete(request: Request) -> dict[str, Any]:
    SEEN.clear()
    SEEN.update(await request.json())
    choice = {"index": 0, "text": NAME, "finish_reason": "stop"}
    usage = {"prompt_tokens": 1, "completion_tokens": 1, "total_tokens": 2}
    return {"id": "x", "created": 1, "model": NAME, "object": "text_completion", "choices": [choice], "usage": usage}


@app.post("/v1/chat/completions", response_model=None)
async def chat(request: Request) -> JSONResponse | StreamingResponse:
    body = await request.json()
    SEEN.clear()
    SEEN.update(body)
    if MODE == "hang":
        await asyncio.sleep(600)
    if MODE == "refuse":
        return JSONResponse({"error": {"message": "context too long", "type": "invalid_request_error"}}, 400)
    base = {"id": "x", "created": 1, "model": NAME}
    if not body.get("stream"):
        message = {"role": "assistant", "content": NAME}
        choice = {"index": 0, "message": message, "finish_reason": "stop"}
        usage = {"prompt_tokens": 1, "completion_tokens": 1, "total_tokens": 2}
        return JSONResponse({**base, "object": "chat.completion", "choices": [choice], "usage": usage})
    return StreamingResponse(_stream({**base, "object": "chat.completion.chunk"}), media_type="text/event-stream")


async def _stream(base: dict[str, Any]) -> Any:
    import json

    for i, word in enumerate(("one ", "two ", "three")):
        delta = {"index": 0, "delta": {"role": "assistant", "content": word}, "finish_reason": None}
        yield f"data: {json.dumps({**base, 'choices': [delta]})}\n\n"
        await asyncio.sleep(0.2)
        if MODE == "die-in-stream" and i == 1:
            os.kill(os.getpid(), signal.SIGKILL)
    yield f"data: {json.dumps({**base, 'choices': [{'index': 0, 'delta': {}, 'finish_reason': 'stop'}]})}\n\n"
    yield "data: [DONE]\n\n"


if __name__ == "__main__":
    uvicorn.run(app, host="127.0.0.1", port=PORT, log_level="warning")
