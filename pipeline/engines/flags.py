"""Settings each engine version knows, for plans made where the engine is not installed.

Where it is installed its own parser is asked instead (``pipeline.engines.flags``). The lists were read from:
vLLM 0.32.0's ``make_arg_parser``; llama.cpp b10605's ``common/arg.cpp`` (server options, no speculative ones);
Ollama's ``envconfig/config.go``; SGLang 0.5's ``server_args.py`` (the options a plan or an operator may want).
"""

from __future__ import annotations

import hashlib
import json
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

from pipeline.engines.base import Engine
from pipeline.errors import EngineError
from pipeline.planning.overrides import Known
from pipeline.planning.plan import Plan
from pipeline.runs.files import write_json

# vLLM moved its parser between releases; both places are tried
_VLLM_CODE = """
import json
try:
    from vllm.entrypoints.launchers.cli_args import make_arg_parser
except ImportError:
    from vllm.entrypoints.openai.cli_args import make_arg_parser
try:
    from vllm.utils.argparse_utils import FlexibleArgumentParser
except ImportError:
    from vllm.utils import FlexibleArgumentParser
print("FLAGS" + json.dumps(sorted({o for a in make_arg_parser(FlexibleArgumentParser())._actions for o in a.option_strings})))
"""
_HELP_FLAG = re.compile(r"(?<![\w-])(--?[a-zA-Z][\w-]*)")
_TIMEOUT = 180.0


def unknown_flags(engine: Engine, plan: Plan, cache: Path | None = None) -> tuple[str, ...]:
    """Flags of a plan that the installed engine's own parser does not know; empty when the engine cannot be asked."""
    known = installed_flags(engine, cache)
    return tuple(f.name for f in plan.flags if f.name not in known) if known else ()


def require_known_flags(engine: Engine, plan: Plan, cache: Path | None = None) -> None:
    """Raise EngineError before launch when the installed engine would refuse a flag of the plan."""
    if unknown := unknown_flags(engine, plan, cache):
        version = engine.available().version
        raise EngineError(
            f"{engine.name} {version} does not know {', '.join(unknown)}",
            remedy=f"install the {engine.name} version this release was tested with (make setup), or drop these --set values",
        )


def installed_flags(engine: Engine, cache: Path | None = None) -> frozenset[str]:
    """Every flag the installed engine's parser accepts; empty when it is not installed, takes no flags or does not answer."""
    question = _question(engine.name)
    version = engine.available().version if question else None
    if not question or not version:
        return frozenset()
    digest = hashlib.sha256(json.dumps([version, question]).encode()).hexdigest()[:16]
    stored = (cache or _cache()) / f"flags-{engine.name}-{digest}.json"
    if stored.is_file():
        return frozenset(json.loads(stored.read_text(encoding="utf-8")))
    flags = _ask(question)
    if flags:
        write_json(stored, sorted(flags))
    return flags


def _question(engine: str) -> list[str]:
    if engine == "vllm":
        return [os.environ.get("VLLM_PYTHON") or sys.executable, "-c", _VLLM_CODE]
    if engine == "sglang":
        return [os.environ.get("SGLANG_PYTHON") or sys.executable, "-m", "sglang.launch_server", "--help"]
    if engine == "llamacpp":
        program = shutil.which("llama-server")
        return [program, "--help"] if program else [sys.executable, "-m", "pipeline.engines.llamacpp_server", "--help"]
    return []


def _ask(question: list[str]) -> frozenset[str]:
    try:
        done = subprocess.run(question, capture_output=True, text=True, timeout=_TIMEOUT, check=False)
    except (OSError, subprocess.SubprocessError):
        return frozenset()
    if done.returncode:
        return frozenset()
    for line in done.stdout.splitlines():
        if line.startswith("FLAGS"):
            return frozenset(json.loads(line.removeprefix("FLAGS")))
    return frozenset(_HELP_FLAG.findall(done.stdout))


def _cache() -> Path:
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "granite-pipeline"


def _flags(text: str) -> frozenset[str]:
    return frozenset("--" + word for word in text.split())


