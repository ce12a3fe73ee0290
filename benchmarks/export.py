"""Merge and GGUF: this version's way against another checkout's, same machine and model, in turn, in one go.

python -m benchmarks.export --make FOLDER --parameters 1.9e9
"""

from __future__ import annotations

import argparse
import contextlib
import math
import os
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
from dataclasses import asdict, astuple, dataclass
from pathlib import Path

import psutil

from pipeline.model.safetensors import INDEX, SINGLE, file_header, read_folder
from pipeline.runs.files import read_json, staged, write_json
from pipeline.runs.hashes import sha256_tree
from training import base

SHARD_BYTES = 2**30
LAYERS = 40
HEAD = 128


def make(folder: Path, parameters: float) -> Path:
    """Write a dense Granite of about so many random float16 weights, with the embedded base's tokenizer and template.

    One tensor is in memory at a time. The folder appears whole.
    """
    shapes = _shapes(parameters)
    shards: list[list[str]] = [[]]
    for name in shapes:
        if shards[-1] and 2 * sum(math.prod(shapes[other]) for other in (*shards[-1], name)) > SHARD_BYTES:
            shards.append([])
        shards[-1].append(name)
    with staged(folder) as target:
        target.mkdir()
        base.write_tokenizer(target)
        data = Path(base.__file__).parent / "data" / "embedded"
        shutil.copyfile(data / "generation_config.json", target / "generation_config.json")
        write_json(target / "config.json", read_json(data / "config.json") | _settings(shapes))
        files = [f"model-{i:05}-of-{len(shards):05}.safetensors" for i in range(1, len(shards) + 1)]
        files = files if len(files) > 1 else [SINGLE]
        for seed, (file, names) in enumerate(zip(files, shards, strict=True)):
            _write_random(target / file, {name: shapes[name] for name in names}, seed)
        if len(files) > 1:
            weight_map = {name: file for file, names in zip(files, shards, strict=True) for name in names}
            total = 2 * sum(map(math.prod, shapes.values()))
            write_json(target / INDEX, {"metadata": {"total_size": total}, "weight_map": weight_map})
    return folder


def _shapes(parameters: float) -> dict[str, tuple[int, ...]]:
    """The weights of a model as wide for its depth as Granite's 1B: 40 layers, heads of 128, one key head for four."""
    vocabulary = read_json(Path(base.__file__).parent / "data" / "embedded" / "config.json")["vocab_size"]
    width = max(1, round(2048 * math.sqrt(parameters / 1.9e9) / (4 * HEAD))) * 4 * HEAD
    keys = width // 4
    attention = 2 * width * (width + keys)
    inner = max(1, round((parameters - vocabulary * width - LAYERS * attention) / (LAYERS * 3 * width) / 64)) * 64
    shapes: dict[str, tuple[int, ...]] = {"model.embed_tokens.weight": (vocabulary, width), "model.norm.weight": (width,)}
    for layer in range(LAYERS):
        rows = {"q_proj": (width, width), "k_proj": (keys, width), "v_proj": (keys, width), "o_proj": (width, width)}
        shapes |= {f"model.layers.{layer}.self_attn.{name}.weight": shape for name, shape in rows.items()}
        rows = {"gate_proj": (inner, width), "up_proj": (inner, width), "down_proj": (width, inner)}
        shapes |= {f"model.layers.{layer}.mlp.{name}.weight": shape for name, shape in rows.items()}
        norms = ("input_layernorm", "post_attention_layernorm")
        shapes |= {f"model.layers.{layer}.{name}.weight": (width,) for name in norms}
    return shapes


def _settings(shapes: dict[str, tuple[int, ...]]) -> dict[str, object]:
    width = shapes["model.norm.weight"][0]
    return {
        "hidden_size": width,
        "intermediate_size": shapes["model.layers.0.mlp.gate_proj.weight"][0],
        "num_hidden_layers": LAYERS,
        "num_attention_heads": width // HEAD,
        "num_key_value_heads": width // HEAD // 4,
        "attention_multiplier": HEAD**-0.5,
    }


def _write_random(path: Path, shapes: dict[str, tuple[int, ...]], seed: int) -> None:
    """One safetensors file: norms of 1, everything else normally distributed with the usual standard deviation of 0.02."""
    import numpy as np

    random = np.random.default_rng(seed)
    header, places = file_header({name: ("F16", shape) for name, shape in shapes.items()})
    with path.open("wb") as out:
        out.write(header)
        for name in places:
            if len(shapes[name]) == 1:
                out.write(np.ones(shapes[name], dtype="<f2").tobytes())
            else:
                out.write((random.standard_normal(shapes[name], dtype=np.float32) * np.float32(0.02)).astype("<f2").tobytes())


def adapter(base_folder: Path, folder: Path, rank: int = 16) -> Path:
    """Write a random LoRA adapter for every projection of a base."""
    import numpy as np
    from safetensors.numpy import save_file

    random, halves = np.random.default_rng(0), {}
    for tensor in read_folder(base_folder):
        if tensor.name.endswith("_proj.weight"):
            module = f"base_model.model.{tensor.name.removesuffix('.weight')}"
            halves[f"{module}.lora_A.weight"] = random.normal(0, 0.01, (rank, tensor.shape[1])).astype(np.float32)
            halves[f"{module}.lora_B.weight"] = random.normal(0, 0.01, (tensor.shape[0], rank)).astype(np.float32)
    folder.mkdir()
    save_file(halves, str(folder / "adapter_model.safetensors"))
    write_json(folder / "adapter_config.json", {"lora_alpha": 2 * rank, "r": rank})
    return folder


