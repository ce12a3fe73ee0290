"""What a server is doing while it loads, from its log: weights, compilation, graphs - a few words for a progress line."""

from __future__ import annotations

import re

_COLOUR = re.compile(r"\x1b\[[0-9;]*m")
# log line -> words; {} takes what the pattern's group found. vLLM 0.32, llama.cpp b11549, Ollama, SGLang 0.5
_MILESTONES = [
    (r"checkpoint shards:\s+\d+% Completed \| (\d+/\d+)", "loading weights, file {}"),
    (r"Starting to load model|load_model: loading model|llama_model_loader: loaded meta|Load weight begin", "loading weights"),
    (r"Loading weights took ([\d.]+) s|Load weight end", "weights loaded"),
    (
        r"Dynamo bytecode transform|Compiling a graph|torch\.compile (?:takes|took)|Using cache directory: .*torch_compile",
        "compiling",
    ),
    (r"Capturing CUDA graphs?.*?(\d+/\d+)", "capturing graphs, {}"),
    (r"Capturing CUDA graph|Capture cuda graph begin|Graph capturing", "capturing graphs"),
    (r"KV cache size: ([\d,]+) tokens", "KV cache of {} tokens, warming up"),
    (r"warming up the model|Warming up model", "warming up"),
    (r"srv\s+load_model: initializing, (n_slots = \d+)", "making the KV cache, {}"),
    (r"init engine \(profile|model loaded|Application startup complete", "loaded, waiting for the first token"),
    (r"llama runner started|starting (?:runner|llama-server)", "starting the model's runner"),
]
_COMPILED = [(re.compile(pattern), words) for pattern, words in _MILESTONES]


def phase(log: str) -> str:
    """The last milestone in the log; "starting" before the first."""
    for line in reversed(_COLOUR.sub("", log).splitlines()):
        for pattern, words in _COMPILED:
            if found := pattern.search(line):
                return words.format(found[1]) if "{}" in words else words
    return "starting"
