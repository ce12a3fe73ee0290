"""Soak HTTP endpoints on loopback and watch the memory and file handles of the processes behind them.

    python benchmarks/soak.py --pid 1234 --get http://127.0.0.1:8080/health --minutes 15 --concurrency 32
    python benchmarks/soak.py --pid 1234 --chat http://127.0.0.1:8080/v1 --model granite-soc --minutes 15

Ends with exit code 1 when a request failed, resident memory grew by 2 % or more, or file handles kept growing. The first
tenth of the time is warm-up: caches fill and connections open, so growth is counted from its end.
"""

from __future__ import annotations

import argparse
import asyncio
import statistics
import sys
import time
from dataclasses import dataclass, field

import httpx
import psutil

_GROWTH = 0.02
_WARM_UP = 0.1
_SAMPLES = 60


@dataclass
class Soak:
    """What was asked and seen."""

    latencies: list[float] = field(default_factory=list)
    errors: dict[str, int] = field(default_factory=dict)
    samples: list[tuple[float, int, int]] = field(default_factory=list)


async def ask(client: httpx.AsyncClient, args: argparse.Namespace, soak: Soak, until: float) -> None:
    """One client: request after request until the time is over."""
    turn = 0
    while time.monotonic() < until:
        begun = time.monotonic()
        try:
            if args.chat and (not args.get or turn % 4 == 0):
                body = {"model": args.model, "max_tokens": 8, "messages": [{"role": "user", "content": f"Say {turn}."}]}
                answer = await client.post(f"{args.chat}/chat/completions", json=body)
            else:
                answer = await client.get(args.get[turn % len(args.get)])
            answer.raise_for_status()
            soak.latencies.append(time.monotonic() - begun)
        except httpx.HTTPError as error:
            name = str(getattr(getattr(error, "response", None), "status_code", type(error).__name__))
            soak.errors[name] = soak.errors.get(name, 0) + 1
        turn += 1


async def watch(pids: list[int], soak: Soak, until: float, every: float) -> None:
    """Resident bytes and file handles of the processes and their children, now and then."""
    begun = time.monotonic()
    while time.monotonic() < until:
        found = [p for pid in pids for p in (psutil.Process(pid), *psutil.Process(pid).children(recursive=True))]
        soak.samples.append((time.monotonic() - begun, sum(p.memory_info().rss for p in found), sum(p.num_fds() for p in found)))
        await asyncio.sleep(every)


async def run(args: argparse.Namespace) -> Soak:
    """All clients at once, and the watch beside them."""
    soak, seconds = Soak(), args.minutes * 60
    until = time.monotonic() + seconds
    limits = httpx.Limits(max_connections=args.concurrency)
    async with httpx.AsyncClient(timeout=120, limits=limits) as client:
        clients = [ask(client, args, soak, until) for _ in range(args.concurrency)]
        await asyncio.gather(watch(args.pid, soak, until, seconds / _SAMPLES), *clients)
    return soak


def judge(soak: Soak, seconds: float) -> int:
    """Print the table; 1 when something failed or grew."""
    settled = [sample for sample in soak.samples if sample[0] >= _WARM_UP * seconds] or soak.samples
    tenth = max(1, len(settled) // 10)
    first, last = (statistics.median(s[1] for s in part) for part in (settled[:tenth], settled[-tenth:]))
    handles = [statistics.median(s[2] for s in part) for part in (settled[:tenth], settled[-tenth:])]
    growth, times = last / first - 1, sorted(soak.latencies) or [0.0]
    print("| requests | errors | p50 ms | p99 ms | RSS MiB first | last | growth | handles first | last |")
    print("| --- | --- | --- | --- | --- | --- | --- | --- | --- |")
    quantiles = [1000 * times[min(len(times) - 1, int(share * len(times)))] for share in (0.5, 0.99)]
    figures = [
        len(soak.latencies),
        soak.errors or 0,
        *(f"{q:.1f}" for q in quantiles),
        f"{first / 2**20:.1f}",
        f"{last / 2**20:.1f}",
    ]
    print("| " + " | ".join(map(str, [*figures, f"{growth:+.2%}", *handles])) + " |")
    return int(bool(soak.errors) or not soak.latencies or growth >= _GROWTH or handles[1] > handles[0])


def main() -> int:
    """Parse, soak, judge."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--pid", type=int, action="append", required=True, help="process to watch with its children; repeatable")
    parser.add_argument("--get", action="append", default=[], help="URL to GET; repeatable")
    parser.add_argument("--chat", default="", help="OpenAI-compatible base URL for short chats")
    parser.add_argument("--model", default="", help="model name for --chat")
    parser.add_argument("--minutes", type=float, default=15)
    parser.add_argument("--concurrency", type=int, default=32)
    args = parser.parse_args()
    if not args.get and not args.chat:
        parser.error("give --get or --chat")
    return judge(asyncio.run(run(args)), args.minutes * 60)


if __name__ == "__main__":
    sys.exit(main())
