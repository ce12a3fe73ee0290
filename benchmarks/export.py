"""Merge and GGUF: this version's way against another checkout's, same machine and model, in turn, in one go.

python -m benchmarks.export --make FOLDER --parameters 1.9e9
"""

from __future__ import annotations

import argparse
import json
import math
import shutil
import sys
from pathlib import Path

from pipeline.model.safetensors import INDEX, SINGLE
from pipeline.runs.files import read_json, staged, write_json
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
    header: dict[str, object] = {"__metadata__": {"format": "pt"}}
    end = 0
    for name, shape in shapes.items():
        begin, end = end, end + 2 * math.prod(shape)
        header[name] = {"dtype": "F16", "shape": list(shape), "data_offsets": [begin, end]}
    text = json.dumps(header).encode()
    text += b" " * (-len(text) % 8)
    with path.open("wb") as out:
        out.write(len(text).to_bytes(8, "little") + text)
        for shape in shapes.values():
            if len(shape) == 1:
                out.write(np.ones(shape, dtype="<f2").tobytes())
            else:
                out.write((random.standard_normal(shape, dtype=np.float32) * np.float32(0.02)).astype("<f2").tobytes())


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--make", type=Path, metavar="FOLDER", help="write a random base of --parameters weights and end")
    parser.add_argument("--parameters", type=float, default=1.9e9, help="weights of the random base (default 1.9e9)")
    args = parser.parse_args(arguments)
    if args.make:
        print(make(args.make, args.parameters))
    return 0


if __name__ == "__main__":
    sys.exit(main())
