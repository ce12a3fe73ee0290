"""Serve an exported model with the documented commands.

    python training/scripts/serve_model.py ollama --gguf training/output/generic/unsloth.Q8_0.gguf --name granite-soc:latest
    python training/scripts/serve_model.py vllm --model training/output/generic/merged_fp16 --served-model-name granite-soc-specialist

The same code as ``granite-pipeline serve``: flags planned for this machine, in the foreground until Ctrl-C.
"""

import os
import sys

if __name__ == "__main__":
    # --name is this program's word for what serve calls --served-model-name
    words = ("--served-model-name" if word == "--name" else word for word in sys.argv[1:])
    os.execv(sys.executable, [sys.executable, "-m", "pipeline", "serve", *words])
