"""llama.cpp's own C++ HTTP server as a process, from the ``xllamacpp`` wheel: ``python -m pipeline.engines.llamacpp_server``.

The flags are the subset of llama-server's that the plans use, with llama-server's names and meanings, so one plan fits both.
"""

import argparse
import os
import signal
import sys
from typing import Any

# llama-server's word -> the wheel's enum member, for the KV cache types a plan may choose
_CACHE_TYPES = {"f32": "F32", "f16": "F16", "bf16": "BF16", "q8_0": "Q8_0", "q4_0": "Q4_0"}
_NUMA = {"distribute": "DISTRIBUTE", "isolate": "ISOLATE", "numactl": "NUMACTL"}
_FLASH = {"auto": "AUTO", "on": "ENABLED", "off": "DISABLED"}


def parser() -> argparse.ArgumentParser:
    """The command line; also what plans are checked against."""
    p = argparse.ArgumentParser(prog="xllamacpp_server", allow_abbrev=False)
    p.add_argument("-m", "--model", required=True, help="GGUF file")
    p.add_argument("-a", "--alias", default="", help="model name shown to clients")
    p.add_argument("--host", default="127.0.0.1")
    p.add_argument("--port", type=int, required=True)
    p.add_argument("-c", "--ctx-size", type=int, required=True, help="context of all slots together")
    p.add_argument("-np", "--parallel", type=int, default=1, help="slots; each gets ctx-size / parallel unless --kv-unified")
    p.add_argument("-kvu", "--kv-unified", action="store_true", help="one KV buffer shared by all slots")
    p.add_argument("-t", "--threads", type=int, default=-1)
    p.add_argument("-tb", "--threads-batch", type=int, default=-1)
    p.add_argument("-b", "--batch-size", type=int, default=2048)
    p.add_argument("-ub", "--ubatch-size", type=int, default=512)
    p.add_argument("--numa", choices=sorted(_NUMA), help="spread threads and memory over NUMA nodes")
    p.add_argument("-ngl", "--n-gpu-layers", type=int, help="layers on the GPU; unset: as many as fit")
    p.add_argument("-fa", "--flash-attn", choices=sorted(_FLASH), default="auto")
    p.add_argument("-ctk", "--cache-type-k", choices=sorted(_CACHE_TYPES), default="f16")
    p.add_argument("-ctv", "--cache-type-v", choices=sorted(_CACHE_TYPES), default="f16")
    always = "accepted for llama-server's sake; the chat template is always rendered by jinja"
    p.add_argument("--jinja", action="store_true", help=always)
    p.add_argument("--temp", "--temperature", type=float, help="temperature of requests that name none; unset: llama.cpp's 0.8")
    p.add_argument("--top-p", type=float, help="top_p of requests that name none; unset: llama.cpp's 0.95")
    p.add_argument("--metrics", action="store_true", help="serve /metrics")
    p.add_argument("--no-warmup", action="store_true")
    p.add_argument("--cache-ram", type=int, default=8192, help="MiB of prompts kept in RAM besides the slots; 0: none")
    return p


def parameters(args: argparse.Namespace) -> Any:
    """The wheel's ``CommonParams`` for a parsed command line."""
    import xllamacpp

    p = xllamacpp.CommonParams()
    p.model.path = args.model
    p.model_alias = {args.alias} if args.alias else set()
    p.hostnames = [args.host]
    p.port = args.port
    # as llama-server does: a key from the environment only
    p.api_keys = [key] if (key := os.environ.get("LLAMA_API_KEY")) else []
    p.n_ctx, p.n_parallel, p.kv_unified = args.ctx_size, args.parallel, args.kv_unified
    p.n_batch, p.n_ubatch = args.batch_size, args.ubatch_size
    p.cpuparams.n_threads = args.threads
    p.cpuparams_batch.n_threads = args.threads if args.threads_batch < 0 else args.threads_batch
    if args.n_gpu_layers is not None:
        p.n_gpu_layers = args.n_gpu_layers
    if args.numa:
        p.numa = getattr(xllamacpp.ggml_numa_strategy, f"GGML_NUMA_STRATEGY_{_NUMA[args.numa]}")
    p.flash_attn_type = getattr(xllamacpp.llama_flash_attn_type, f"LLAMA_FLASH_ATTN_TYPE_{_FLASH[args.flash_attn]}")
    p.cache_type_k = getattr(xllamacpp.ggml_type, f"GGML_TYPE_{_CACHE_TYPES[args.cache_type_k]}")
    p.cache_type_v = getattr(xllamacpp.ggml_type, f"GGML_TYPE_{_CACHE_TYPES[args.cache_type_v]}")
    for name, bit in {"temp": "TEMP", "top_p": "TOP_P"}.items():
        if (value := getattr(args, name)) is not None:
            setattr(p.sampling, name, value)
            # else the GGUF's own recommendation, where it has one, would win
            mark = getattr(xllamacpp.common_params_sampling_config, f"COMMON_PARAMS_SAMPLING_CONFIG_{bit}")
            p.sampling.user_sampling_config |= int(mark)
    p.use_jinja, p.warmup, p.endpoint_metrics, p.cache_ram_mib = True, not args.no_warmup, args.metrics, args.cache_ram
    return p


def main(argv: list[str] | None = None) -> int:
    """Serve until SIGTERM or SIGINT; returns 0 then, 1 when the server cannot start (llama.cpp's own log says why)."""
    args = parser().parse_args(argv)
    # while the model loads no Python code runs, so the kernel itself ends the process on either signal
    signal.signal(signal.SIGINT, signal.SIG_DFL)
    import xllamacpp

    try:
        server = xllamacpp.Server(parameters(args))
    except RuntimeError as error:
        sys.stderr.write(f"llama.cpp server did not start: {error}\n")
        return 1
    sys.stderr.write(f"llama.cpp server of xllamacpp {xllamacpp.__version__} listening on {server.listening_address}\n")
    sys.stderr.flush()
    _wait_for_signal()
    # the C++ destructor may wait on an open stream; the process has nothing else to save
    os._exit(0)


def _wait_for_signal() -> None:
    """Return on SIGTERM or SIGINT, whichever thread it is delivered to: the wake-up pipe is written by the C-level handler."""
    read, write = os.pipe()
    os.set_blocking(write, False)
    signal.set_wakeup_fd(write)
    for number in (signal.SIGTERM, signal.SIGINT):
        signal.signal(number, lambda *_: None)
    os.read(read, 1)


if __name__ == "__main__":
    sys.exit(main())
