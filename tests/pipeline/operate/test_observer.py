from __future__ import annotations

import asyncio
import time
from typing import Any

import pytest

from pipeline.config import Address
from pipeline.operate import registry
from pipeline.operate.observer import Observer
from pipeline.operate.registry import ModelStatus


def test_a_check_that_breaks_is_an_unavailable_backend_and_watching_goes_on(monkeypatch: pytest.MonkeyPatch) -> None:
    asked, said = 0, list[tuple[bool, str]]()

    # a fault nobody has met yet can only be made
    async def broken_once(*_: Any, **__: Any) -> list[ModelStatus]:
        nonlocal asked
        asked += 1
        if asked == 2:
            raise PermissionError("/home/sk-planted")
        return [ModelStatus("m", True)]

    async def watch() -> None:
        async with Observer([Address("openai", "http://127.0.0.1:9", "m", "m")], period=0.01) as observer:
            until = time.monotonic() + 20
            while asked < 4 and time.monotonic() < until:
                said.append((observer.seen["openai"].healthy, observer.seen["openai"].detail))
                await asyncio.sleep(0)
            assert observer.seen["openai"].healthy

    monkeypatch.setattr(registry, "check", broken_once)
    asyncio.run(watch())
    words = "the check of openai broke off (PermissionError): please report it"
    assert list(dict.fromkeys(said)) == [(False, "not asked yet"), (True, ""), (False, words)]