VLLM_VERSION = "0.32.0"
LLAMACPP_VERSION = "b10605"

_VLLM_SWITCHES = """
allow-credentials allow-deprecated-quantization async-scheduling cohere-is-reasoning-model cudagraph-metrics
data-parallel-external-lb data-parallel-hybrid-lb dcp-q-replicate disable-cascade-attn disable-chunked-mm-input
disable-custom-all-reduce disable-fastapi-docs disable-hybrid-kv-cache-manager disable-nccl-for-dp-synchronization
disable-sliding-window disable-uvicorn-access-log enable-auto-tool-choice enable-batch-sharded-sampling
enable-chunked-prefill enable-cumem-allocator enable-dbo enable-elastic-ep enable-ep-weight-filter enable-eplb
enable-expert-parallel enable-fault-tolerance enable-flash-late-interaction enable-flashinfer-autotune
enable-force-include-usage enable-hc-sp enable-layerwise-nvtx-tracing enable-log-deltas enable-log-outputs
enable-log-requests enable-logging-iteration-details enable-lora enable-mamba-cache-stochastic-rounding
enable-mamba-shared-prefix-checkpoint enable-mfu-metrics enable-mixed-moe-lora-format enable-mm-embeds
enable-moe-shared-loras enable-nccl-comm-suspend enable-offline-docs enable-per-request-metrics enable-prefix-caching
enable-prompt-embeds enable-prompt-tokens-details enable-request-id-headers enable-return-routed-experts
enable-scale-out enable-server-load-tracking enable-shm-tensor-arena enable-sleep-mode enable-ssl-refresh
enable-tokenizer-info-endpoint enable-tower-connector-lora enable-trace-replay enforce-eager
exclude-tools-when-tool-choice-none fail-on-environ-validation fully-sharded-loras interleave-mm-strings
jit-monitor-verbose kv-cache-metrics kv-sharing-fast-prefill language-model-only log-error-stack
long-prefill-token-threshold-adaptive mm-device-do-normalize mm-encoder-only numa-bind ray-workers-use-nsight
return-sampling-mask return-tokens-as-token-ids scheduler-reserve-full-isl skip-mm-profiling skip-tokenizer-init
sleep-mode-offload-cudagraph specialize-active-lora swa-bounded-replay tokens-only trust-remote-code
trust-request-chat-template trust-request-mm-kwargs use-fp64-gumbel use-replayssm use-tqdm-on-load
"""
_VLLM = """
additional-config aggregate-engine-logging all2all-backend allow-credentials allow-deprecated-quantization
allowed-headers allowed-local-media-path allowed-media-domains allowed-methods allowed-origins
anthropic-disabled-thinking-effort api-key api-server-count async-scheduling attention-backend attention-config
aux-output-config block-size chat-template chat-template-content-format code-revision cohere-format
cohere-is-reasoning-model collect-detailed-traces compilation-config config config-format convert
cp-kv-cache-interleave-size cpu-distributed-timeout-seconds cpu-offload-gb cpu-offload-params cudagraph-capture-sizes
cudagraph-metrics custom-histogram-buckets data-parallel-address data-parallel-backend data-parallel-external-lb
data-parallel-hybrid-lb data-parallel-multi-port-external-lb data-parallel-rank data-parallel-rpc-port
data-parallel-size data-parallel-size-local data-parallel-start-rank data-parallel-supervisor-port
dbo-decode-token-threshold dbo-prefill-token-threshold dcp-comm-backend dcp-kv-cache-interleave-size dcp-q-replicate
decode-context-parallel-size default-chat-template-kwargs default-mm-loras device-ids device-memory-utilization
diffusion-config disable-access-log-for-endpoints disable-cascade-attn disable-chunked-mm-input
disable-custom-all-reduce disable-fastapi-docs disable-hybrid-kv-cache-manager disable-log-stats
disable-nccl-for-dp-synchronization disable-sliding-window disable-uvicorn-access-log distributed-executor-backend
distributed-timeout-seconds download-dir dp-supervisor-probe-failure-threshold dp-supervisor-probe-interval-s
dp-supervisor-probe-timeout-s dp-sync-interval dtype ec-manager-config ec-transfer-config elastic-ep-max-dp-size
enable-auto-tool-choice enable-batch-sharded-sampling enable-chunked-prefill enable-cumem-allocator enable-dbo
enable-elastic-ep enable-ep-weight-filter enable-eplb enable-expert-parallel enable-fault-tolerance
enable-flash-late-interaction enable-flashinfer-autotune enable-force-include-usage enable-hc-sp
enable-layerwise-nvtx-tracing enable-log-deltas enable-log-outputs enable-log-requests
enable-logging-iteration-details enable-lora enable-mamba-cache-stochastic-rounding
enable-mamba-shared-prefix-checkpoint enable-mfu-metrics enable-mixed-moe-lora-format enable-mm-embeds
enable-moe-shared-loras enable-nccl-comm-suspend enable-offline-docs enable-per-request-metrics enable-prefix-caching
enable-prompt-embeds enable-prompt-tokens-details enable-request-id-headers enable-return-routed-experts
enable-scale-out enable-server-load-tracking enable-shm-tensor-arena enable-sleep-mode enable-ssl-refresh
enable-tokenizer-info-endpoint enable-tower-connector-lora enable-trace-replay enforce-eager engram-config eplb-config
exclude-tools-when-tool-choice-none expert-placement-strategy fail-on-environ-validation fault-tolerance-config
fingerprint-mode fingerprint-value fully-sharded-loras gdn-prefill-backend generation-config gpu-memory-utilization
grpc grpc-port h11-max-header-count h11-max-incomplete-event-size headless help hf-config-path hf-overrides hf-token
host ignore-patterns interleave-mm-strings io-processor-plugin ir-op-priority jit-monitor-mode jit-monitor-verbose
kda-decode-backend kda-prefill-backend kernel-config kv-cache-dtype kv-cache-dtype-skip-layers kv-cache-memory-bytes
kv-cache-metrics kv-cache-metrics-sample kv-events-config kv-offloading-backend kv-offloading-size
kv-sharing-fast-prefill kv-transfer-config language-model-only limit-mm-per-prompt linear-backend load-format
log-config-file log-error-stack log-level logging-config logits-processors logprobs-mode long-prefill-token-threshold
long-prefill-token-threshold-adaptive lora-dtype lora-modules lora-target-modules mamba-backend mamba-block-size
mamba-cache-dtype mamba-cache-mode mamba-cache-philox-rounds mamba-ssm-cache-dtype mamba-ssu-algorithm master-addr
master-port max-cpu-loras max-cudagraph-capture-size max-log-len max-logprobs max-lora-cls-labels max-lora-rank
max-loras max-model-len max-num-active-seqs max-num-batched-tokens max-num-queued-reqs max-num-queued-tokens
max-num-scheduled-tokens max-num-seqs max-parallel-loading-workers media-io-kwargs middleware mm-device-do-normalize
mm-encoder-attn-backend mm-encoder-attn-dtype mm-encoder-fp8-scale-path mm-encoder-fp8-scale-save-margin
mm-encoder-fp8-scale-save-path mm-encoder-only mm-encoder-tp-mode mm-hasher-algorithm mm-ipc-gpu-memory-gb
mm-processor-cache-gb mm-processor-cache-type mm-processor-device mm-processor-kwargs mm-shm-cache-max-object-size-mb
mm-tensor-ipc model model-class-overrides model-impl model-loader-extra-config moe-backend nnodes node-rank
num-gpu-blocks-override numa-bind numa-bind-cpus numa-bind-nodes offload-backend offload-group-size
offload-num-in-group offload-params offload-prefetch-step optimization-level otlp-traces-endpoint
override-generation-config per-request-spec-decode-metrics performance-mode pipeline-parallel-size pooler-config port
prefill-context-parallel-size prefill-schedule-interval prefix-cache-retention-interval prefix-caching-hash-algo
prefix-match-unit profiler-config pt-load-map-location quantization quantization-config ray-workers-use-nsight
reasoning-config reasoning-parser reasoning-parser-plugin renderer-num-workers replayssm-buffer-len response-role
return-sampling-mask return-tokens-as-token-ids revision root-path runner safetensors-load-strategy
safetensors-prefetch-block-size safetensors-prefetch-num-threads scheduler-cls scheduler-reserve-full-isl
scheduling-policy seed served-model-name show-hidden-metrics-for-version shutdown-timeout skip-mm-profiling
skip-tokenizer-init sleep-mode-offload-cudagraph sleep-preserve-parameter-names sparse-indexer-topk-backend
spec-method spec-model spec-tokens specialize-active-lora speculative-config sse-keep-alive-interval ssl-ca-certs
ssl-cert-reqs ssl-certfile ssl-ciphers ssl-keyfile stream-interval structured-outputs-config swa-bounded-replay
tensor-parallel-size tokenizer tokenizer-mode tokenizer-revision tokens-only tool-call-parser tool-parser-plugin
tool-server tool-strict-level trust-remote-code trust-request-chat-template trust-request-mm-kwargs ubatch-size uds
use-fp64-gumbel use-replayssm use-tqdm-on-load uvicorn-log-level video-pruning-method video-pruning-rate watermark
watermark-config weight-transfer-config worker-cls worker-extension-cls
"""
_VLLM_BARE = _flags(_VLLM_SWITCHES) | {"--no-" + word for word in _VLLM_SWITCHES.split()}
_VLLM_VARIABLES = """
CUDA_VISIBLE_DEVICES DO_NOT_TRACK GOMP_SPINCOUNT HF_HUB_OFFLINE OMP_NUM_THREADS PYTORCH_CUDA_ALLOC_CONF
VLLM_ATTENTION_BACKEND VLLM_CACHE_ROOT VLLM_CPU_ATTN_SPLIT_KV VLLM_CPU_KVCACHE_SPACE VLLM_CPU_NUM_OF_RESERVED_CPU VLLM_CPU_OMP_THREADS_BIND
VLLM_DISABLE_COMPILE_CACHE VLLM_ENABLE_V1_MULTIPROCESSING VLLM_LOGGING_LEVEL VLLM_LOG_STATS_INTERVAL VLLM_NO_USAGE_STATS VLLM_USE_V1
"""
VLLM = Known(_flags(_VLLM), _VLLM_BARE, frozenset(_VLLM_VARIABLES.split()))

