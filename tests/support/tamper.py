"""Ways to spoil a run after the fact, on its real files; ``reseal`` then covers the tracks in the manifest."""

from __future__ import annotations

import json
import struct
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file

from pipeline.certify.links.custody import _JOINTS
from pipeline.model.gguf import read_gguf_header
from pipeline.runs.files import tree_bytes, write_json
from pipeline.runs.folder import RunFolder
from pipeline.runs.hashes import sha256_file, sha256_json, sha256_tree
from pipeline.runs.manifest import Manifest, sealed


def reseal(run: RunFolder) -> None:
    """Make the manifest agree with the files as they are now: hashes, inputs, keys and seals."""
    manifest = Manifest(run.manifest)
    stages = manifest.data["stages"]
    for stage in stages.values():
        for path in stage["artefacts"]:
            stage["artefacts"][path] = {"sha256": sha256_tree(run.path / path), "bytes": tree_bytes(run.path / path)}
    for stage, key, maker, path in _JOINTS:
        stages[stage]["inputs"][key] = stages[maker]["artefacts"][path]["sha256"]
    data = stages["finetune"]["inputs"]
    for name, parameter in (("train", "data"), ("eval", "eval_data")):
        if data["parameters"][parameter]:
            data["data"][name] = sha256_file(Path(data["parameters"][parameter]))
    for stage in stages.values():
        stage["key"] = sha256_json(stage["inputs"])
    for group in (stages, manifest.data.get("served", {})):
        for name, record in group.items():
            group[name] = sealed({key: value for key, value in record.items() if key != "seal"})
    write_json(run.manifest, manifest.data)


def weights(path: Path, change: Callable[[dict[str, torch.Tensor]], None]) -> None:
    """Change the tensors of a safetensors file."""
    tensors = load_file(str(path))
    change(tensors)
    save_file(tensors, str(path), metadata={"format": "pt"})


def zero_adapter(run: RunFolder) -> None:
    def change(tensors: dict[str, torch.Tensor]) -> None:
        tensors.update({name: torch.zeros_like(t) for name, t in tensors.items() if "lora_B" in name})

    weights(run.adapter / "adapter_model.safetensors", change)


def foreign_adapter(run: RunFolder) -> None:
    """As another seed would have left it."""
    generator = torch.Generator().manual_seed(99)

    def change(tensors: dict[str, torch.Tensor]) -> None:
        tensors.update({name: t + t.std() * torch.randn(t.shape, generator=generator) for name, t in tensors.items()})

    weights(run.adapter / "adapter_model.safetensors", change)


def base_as_merged(run: RunFolder, base: Path) -> None:
    def change(tensors: dict[str, torch.Tensor]) -> None:
        tensors.update({name: t.half() for name, t in load_file(str(base / "model.safetensors")).items() if name in tensors})

    weights(run.merged / "model.safetensors", change)


PERTURBED = "model.layers.2.mlp.down_proj.weight"


def perturb_one_tensor(run: RunFolder) -> None:
    def change(tensors: dict[str, torch.Tensor]) -> None:
        tensors[PERTURBED] = (tensors[PERTURBED].float() * 1.01).half()

    weights(run.merged / "model.safetensors", change)


def swap_layers(run: RunFolder) -> None:
    def change(tensors: dict[str, torch.Tensor]) -> None:
        for name in [name for name in tensors if ".layers.1." in name]:
            other = name.replace(".layers.1.", ".layers.2.")
            tensors[name], tensors[other] = tensors[other], tensors[name]

    weights(run.merged / "model.safetensors", change)


def flip_block(run: RunFolder) -> None:
    """The 32 weights of one Q8_0 block change their signs."""
    tensor = next(t for t in read_gguf_header(run.gguf).tensors if t.name == "blk.1.ffn_up.weight")
    data = bytearray(run.gguf.read_bytes())
    start = tensor.offset + 34 * 7 + 2
    data[start : start + 32] = bytes((256 - byte) % 256 for byte in data[start : start + 32])
    run.gguf.write_bytes(data)


def patch_gguf(run: RunFolder, key: str, code: str, value: float | int) -> None:
    """Overwrite one number of a GGUF's metadata."""
    data = bytearray(run.gguf.read_bytes())
    at = data.index(key.encode()) + len(key) + 4
    data[at : at + struct.calcsize(code)] = struct.pack(code, value)
    run.gguf.write_bytes(data)


def newline_after_role(path: Path) -> None:
    text = path.read_text(encoding="utf-8")
    assert "<|end_of_role|>" in text
    path.write_text(text.replace("<|end_of_role|>", "<|end_of_role|>\n"), encoding="utf-8")


def drop_stop(run: RunFolder) -> None:
    lines = run.modelfile.read_text().splitlines(keepends=True)
    kept = [line for line in lines if not line.startswith("PARAMETER stop")]
    assert len(kept) < len(lines)
    run.modelfile.write_text("".join(kept))


def swap_merges(run: RunFolder) -> None:
    path = run.merged / "tokenizer.json"
    data: dict[str, Any] = json.loads(path.read_text(encoding="utf-8"))
    merges = data["model"]["merges"]
    merges[100], merges[101] = merges[101], merges[100]
    write_json(path, data)


def change_json(path: Path, change: Callable[[dict[str, Any]], None]) -> None:
    data = json.loads(path.read_text(encoding="utf-8"))
    change(data)
    write_json(path, data)


def other_weights(run: RunFolder) -> None:
    """As another seed's training would have left them."""

    def change(tensors: dict[str, Any]) -> None:
        generator = torch.Generator().manual_seed(5)
        for name in [name for name in tensors if name.endswith("_proj.weight")]:
            noise = torch.randn(tensors[name].shape, generator=generator) * tensors[name].float().std() * 0.3
            tensors[name] = (tensors[name].float() + noise).half()

    weights(run.merged / "model.safetensors", change)
