"""The training line as a process that can be killed: imports once, then forks a child per request.

    python line.py        {"base": ..., "data": ..., "output": ..., "steps": 12, "save": 3}  on stdin, one a line

The child does every stage of ``train`` and ``export`` and logs to stderr; the parent answers with its pid, then its status.
"""

from __future__ import annotations

import json
import logging
import os
import sys
import traceback
from pathlib import Path
from typing import Any


def line(request: dict[str, Any]) -> None:
    from pipeline.runs.folder import RunFolder
    from training.export import evaluate, gguf, merge
    from training.parameters import FinetuneParameters
    from training.tuning import finetune

    run = RunFolder("t", Path(request["output"]))
    params = FinetuneParameters(
        base=request["base"], data=request["data"], trainer="hf", max_steps=request["steps"], save_steps=request["save"], rank=4
    )
    finetune.finetune(run, params)
    merge.merge(run)
    if request.get("gguf", True):
        gguf.export_gguf(run)
        gguf.package(run)
    evaluate.evaluate(run)


def child(request: dict[str, Any]) -> int:
    logging.basicConfig(level=logging.INFO, format="%(message)s", stream=sys.stderr, force=True)
    from pipeline.errors import PipelineError

    try:
        line(request)
    except PipelineError as error:
        print(f"error: {error}", file=sys.stderr)
        return error.exit_code
    except KeyboardInterrupt:
        return 130
    except Exception:
        traceback.print_exc()
        return 1
    return 0


def preload() -> None:
    import peft  # noqa: F401
    import torch  # noqa: F401
    import transformers  # noqa: F401
    from transformers import AutoModelForCausalLM, Trainer, TrainingArguments  # noqa: F401

    from training.tuning import finetune  # noqa: F401


def main() -> None:
    preload()
    print("ready", flush=True)
    for text in sys.stdin:
        pid = os.fork()
        if pid == 0:
            os.setsid()
            os.dup2(2, 1)  # stdout is ours to answer on
            status = child(json.loads(text))
            sys.stderr.flush()
            os._exit(status)
        print(pid, flush=True)
        _, status = os.waitpid(pid, 0)
        print(os.waitstatus_to_exitcode(status), flush=True)


if __name__ == "__main__":
    main()