_LLAMACPP_SWITCHES = """
agent backend-sampling cache-idle-slots cache-prompt check-tensors cont-batching context-shift cors-credentials
cpu-moe direct-io embedding embeddings escape ignore-eos jinja kv-offload kv-unified log-prefix log-timestamps
log-verbose metrics mlock mmap mmproj-auto mmproj-offload models-autoload op-offload perf prefill-assistant props
reasoning-preserve repack rerank reranking reuse-port skip-chat-parsing slots special spm-infill swa-full ui
ui-mcp-proxy verbose warmup
"""
_LLAMACPP = """
adaptive-decay adaptive-target agent alias api-key api-key-file api-prefix backend-sampling batch-size
cache-idle-slots cache-list cache-prompt cache-ram cache-reuse cache-type-k cache-type-v chat-template
chat-template-file chat-template-kwargs check-tensors checkpoint-min-step cont-batching context-shift cors-credentials
cors-headers cors-methods cors-origins cpu-mask cpu-mask-batch cpu-moe cpu-range cpu-range-batch cpu-strict
cpu-strict-batch ctx-checkpoints ctx-size defrag-thold device direct-io dry-allowed-length dry-base dry-multiplier
dry-penalty-last-n dry-sequence-breaker dynatemp-exp dynatemp-range embd-normalize embedding embeddings escape fit
fit-ctx fit-target flash-attn frequency-penalty gpu-layers grammar grammar-file hf-file hf-repo hf-token host
ignore-eos image-max-tokens image-min-tokens jinja json-schema json-schema-file keep kv-offload kv-unified
list-devices load-mode log-colors log-disable log-file log-prefix log-prompts-dir log-timestamps log-verbose
log-verbosity logit-bias lora lora-scaled main-gpu mcp-servers-config mcp-servers-json media-path metrics min-p
mirostat mirostat-ent mirostat-lr mlock mmap mmproj mmproj-auto mmproj-offload mmproj-url model model-url
models-autoload models-dir models-max models-preset mtmd-batch-max-tokens n-cpu-moe n-gpu-layers n-predict numa
offline op-offload override-kv override-tensor parallel path perf poll poll-batch pooling port predict
prefill-assistant presence-penalty prio prio-batch props reasoning reasoning-budget reasoning-budget-message
reasoning-effort reasoning-format reasoning-preserve repack repeat-last-n repeat-penalty rerank reranking reuse-port
reverse-prompt rope-freq-base rope-freq-scale rope-scale rope-scaling rpc sampler-seq samplers sampling-seq seed
skip-chat-parsing sleep-idle-seconds slot-prompt-similarity slot-save-path slots special split-mode spm-infill
sse-ping-interval ssl-cert-file ssl-key-file swa-checkpoints swa-full tags temp temperature tensor-split threads
threads-batch threads-http timeout tools tools-runtime top-k top-n-sigma top-nsigma top-p typical typical-p
ubatch-size ui ui-config ui-config-file ui-mcp-proxy verbose verbose-prompt verbosity version warmup xtc-probability
xtc-threshold yarn-attn-factor yarn-beta-fast yarn-beta-slow yarn-ext-factor yarn-orig-ctx
"""
_LLAMACPP_BARE = _flags(_LLAMACPP_SWITCHES) | {"--no-" + word for word in _LLAMACPP_SWITCHES.split()}
LLAMACPP = Known(
    _flags(_LLAMACPP) | {"-c"},
    _LLAMACPP_BARE,
    frozenset(["CUDA_VISIBLE_DEVICES", "GOMP_CPU_AFFINITY", "GOMP_SPINCOUNT", "OMP_NUM_THREADS", "OMP_WAIT_POLICY"]),
)

