"""A run whose every stage is recorded on files of a few bytes, and what link 7 says of it."""

from __future__ import annotations

import json
from collections.abc import Callable
from typing import Any

from pipeline.certify.certificate import Data, Subject, hashes
from pipeline.certify.links.custody import check_custody
from pipeline.report.check import Check
from pipeline.runs.files import write_json
from pipeline.runs.folder import RunFolder
from pipeline.runs.manifest import Manifest, sealed
from pipeline.verify.score import read_held_out, read_reference, rows_asked, score


def make(run: RunFolder) -> RunFolder:
    """A run whose every stage is recorded, on files of a few bytes."""
    rows = [{"messages": [{"role": "user", "content": f"{i}"}, {"role": "assistant", "content": f"{i}"}]} for i in range(3)]
    texts = {run.heldout: rows} | {
        run.reference(which): [{"text": f"{i}", "finish_reason": "stop"} for i in range(3)] for which in ("base", "tuned")
    }
    for path in (run.adapter / "adapter_model.safetensors", run.merged / "config.json", run.gguf, run.modelfile, *texts):
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text("".join(json.dumps(entry) + "\n" for entry in texts.get(path, [path.name])))
    manifest, seen = Manifest(run.manifest), hashes(run)
    parameters = {"base": "somewhere", "data": "soc", "method": "lora"}
    trained = {"parameters": parameters, "base": {"id": "somewhere", "sha256": "b"}, "data": {"train": "d"}}
    manifest.record("finetune", trained, [run.adapter, run.heldout], {}, 1.0)
    manifest.record("merge", {"adapter": seen["adapter"], "base": "b"}, [run.merged], {}, 1.0)
    manifest.record("gguf", {"merged": seen["merged_fp16"]}, [run.gguf], {}, 1.0)
    manifest.record("modelfile", {"gguf": seen[run.gguf.name]}, [run.modelfile], {}, 1.0)
    for which, model in (("base", "b"), ("tuned", seen["merged_fp16"])):
        result = score(*rows_asked(read_held_out(run.heldout), read_reference(run.reference(which))))
        inputs = {"heldout": seen["heldout.jsonl"], "model": model}
        manifest.record(f"evaluate_{which}", inputs, [run.reference(which)], result, 1.0)
    entry = {"engine_version": "1", "argv": ["llama-server", "--model", str(run.gguf)], "env": {}, "status": "passed"}
    with manifest.changing() as data:
        data["served"] = {"llamacpp": sealed(entry), "ollama": sealed({**entry, "argv": ["ollama", "serve"]})}
    return run


def judged(run: RunFolder) -> dict[str, Check]:
    subject = Subject(run, Manifest(run.manifest), None, "b", Data({"train": "d"}), {}, hashes(run))
    return {finding.id: finding for finding in check_custody(subject)}


def failed(run: RunFolder) -> set[str]:
    return {name for name, finding in judged(run).items() if finding.status == "failed"}


def edit(run: RunFolder, change: Callable[[dict[str, Any]], object]) -> None:
    data = json.loads(run.manifest.read_text())
    change(data)
    write_json(run.manifest, data)
