"""Next-token distributions known by their most likely tokens, and how far two of them are apart."""

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from pydantic import TypeAdapter

# tokens of the reference that are compared
COMPARED = 10
# held-out rows, evenly spread, that have a reference in process; a backend is asked no others
ROWS = 52
# nats between two first choices that count as the same
TIE = 0.05

Top = Mapping[int, float]


@dataclass(frozen=True)
class Distance:
    """Over many positions: Kullback-Leibler divergence (nats), mean |difference| of log-probabilities, same first choice."""

    kl: float
    kl_max: float
    gap: float
    top1: float
    n: int

    def __str__(self) -> str:
        return f"KL {self.kl:.2e} (largest {self.kl_max:.2e}), log-probabilities {self.gap:.4f} apart, top-1 {self.top1:.1%} of {self.n}"


def fold(top: Iterable[tuple[int, float]], alike: Mapping[int, int]) -> dict[int, float]:
    """A distribution in which tokens that cannot be told apart are one: their probabilities are summed.

    ``alike`` has the token that stands for each. A divergence of two such distributions is at most that of the whole ones.
    """
    sums: dict[int, float] = {}
    for token, value in top:
        one = alike.get(token, token)
        before = sums.get(one)
        sums[one] = value if before is None else max(before, value) + math.log1p(math.exp(-abs(before - value)))
    return sums


def compare_tops(reference: Sequence[Top], other: Sequence[Top]) -> tuple[Distance, list[float]]:
    """Distance of ``other`` from ``reference``, position by position, and the divergence at each position.

    The divergence is taken over the reference's COMPARED first tokens and one bin for all others, which can only make it
    smaller (data-processing inequality). A first choice counts as the same when it is within TIE of the reference's best.
    """
    divergences, gaps, same = [], [], 0
    for ours, theirs in zip(reference, other, strict=True):
        first = sorted(ours, key=lambda token: -ours[token])[:COMPARED]
        least = min(theirs.values())
        pairs = [(ours[token], theirs.get(token, least)) for token in first]
        divergences.append(max(_binned(pairs), 0.0))
        gaps.append(sum(abs(p - q) for p, q in pairs) / len(pairs))
        chosen = max(theirs, key=lambda token: theirs[token])
        same += chosen == first[0] or ours.get(chosen, -math.inf) >= ours[first[0]] - TIE
    n = len(divergences)
    if n == 0:
        return Distance(math.nan, math.nan, math.nan, math.nan, 0), []
    return Distance(sum(divergences) / n, max(divergences), sum(gaps) / n, same / n, n), divergences


def _binned(pairs: Sequence[tuple[float, float]]) -> float:
    inside = sum(math.exp(p) * (p - q) for p, q in pairs)
    rest_p = max(1 - sum(math.exp(p) for p, _ in pairs), 1e-9)
    rest_q = max(1 - sum(math.exp(q) for _, q in pairs), 1e-9)
    return inside + rest_p * math.log(rest_p / rest_q)


@dataclass(frozen=True)
class Probe:
    """A position: the token IDs before it, and the tuned model's most likely next tokens there, in process."""

    row: int
    ids: tuple[int, ...]
    top: Top


@dataclass(frozen=True)
class Reference:
    """``reference/probes.json``: held-out and control positions, the base's view of the controls, and in-process figures."""

    held_out: tuple[Probe, ...]
    controls: tuple[Probe, ...]
    controls_base: tuple[Top, ...]
    figures: Mapping[str, Any]

    @classmethod
    def from_json(cls, data: Mapping[str, Any]) -> "Reference":
        """Read what ``to_json`` wrote; ValueError when it is something else."""
        return TypeAdapter(Reference).validate_python(data)

    def to_json(self) -> dict[str, Any]:
        """As a JSON object."""
        return TypeAdapter(Reference).dump_python(self, mode="json")  # type: ignore[no-any-return]
