"""Planned flags against the engine's defaults and the flags people copy from guides: same machine, model and load, one go.

    python -m benchmarks.serve --engine llamacpp [--quick] [--sweep]
    python -m benchmarks.serve --engine vllm --quick --purpose verify

Writes ``<out>/<engine>.json`` and ``<out>/<engine>.png`` and prints the table. A setting that does not start is a row that says why.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import sys
import tempfile
import time
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any

import httpx

from benchmarks.load import Load, put_load
from pipeline import engines
from pipeline.engines.base import Engine
from pipeline.errors import PipelineError
from pipeline.net.loopback import claim
from pipeline.planning.plan import Plan, Request, Setting
from pipeline.runs.folder import DEFAULT_NAME, DEFAULT_OUTPUT, RunFolder
from pipeline.serve import server, start
from pipeline.serve.start import Endpoint, Options, Target
from pipeline.verify.score import read_held_out

LEVELS = (1, 8, 32)
IDENTITY = {"--model", "--served-model-name", "--alias"}
Flags = Mapping[str, str | None]


@dataclass(frozen=True)
class Variant:
    """One way to start the engine: the plan with flags dropped, and flags and variables laid over what is left."""

    name: str
    flags: Flags = field(default_factory=dict)
    env: Mapping[str, str | None] = field(default_factory=dict)
    bare: bool = False

    def of(self, plan: Plan) -> Plan:
        """The plan as this variant has it; a None variable is removed, ``bare`` keeps only model and name."""
        flags = {s.name: s for s in plan.flags if not self.bare or s.name in IDENTITY}
        env = {} if self.bare else {s.name: s for s in plan.env}
        flags |= {name: Setting(name, value, self.name) for name, value in self.flags.items()}
        for name, value in self.env.items():
            env.pop(name, None)
            if value is not None:
                env[name] = Setting(name, value, self.name)
        return replace(plan, flags=tuple(flags.values()), env=tuple(env.values()))


@dataclass(frozen=True)
class Result:
    """What a variant gave: seconds to ready, resident memory after the load, predicted memory, one load per level."""

    variant: str
    ready: float = 0.0
    rss_gib: float = 0.0
    predicted_gib: float = 0.0
    loads: tuple[Load, ...] = ()
    argv: tuple[str, ...] = ()
    env: Mapping[str, str] = field(default_factory=dict)
    failed: str = ""


def compared(engine: str, plan: Plan, cores: int, limit: int) -> list[Variant]:
    """Planned, defaults, and what guides say; the wheel's llama.cpp has no default for ``-c``, so it gets llama-server's."""
    if engine == "llamacpp":
        defaults: Flags = {"-c": str(limit), "--parallel": "4", "--kv-unified": None, "--jinja": None}
        copied: Flags = {"-c": "4096", "--threads": str(cores), "--n-gpu-layers": "99", "--flash-attn": "on"}
        return [Variant("planned"), Variant("defaults", defaults, bare=True), Variant("guides", copied, bare=True)]
    # unset, the KV cache takes most of the RAM, which a shared machine does not have: the default gets the plan's size
    space = {"VLLM_CPU_KVCACHE_SPACE": plan.environment.get("VLLM_CPU_KVCACHE_SPACE", "4")}
    guide = {"--dtype": "bfloat16", "--max-model-len": "4096", "--gpu-memory-utilization": "0.9", "--max-num-seqs": "256"}
    return [Variant("planned"), Variant("defaults", env=space, bare=True), Variant("guides", guide, space, bare=True)]


def swept(engine: str, plan: Plan) -> list[Variant]:
    """The plan with one key setting changed at a time."""
    if engine == "llamacpp":
        wait = {"OMP_WAIT_POLICY": None, "GOMP_SPINCOUNT": None}
        spins = [Variant(f"spin {n}", env={**wait, "GOMP_SPINCOUNT": n}) for n in ("1000", "10000", "100000")]
        policies = [Variant(p, env={**wait, "OMP_WAIT_POLICY": p}) for p in ("passive", "active")]
        context = plan.max_model_len
        slots = [Variant(f"{n} slots", {"--parallel": str(n), "-c": str(n * context)}) for n in (4, 16, 32)]
        others = [
            Variant("flash-attn on", {"--flash-attn": "on"}),
            Variant("flash-attn off", {"--flash-attn": "off"}),
            Variant("ubatch 128", {"--ubatch-size": "128"}),
            Variant("1 thread", {"--threads": "1"}),
        ]
        return [Variant("OpenMP default", env=wait), *policies, *spins, *slots, *others]
    other = "float32" if plan.dtype == "bfloat16" else "bfloat16"
    kept = ("VLLM_ENABLE_V1_MULTIPROCESSING", "VLLM_CPU_OMP_THREADS_BIND", "OMP_NUM_THREADS", "GOMP_SPINCOUNT")
    return [
        Variant("eager", {"--enforce-eager": None}),
        Variant("16 sequences", {"--max-num-seqs": "16"}),
        Variant("64 sequences", {"--max-num-seqs": "64"}),
        Variant("no prefix caching", {"--no-enable-prefix-caching": None}),
        Variant(other, {"--dtype": other}),
        Variant("8192 tokens a step", {"--max-num-batched-tokens": "8192"}),
        Variant("512 tokens a step", {"--max-num-batched-tokens": "512"}),
        Variant("asynchronous scheduling", {"--async-scheduling": None}),
        *(Variant(f"spin {n}", env={"GOMP_SPINCOUNT": n}) for n in ("1000", "100000")),
        Variant("vLLM's own threads", env=dict.fromkeys(kept)),
    ]


def measure(engine: Engine, plan: Plan, variant: Variant, request: Request, work: Work) -> Result:
    """Start, load at every level, stop."""
    made = variant.of(plan)
    launch = engine.launch(made, request, host=start.LOOPBACK, port=claim(start.LOOPBACK, 0))
    process = server.start(launch, work.folder / f"{engine.name}-{variant.name.replace(' ', '-')}.log", owner=os.getpid())
    begun = time.monotonic()
    try:
        server.wait_ready(process, launch.start_timeout, lambda _: None)
        start.first_token(Endpoint(engine.name, launch.url, launch.model, server=process))
        ready = time.monotonic() - begun
        # the first answers of a server pay for caches and lazy compilation that no later one pays for
        put_load(launch.url, launch.model, work.prompts[:2], 2, 8)
        loads = []
        for level in work.requests:
            count = min(len(work.prompts), work.requests[level])
            loads.append(put_load(launch.url, launch.model, work.prompts[:count], level, work.max_tokens))
        rss = process.memory_gib()
    except (PipelineError, httpx.HTTPError) as error:
        return Result(
            variant.name, failed=str(getattr(error, "message", repr(error)))[:300], argv=launch.argv, env=dict(launch.env)
        )
    finally:
        server.stop(process)
    return Result(variant.name, ready, rss, plan.memory.total, tuple(loads), launch.argv, dict(launch.env))


def median(several: Sequence[Result]) -> Result:
    """The round in the middle at each level of concurrency; a setting that did not start once is that failure."""
    if failed := next((r for r in several if r.failed), None):
        return failed
    levels = zip(*(r.loads for r in several), strict=True)
    middle = tuple(sorted(loads, key=lambda load: load.tokens_per_second)[len(loads) // 2] for loads in levels)
    first = several[0]
    return replace(
        first, ready=statistics.median(r.ready for r in several), rss_gib=max(r.rss_gib for r in several), loads=middle
    )


@dataclass(frozen=True)
class Work:
    """The load: prompts, requests per level, tokens per answer; logs go to ``folder``."""

    prompts: list[list[dict[str, Any]]]
    requests: Mapping[int, int]
    max_tokens: int
    folder: Path


def table(results: Sequence[Result]) -> str:
    """A Markdown table, best speed at the highest level first among the sweep."""
    shown = next((r.loads for r in results if r.loads), ())
    levels = [load.concurrency for load in shown] or LEVELS
    head = ["setting", "ready, s", "RSS, GiB", *(f"tok/s at {n}" for n in levels), *(f"TTFT p50/p95 ms at {n}" for n in levels)]
    lines = ["| " + " | ".join(head) + " |", "| " + " | ".join("---" for _ in head) + " |"]
    for r in results:
        cells = [r.variant, "did not start: " + r.failed.replace("\n", " ")] if r.failed else _cells(r)
        lines.append("| " + " | ".join(cells) + " |")
    return "\n".join(lines)


def _cells(r: Result) -> list[str]:
    speed = [f"{load.tokens_per_second:.0f}" for load in r.loads]
    first = [f"{load.ttft_p50 * 1000:.0f} / {load.ttft_p95 * 1000:.0f}" for load in r.loads]
    return [r.variant, f"{r.ready:.0f}", f"{r.rss_gib:.2f}", *speed, *first]


def plot(results: Sequence[Result], engine: str, path: Path) -> None:
    """Bars of tokens per second by setting and concurrency."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    shown = [r for r in results if not r.failed]
    figure, axes = plt.subplots(figsize=(max(6, 1.1 * len(shown) + 2), 4))
    for index, level in enumerate(load.concurrency for load in shown[0].loads):
        speeds = [r.loads[index].tokens_per_second for r in shown]
        axes.bar([x + 0.27 * (index - 1) for x in range(len(shown))], speeds, 0.25, label=f"{level} at once")
    axes.set_xticks(range(len(shown)), [r.variant for r in shown], rotation=30, ha="right")
    axes.set_ylabel("tokens per second")
    axes.set_title(f"{engine}: planned flags against others")
    axes.legend()
    figure.tight_layout()
    figure.savefig(path, dpi=110)
    plt.close(figure)