_OLLAMA_VARIABLES = """
CUDA_VISIBLE_DEVICES OLLAMA_CONTEXT_LENGTH OLLAMA_DEBUG OLLAMA_FLASH_ATTENTION OLLAMA_GPU_OVERHEAD OLLAMA_HOST
OLLAMA_KEEP_ALIVE OLLAMA_KV_CACHE_TYPE OLLAMA_LLM_LIBRARY OLLAMA_LOAD_TIMEOUT OLLAMA_MAX_LOADED_MODELS
OLLAMA_MAX_QUEUE OLLAMA_MODELS OLLAMA_NOHISTORY OLLAMA_NOPRUNE OLLAMA_NUM_PARALLEL OLLAMA_ORIGINS OLLAMA_SCHED_SPREAD
OLLAMA_GO_TEMPLATE ROCR_VISIBLE_DEVICES HSA_OVERRIDE_GFX_VERSION GOMP_SPINCOUNT
OMP_WAIT_POLICY
"""
# num_ctx and num_gpu are parameters of the model, written into its Modelfile
OLLAMA = Known(frozenset({"--num-ctx", "--num-gpu"}), (), frozenset(_OLLAMA_VARIABLES.split()))

_SGLANG_SWITCHES = _flags(
    "disable-cuda-graph disable-radix-cache enable-metrics enable-torch-compile skip-server-warmup trust-remote-code"
)
_SGLANG_FLAGS = _flags(
    """
api-key attention-backend chat-template chunked-prefill-size context-length cpu-offload-gb cuda-graph-max-bs device
dp-size dtype kv-cache-dtype load-format log-level lora-paths max-prefill-tokens max-running-requests max-total-tokens
mem-fraction-static model-path port host quantization random-seed reasoning-parser revision schedule-policy
served-model-name tokenizer-path tool-call-parser tp-size watchdog-timeout
"""
)
SGLANG = Known(_SGLANG_FLAGS, _SGLANG_SWITCHES, frozenset({"CUDA_VISIBLE_DEVICES"}))
