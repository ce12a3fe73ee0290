"""vLLM: flags for GPUs and for CPUs, adapters, and the engine itself."""
