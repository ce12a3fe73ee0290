"""Distances of distributions known by their first tokens, against the sums done by hand."""

from __future__ import annotations

import math

import pytest

from pipeline.verify.distributions import Distance, Probe, Reference, compare_tops, fold


def _top(**shares: float) -> dict[int, float]:
    return {int(name[1:]): math.log(share) for name, share in shares.items()}


def test_equal_distributions_are_nothing_apart() -> None:
    distance, divergences = compare_tops([_top(t1=0.7, t2=0.2)], [_top(t1=0.7, t2=0.2)])
    assert (distance, divergences) == (Distance(0.0, 0.0, 0.0, 1.0, 1), [0.0])


def test_the_divergence_has_one_bin_for_the_rest() -> None:
    distance, _ = compare_tops([_top(t1=0.5, t2=0.25)], [_top(t1=0.25, t2=0.5)])
    by_hand = 0.5 * math.log(2) + 0.25 * math.log(0.5)
    assert distance.kl == pytest.approx(by_hand)
    assert distance.gap == pytest.approx(math.log(2))
    assert distance.top1 == 0.0


def test_a_first_choice_that_was_a_near_tie_counts_as_the_same() -> None:
    distance, _ = compare_tops([_top(t1=0.40, t2=0.39)], [_top(t1=0.39, t2=0.40)])
    assert distance.top1 == 1.0


def test_a_token_the_other_does_not_list_has_at_most_its_least_share() -> None:
    distance, _ = compare_tops([_top(t1=0.9, t2=0.05)], [_top(t1=0.9, t3=0.04)])
    assert distance.gap == pytest.approx(math.log(0.05 / 0.04) / 2)


def test_no_position_is_not_a_pass() -> None:
    distance, divergences = compare_tops([], [])
    assert distance.n == 0
    assert math.isnan(distance.kl)
    assert divergences == []


def test_the_reference_survives_json() -> None:
    import json

    reference = Reference((Probe(3, (1, 2), {5: -0.1}),), (Probe(0, (9,), {7: -0.5}),), ({8: -1.0},), {"drift": {"kl": 1.0}})
    assert Reference.from_json(json.loads(json.dumps(reference.to_json()))) == reference


def test_tokens_that_print_alike_are_one_and_the_divergence_is_no_larger() -> None:
    ours, theirs = _top(t1=0.4, t2=0.3, t3=0.2), _top(t1=0.1, t2=0.6, t3=0.2)
    folded = [fold(top.items(), {2: 1}) for top in (ours, theirs)]
    assert folded[0] == pytest.approx(_top(t1=0.7, t3=0.2))
    assert compare_tops([folded[0]], [folded[1]])[0].kl == pytest.approx(0)
    assert compare_tops([ours], [theirs])[0].kl > 0.1
