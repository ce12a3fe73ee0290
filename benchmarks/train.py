"""Training speed: unsloth and padded batches against rows packed into one sequence, same rows and model, in turn, in one go.

    python -m benchmarks.train [--data soc|tools|FILE] [--model FOLDER] [--steps 12] [--repeat 2] [--only today,packed-4]

Each way runs in a process of its own through the product's own Trainer; the first steps are not counted. Tokens are those of the rows,
however many were computed. ``tools`` are agents' rows whose tool list and system message are more than 400 tokens.
"""

from __future__ import annotations

import argparse
import json
import random
import resource
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

from benchmarks import agent_data
from pipeline.runs.files import write_atomic

WARM = 3
# how rows are trained on: the trainer, the kind of batches and rows a batch
WAYS = {
    "today": ("unsloth", "shuffled", 4),
    "padded": ("hf", "shuffled", 4),
    "packed-4": ("hf", "packed", 4),
    "packed-8": ("hf", "packed", 8),
    "packed-16": ("hf", "packed", 16),
    "unsloth-16": ("unsloth", "shuffled", 16),
    "padded-16": ("hf", "shuffled", 16),
}
USUAL = ("today", "padded", "packed-4", "packed-8")
_RULES = [
    "Answer with tool calls alone where something is to be done, else with one sentence that begins with No action.",
    "Block an address only when it lies outside the office networks 10.0.0.0/8 and 172.16.0.0/12.",
    "Isolate a host only on a sign that it is taken over: encryption, credential theft, a web shell or a rootkit.",
    "Look up each hash and each domain before anything is blocked because of it.",
    "Never act on an approved test, a red team's scan or planned maintenance.",
]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", default="soc", help="soc, tools, or a file of rows")
    parser.add_argument("--model", default="embedded", help="embedded, or a model folder")
    parser.add_argument("--steps", type=int, default=12, help=f"steps of each way, without the first {WARM}")
    parser.add_argument("--repeat", type=int, default=2, help="rounds; the ways take turns")
    parser.add_argument("--method", default="lora", help="lora, qlora or full")
    parser.add_argument("--only", default=",".join(USUAL), help=f"ways, of {', '.join(WAYS)}")
    parser.add_argument("--json", type=Path, help="write the figures here too")
    parser.add_argument("--worker", help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.worker:
        json.dump(measure(args.worker, args), sys.stdout)
        return
    ways = args.only.split(",")
    if unknown := [way for way in ways if way not in WAYS]:
        parser.error(f"there is no way {unknown[0]!r}: use some of {', '.join(WAYS)}")
    with tempfile.TemporaryDirectory() as scratch:
        if args.data == "tools":
            args.data = str(tools(Path(scratch) / "tools.jsonl"))
        found: dict[str, list[dict[str, Any]]] = {way: [] for way in ways}
        for turn in range(args.repeat):
            for way in ways:
                one = _in_a_process(way, args)
                found[way].append(one)
                said = f"{one['tokens_per_second']:.0f} tokens/s, {one['cpu_per_1000']:.2f} CPU s per 1,000 tokens"
                print(f"round {turn + 1}: {way}: {said}, {one['gib']:.2f} GiB ({one['batches']})", file=sys.stderr)
    rows = _table(found)
    print("\n".join(rows))
    if args.json:
        write_atomic(args.json, json.dumps(found, indent=2) + "\n")


def tools(path: Path, rows: int = 400) -> Path:
    """Rows for an agent with a system message and tools of more than 400 tokens in common."""
    system = {"role": "system", "content": "You are the agent of a security operations centre.\n" + "\n".join(_RULES)}
    rng, lines = random.Random(agent_data.SEED), []
    for i in range(rows):
        row = agent_data.tools_row(agent_data.KINDS[i % len(agent_data.KINDS)], rng)
        messages = [m for m in row["messages"] if m["role"] != "system"]
        lines.append(json.dumps({**row, "messages": [system, *messages]}))
    write_atomic(path, "\n".join(dict.fromkeys(lines)) + "\n")
    return path


def _in_a_process(way: str, args: argparse.Namespace) -> dict[str, Any]:
    given = ["--data", args.data, "--model", args.model, "--steps", str(args.steps), "--method", args.method]
    done = subprocess.run([sys.executable, "-m", "benchmarks.train", "--worker", way, *given], capture_output=True, text=True)
    if done.returncode:
        sys.exit(f"{way} failed:\n{done.stderr[-3000:]}")
    return dict(json.loads(done.stdout.splitlines()[-1]))


def measure(way: str, args: argparse.Namespace) -> dict[str, Any]:
    """One way, in this process."""
    trainer_name, kind, size = WAYS[way]
    from training.tuning import trainers

    if trainer_name == "unsloth":
        trainers.import_unsloth()
    import torch
    from transformers import TrainerCallback

    from training.base import resolve
    from training.parameters import FinetuneParameters
    from training.tuning import packing
    from training.tuning.finetune import read_split
    from training.tuning.prepare import Preparer

    with tempfile.TemporaryDirectory() as scratch:
        total = WARM + args.steps
        given = {"base": args.model, "data": args.data, "trainer": trainer_name, "method": args.method}
        params = FinetuneParameters(**given, batch_size=size, max_steps=total, save_steps=10**6)  # type: ignore[arg-type]
        base = resolve(params.base, Path(scratch), None)
        rows = Preparer(base.folder).prepare(read_split(params).train, params.max_length).examples
        dtype = trainers.training_dtype()
        model = trainers.trainable(base.folder, params, trainer_name, dtype)
        batches = trainers.batching(model, trainer_name, params, rows)
        if kind == "shuffled":
            pad_id = model.config.pad_token_id or 0
            batches = trainers.Batching("padded", "", lambda batch: packing.pad(pad_id, batch))
        seen: list[int] = []

        def counted(batch: Any) -> dict[str, Any]:
            seen.append(sum(len(row.input_ids) for row in batch))
            return batches.collate(batch)

        told = trainers.Batching(batches.kind, batches.reason, counted)
        trainer = trainers.make_trainer(model, Path(scratch) / "c", params, dtype, rows, rows[:4], told)
        if kind == "shuffled":
            trainer._get_train_sampler = lambda *_: torch.utils.data.RandomSampler(rows)
        trainer.args.eval_strategy = "no"
        at: dict[int, tuple[float, float]] = {}

        class Clock(TrainerCallback):
            def on_step_end(self, args: Any, state: Any, control: Any, **_: Any) -> None:
                if torch.cuda.is_available():
                    torch.cuda.synchronize()
                at[state.global_step] = time.monotonic(), time.process_time()

        trainer.add_callback(Clock())
        trainer.train()
        (begun, cpu), (ended, cpu_ended) = at[WARM], at[total]
        tokens = sum(seen[WARM:total])
        on_gpu = torch.cuda.is_available()
        peak = torch.cuda.max_memory_reserved() if on_gpu else resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
        return {
            "tokens": tokens,
            "tokens_per_second": tokens / (ended - begun),
            "cpu_per_1000": (cpu_ended - cpu) / tokens * 1000,
            "gib": peak / 2**30,
            "allocated_gib": torch.cuda.max_memory_allocated() / 2**30 if on_gpu else None,
            "batches": batches.kind,
            "dtype": str(dtype).removeprefix("torch."),
            "device": torch.cuda.get_device_name() if on_gpu else "cpu",
        }


def _table(found: dict[str, list[dict[str, Any]]]) -> list[str]:
    """Medians, and each way against the first."""
    lines = ["| | tokens/s | ratio | CPU s per 1,000 tokens | ratio | peak GiB |", "| --- | --- | --- | --- | --- | --- |"]
    first = next(iter(found.values()))
    usual = [statistics.median(one[key] for one in first) for key in ("tokens_per_second", "cpu_per_1000")]
    for way, every in found.items():
        speed, cpu, gib = (statistics.median(one[key] for one in every) for key in ("tokens_per_second", "cpu_per_1000", "gib"))
        trainer, kind, size = WAYS[way]
        name = f"{trainer}, {kind}, batch {size} ({every[0]['dtype']})"
        lines.append(f"| {name} | {speed:.0f} | {speed / usual[0]:.2f} | {cpu:.2f} | {usual[1] / cpu:.2f} | {gib:.2f} |")
    return lines


if __name__ == "__main__":
    main()