def main(argv: list[str] | None = None) -> int:
    """Run the comparison; returns 0 when the planned flags started."""
    args = _parser().parse_args(argv)
    engine = engines.get(args.engine)
    target = Target.of_run(RunFolder(args.run, args.output), engine.name)
    request = start.request_for(target, Options(purpose=args.purpose))
    plan = engine.plan(request)
    rows = read_held_out(RunFolder(args.run, args.output).heldout)
    prompts = [[dict(m) for m in row.messages] for row in rows]
    requests = {1: 2, 8: 16, 32: 32} if args.quick else {1: 4, 8: 32, 32: 96}
    requests = {level: requests[level] for level in LEVELS if str(level) in args.levels.split(",")}
    work = Work(prompts, requests, 32 if args.quick else 64, Path(tempfile.mkdtemp(prefix="benchmark-serve-")))
    cores = request.hardware.cpu.cores
    variants = compared(engine.name, plan, cores, request.model.shape.max_positions)
    variants = (variants[:1] if args.no_compare else variants) + (swept(engine.name, plan) if args.sweep else [])
    if args.only:
        variants = [v for v in variants if v.name in args.only.split(",")]
    args.out.mkdir(parents=True, exist_ok=True)
    rounds: dict[str, list[Result]] = {}
    results: list[Result] = []
    name = engine.name + ("-sweep" if args.sweep else "")
    # round by round, not setting by setting: a busy minute of the machine then hurts every setting alike
    for variant in variants * args.repeat:
        rounds.setdefault(variant.name, []).append(measure(engine, plan, variant, request, work))
        sys.stderr.write(table(rounds[variant.name][-1:]).splitlines()[-1] + "\n")
        sys.stderr.flush()
        results = [median(several) for several in rounds.values()]
        (args.out / f"{name}.json").write_text(json.dumps([asdict(r) for r in results], indent=2) + "\n")
    sys.stdout.write(table(results) + "\n")
    if any(not r.failed for r in results):
        plot(results, engine.name, args.out / f"{name}.png")
    return 0 if results and not results[0].failed else 3


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--engine", choices=("vllm", "llamacpp"), default="llamacpp")
    parser.add_argument("--run", default=DEFAULT_NAME, help="the run whose artefacts are served")
    parser.add_argument("--output", type=Path, default=DEFAULT_OUTPUT, help="folder that holds the runs")
    parser.add_argument("--purpose", choices=("verify", "serve", "throughput", "latency"), default="serve")
    parser.add_argument("--quick", action="store_true", help="fewer and shorter answers")
    parser.add_argument("--sweep", action="store_true", help="also the plan with one key setting changed at a time")
    parser.add_argument("--no-compare", action="store_true", help="leave out defaults and guides")
    parser.add_argument("--only", default="", help="comma-separated names of settings to measure")
    parser.add_argument("--levels", default="1,8,32", help="requests at once: any of 1, 8 and 32, comma-separated")
    parser.add_argument("--repeat", type=int, default=1, help="rounds over all settings; the middle one is shown")
    parser.add_argument("--out", type=Path, default=Path("benchmarks/results"), help="folder for JSON and plot")
    return parser


if __name__ == "__main__":
    sys.exit(main())
