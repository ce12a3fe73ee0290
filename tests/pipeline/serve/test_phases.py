from __future__ import annotations

import pytest

from pipeline.serve.server import phase


@pytest.mark.parametrize(
    ("log", "words"),
    [
        ("", "starting"),
        ("INFO something else\n", "starting"),
        ("(Worker pid=1) INFO [cpu_model_runner.py:68] Starting to load model /m...\n", "loading weights"),
        ("Loading safetensors checkpoint shards:  50% Completed | 1/2 [00:00<00:00,  1.88it/s]\n", "loading weights, file 1/2"),
        ("Starting to load model\nLoading weights took 0.54 seconds\n", "weights loaded"),
        ("INFO [backends.py:1] Dynamo bytecode transform time: 3.2 s\n", "compiling"),
        ("Capturing CUDA graphs (mixed prefill-decode, PIECEWISE):  40%|##  | 12/30 [00:01<00:02]\n", "capturing graphs, 12/30"),
        ("\x1b[0;36m(EngineCore pid=2)\x1b[0;0m INFO CPU KV cache size: 46,592 tokens, Max\n", "KV cache of 46,592 tokens, warming up"),
        ("0.00.012.681 I srv    load_model: loading model '/m.gguf'\n", "loading weights"),
        ("0.03.864 I srv    load_model: initializing, n_slots = 8, n_ctx_slot = 4096\n", "making the KV cache, n_slots = 8"),
        ("srv load_model: loading model\n0.03.886.083 I srv          init: model loaded\nnoise\n", "loaded, waiting for the first token"),
    ],
)  # fmt: skip
def test_the_last_milestone_is_shown(log: str, words: str) -> None:
    assert phase(log) == words
