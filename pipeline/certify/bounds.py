"""Every bound of the certificate that is not a definition, and how it was measured (benchmarks/certify_bounds.py).

Seen on untampered runs, float32 reference on a 2-core AVX2 machine: the embedded base fine-tuned (30 layers, 256 positions in process)
and tiny models of several seeds. Adapter at run time against the merged sum: KL 2e-9 (tiny 9e-8), largest difference 7e-5.
Float16 cast: KL 2e-8 (tiny 3e-7), largest difference 0.025. vLLM in float32: KL 6e-10, every answer equal. Q8_0 in llama.cpp: KL 3e-5
(tiny 7e-6), log-probabilities 0.12 apart (tiny 0.01), top-1 all equal, 63 of 64 answers equal. Bounds leave room for larger models
and flatter distributions. Answers of an engine that rounds part from the reference at near ties, the more often the less a model was
trained (the embedded base after 40 steps, Q8_0: 11 of 16 equal, at KL 3e-6): for these the distributions are the proof. Not the same model: another seed's (tiny, llama.cpp) KL 3e-3 and 0.36 apart with no answer equal; the
embedded base and its tuned model on control prompts KL 1.8. Bounds of float16 and bfloat16 are estimates from their precision.
"""

from __future__ import annotations

from dataclasses import dataclass

MEASURED = "measured: benchmarks/certify_bounds.py"
# answers that end by themselves
FINISH_SHARE = 0.99
FINISH_SLACK = 0.02
# canary prompts answered as the tuned model answers in process
CANARY_SHARE = 0.25
# greedy answers that are the in-process ones word for word, by the engine's number type
ANSWER_SHARE = {"float32": 0.9, "float16": 0.25, "bfloat16": 0.25, "Q8_0": 0.25}
# relative difference of the served and the in-process drift on control prompts
DRIFT = 0.1


@dataclass(frozen=True)
class Bound:
    """Largest mean divergence (nats) and log-probability gap, smallest top-1 agreement."""

    kl: float
    gap: float
    top1: float


_DISTANCES = {
    "float32": Bound(1e-4, 0.01, 0.99),
    "float16": Bound(2e-3, 0.05, 0.97),
    "bfloat16": Bound(1e-2, 0.25, 0.95),
    "Q8_0": Bound(2e-3, 0.25, 0.95),
}
# base with the adapter applied at run time against the merged sum, both float32; and the sum against its float16 cast
MERGE = Bound(1e-6, 1e-2, 0.99)
CAST = Bound(1e-5, 0.5, 0.98)


def distance_bound(dtype: str) -> Bound:
    """The bound for a number type; the widest for one that is not known."""
    return _DISTANCES.get(dtype, _DISTANCES["bfloat16"])
