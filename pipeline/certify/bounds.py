"""Every bound of the certificate that is not a definition, and how it was measured (benchmarks/certify_bounds.py).

Float32 reference on a 2-core AVX2 machine; largest figures of untampered runs: ten seeds of tiny models of random weights, and the
embedded base after 3, 20 (three seeds) and 213 steps.
- Adapter at run time against the merged sum: KL 1e-7, largest difference 7e-5. Float16 cast: KL 5e-7, largest difference 0.025.
- vLLM in float32: KL 6e-10, every answer equal.
- Q8_0 in llama.cpp, held-out prompts: KL 2e-3 after 3 steps, 3e-5 after 213 (sharper distributions), log-probabilities 0.15 apart
  (tiny 0.013), top-1 all equal; control prompts, which are flatter: KL 9e-3, 0.17 apart, top-1 30 of 32. Answers part at near ties:
  all equal for the tiny models, 63 of 64 after 213 steps, 11 of 16 after 40, 8 of 16 after 20, 9 of 16 after 3; for an engine that
  rounds, the distributions are the proof.
Another training instead. The embedded base after 20 steps, 6 pairs of seeds: 1.0 to 1.7 apart, KL 2.5e-2 to 0.14; against 213
steps, other seed or data: 2.4 and 3.3 apart, KL 3e-2 and 4e-2: all beyond Q8_0's bound. 90 pairs of seeds of tiny models: 0.20 to
0.36 apart, KL 9e-4 to 3e-3, no answer equal: as flat as these are, only their answers tell them apart under Q8_0; a float32
engine's bound tells all 90.
Bounds of float16, bfloat16 and quantised (8 or 4 bits, or an FP8 KV cache, made by the engine) are estimates from their precision.
"""

from dataclasses import dataclass

MEASURED = "measured: benchmarks/certify_bounds.py"
# answers that end by themselves
FINISH_SHARE = 0.99
FINISH_SLACK = 0.02
# canary prompts answered as the tuned model answers in process
CANARY_SHARE = 0.25
# greedy answers that are the in-process ones word for word, by the engine's number type
ANSWER_SHARE = {"float32": 0.9, "float16": 0.25, "bfloat16": 0.25, "Q8_0": 0.25}


@dataclass(frozen=True)
class Bound:
    """Largest mean divergence (nats) and log-probability gap, smallest top-1 agreement."""

    kl: float
    gap: float
    top1: float


_DISTANCES = {
    "float32": Bound(1e-4, 0.01, 0.99),
    "float16": Bound(2e-3, 0.05, 0.97),
    "bfloat16": Bound(1e-2, 0.25, 0.9),
    "Q8_0": Bound(2e-2, 0.3, 0.85),
    "quantised": Bound(0.1, 0.5, 0.8),
}
# base with the adapter applied at run time against the merged sum, both float32; and the sum against its float16 cast
MERGE = Bound(1e-6, 1e-2, 0.99)
CAST = Bound(1e-5, 0.5, 0.98)


def distance_bound(dtype: str) -> Bound:
    """The bound for a number type; the widest for one that is not known."""
    return _DISTANCES.get(dtype, _DISTANCES["bfloat16"])