# the hash that seals an artefact belongs to its stage
STAGES = {
    "merge": """
from training.export.weights import merge_folder
merge_folder(base, adapter, out / "merged")
sha256_tree(out / "merged")
""",
    "GGUF": """
from training.export.gguf import convert
convert(out / "merged", out / "model.gguf", name="model")
sha256_tree(out / "model.gguf")
""",
}
START = "import sys; from pathlib import Path; from pipeline.runs.hashes import sha256_tree\nbase, adapter, out = map(Path, sys.argv[1:])"


@dataclass(frozen=True)
class Cost:
    """What a stage took: wall and CPU seconds of its processes together, GiB of the largest one but for mapped files."""

    wall: float
    cpu: float
    gib: float


def measure(stage: str, code: Path, *paths: Path) -> Cost:
    """Run one stage with the code of a checkout; CalledProcessError when it fails."""
    command = [sys.executable, "-c", START + STAGES[stage], *map(str, paths)]
    before, started = os.times(), time.monotonic()
    process = subprocess.Popen(command, cwd=code, env={**os.environ, "PYTHONPATH": str(code)}, stdout=sys.stderr)
    largest = 0
    while process.poll() is None:
        largest = max(largest, _resident(process.pid))
        time.sleep(0.2)
    if process.returncode:
        raise subprocess.CalledProcessError(process.returncode, command)
    after, wall = os.times(), time.monotonic() - started
    cpu = after.children_user - before.children_user + after.children_system - before.children_system
    return Cost(round(wall, 2), round(cpu, 2), round(largest / 2**30, 2))


def _resident(pid: int) -> int:
    """Bytes of a process or of the largest below it that are resident and belong to no file."""
    sizes = [0]
    with contextlib.suppress(psutil.Error, OSError):
        process = psutil.Process(pid)
        for one in [process, *process.children(recursive=True)]:
            with contextlib.suppress(psutil.Error, OSError):
                fields = Path(f"/proc/{one.pid}/status").read_text().split("RssAnon:")
                sizes.append(int(fields[1].split()[0]) * 1024 if len(fields) > 1 else 0)
    return max(sizes)


def compare(base_folder: Path, ways: dict[str, Path], repeat: int) -> dict[str, dict[str, Cost]]:
    """Median cost by way and stage; RuntimeError when two ways give a GGUF or merged model that differs."""
    found: dict[str, dict[str, list[Cost]]] = {way: {stage: [] for stage in STAGES} for way in ways}
    with tempfile.TemporaryDirectory(prefix="export-benchmark-") as scratch:
        halves = adapter(base_folder, Path(scratch) / "adapter")
        for _ in range(repeat):
            made = set()
            for way, code in ways.items():
                out = Path(scratch) / "out"
                out.mkdir()
                for stage in STAGES:
                    found[way][stage].append(measure(stage, code, base_folder, halves, out))
                made.add((sha256_tree(out / "merged"), sha256_tree(out / "model.gguf")))
                shutil.rmtree(out)
            if len(made) > 1:
                raise RuntimeError("the two ways do not write the same bytes")
    return {way: {stage: _median(costs) for stage, costs in stages.items()} for way, stages in found.items()}


def _median(costs: list[Cost]) -> Cost:
    return Cost(*(statistics.median(values) for values in zip(*map(astuple, costs), strict=True)))


def table(found: dict[str, dict[str, Cost]]) -> str:
    """A Markdown table of every way and stage, and the ratio of the last way to the first where there are two."""
    lines = ["| way | stage | wall, s | CPU, s | memory, GiB |", "| --- | --- | --- | --- | --- |"]
    totals = {}
    for way, stages in found.items():
        wall, cpu = (sum(getattr(cost, name) for cost in stages.values()) for name in ("wall", "cpu"))
        totals[way] = Cost(wall, cpu, max(cost.gib for cost in stages.values()))
        for stage, cost in {**stages, "both": totals[way]}.items():
            lines.append(f"| {way} | {stage} | {cost.wall:.1f} | {cost.cpu:.1f} | {cost.gib:.2f} |")
    if len(totals) > 1:
        old, new = totals.values()
        lines.append(f"| ratio | both | {new.wall / old.wall:.2f} | {new.cpu / old.cpu:.2f} | {new.gib / old.gib:.2f} |")
    return "\n".join(lines)


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--make", type=Path, metavar="FOLDER", help="write a random base of --parameters weights and end")
    parser.add_argument("--parameters", type=float, help="measure on a random base of so many weights (with --make: 1.9e9)")
    parser.add_argument("--base", type=Path, help="measure on this base (default: the embedded one)")
    parser.add_argument("--old", type=Path, help="a checkout of the version to compare with")
    parser.add_argument("--repeat", type=int, default=3, help="rounds (default 3)")
    parser.add_argument("--out", type=Path, help="write the figures to this JSON file")
    args = parser.parse_args(arguments)
    if args.make:
        print(make(args.make, args.parameters or 1.9e9))
        return 0
    here = Path(__file__).resolve().parents[1]
    ways = {"old": args.old.resolve(), "new": here} if args.old else {"new": here}
    with tempfile.TemporaryDirectory(prefix="export-base-") as scratch:
        if args.base:
            folder = args.base.resolve()
        elif args.parameters:
            folder = make(Path(scratch) / "base", args.parameters)
        else:
            folder = base.resolve(base.EMBEDDED, Path(scratch) / ".base").folder
        found = compare(folder, ways, args.repeat)
    print(table(found))
    if args.out:
        write_json(args.out, {way: {stage: asdict(cost) for stage, cost in stages.items()} for way, stages in found.items()})
    return 0


if __name__ == "__main__":
    sys.exit(main())
