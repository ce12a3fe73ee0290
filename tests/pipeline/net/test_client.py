from __future__ import annotations

import asyncio

import pytest

from pipeline.net.client import wait_for


async def _double(value: int) -> int:
    await asyncio.sleep(0)
    if value < 0:
        raise ValueError("negative")
    return 2 * value


async def _in_a_notebook(value: int) -> int:
    return wait_for(_double(value))


def test_works_with_and_without_a_running_loop() -> None:
    assert wait_for(_double(2)) == 4
    assert asyncio.run(_in_a_notebook(3)) == 6


def test_errors_pass_through() -> None:
    with pytest.raises(ValueError, match="negative"):
        asyncio.run(_in_a_notebook(-1))
