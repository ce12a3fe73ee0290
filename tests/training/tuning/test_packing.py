"""Rows in one sequence: the same loss and gradients as in padded batches, for every architecture that takes them."""

from __future__ import annotations

import itertools
import random
from collections import Counter
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import tiny
import torch

from training.parameters import FinetuneParameters
from training.tuning import packing, trainers
from training.tuning.packing import Batches, groups, pack, pad
from training.tuning.prepare import IGNORED, Example

_PAD = 16


def _example(ids: list[int], trained: range, head: str = "") -> Example:
    labels = tuple(token if i in trained else IGNORED for i, token in enumerate(ids))
    return Example(tuple(ids), labels, "row", head=head)


def _rows(common: int, rests: list[int], seed: int = 0, trained_before: bool = False) -> list[Example]:
    """Rows with ``common`` tokens alike and a rest of each length, of which the second half is learned."""
    rng = random.Random(seed)
    shared = [rng.randrange(100, 40_000) for _ in range(common)]
    made = []
    for rest in rests:
        ids = [*shared, *[rng.randrange(100, 40_000) for _ in range(rest)]]
        trained = range(common // 2 if trained_before else common + rest // 2, len(ids))
        made.append(_example(ids, trained))
    return made


def _loss_and_gradients(model: Any, batch: dict[str, Any]) -> tuple[float, torch.Tensor]:
    model.zero_grad()
    loss = model(**batch, use_cache=False).loss
    loss.backward()
    return loss.item(), torch.cat([p.grad.flatten() for p in model.parameters() if p.grad is not None])


BATCHES = {
    "a common beginning": _rows(40, [7, 12, 3, 9]),
    "nothing in common": _rows(0, [7, 12, 1, 9]),
    "one row": _rows(0, [9]),
    "two beginnings": [*_rows(20, [5, 6], 1), *_rows(30, [4, 8, 2], 2)],
    "learned in what is common": _rows(24, [5, 8, 6], 3, trained_before=True),
    "the same row twice": [*_rows(10, [6], 4), *_rows(10, [6], 4), *_rows(10, [9], 5)],
    "one row begins another": [_example(list(range(200, 230)), range(20, 30)), _example(list(range(200, 240)), range(20, 40))],
}


@pytest.mark.parametrize("method", ["lora", "full"])
@pytest.mark.parametrize("variant", ["3.x-dense", "3.x-moe", "4.0-dense", "4.1"])
def test_loss_and_gradients_are_those_of_padded_batches(variant: str, method: str, tmp_path: Path) -> None:
    base = tiny.make(variant, tmp_path / "base")
    params = FinetuneParameters(base=str(base), method=method, trainer="hf", rank=4)  # type: ignore[arg-type]
    model = trainers.trainable(base, params, "hf", torch.float32)
    for name, weight in model.named_parameters():
        if "lora_B" in name:
            torch.nn.init.normal_(weight, std=0.05)
    chosen = trainers.batching(model, "hf", params, BATCHES["a common beginning"])
    assert (chosen.kind, chosen.reason) == ("packed", "")
    model.train()
    for what, rows in BATCHES.items():
        wanted, expected = _loss_and_gradients(model, pad(_PAD, rows))
        for made in (chosen.collate, partial(pack, share=False), partial(pad, _PAD, keep=True)):
            loss, gradients = _loss_and_gradients(model, made(rows))
            assert loss == pytest.approx(wanted, rel=1e-5), what
            assert float((gradients - expected).norm() / expected.norm()) <= 1e-5, what


@pytest.mark.parametrize("method", ["lora", "full"])
def test_under_autocast_the_loss_is_as_near_as_its_rounding(method: str, tmp_path: Path) -> None:
    base = tiny.make("3.x-dense", tmp_path / "base")
    params = FinetuneParameters(base=str(base), method=method, trainer="hf")  # type: ignore[arg-type]
    model = trainers.trainable(base, params, "hf", torch.bfloat16)
    rows = BATCHES["two beginnings"]
    chosen = trainers.batching(model, "hf", params, rows)
    assert chosen.kind == "packed"
    with torch.autocast("cpu", torch.bfloat16):
        wanted, loss = (model(**made, use_cache=False).loss for made in (pad(_PAD, rows), chosen.collate(rows)))
        loss.backward()
    assert loss.item() == pytest.approx(wanted.item(), rel=2e-2)


def test_a_common_beginning_is_computed_once() -> None:
    batch = pack(_rows(40, [7, 12, 3, 9]))
    assert batch["input_ids"].shape == (1, 40 + 7 + 12 + 3 + 9)
    assert batch["position_ids"][0, :48].tolist() == [*range(40), *range(40, 47), 40]
    assert pack(_rows(40, [7, 12]), share=False)["input_ids"].shape == (1, 2 * 40 + 7 + 12)


def test_rows_are_divided_so_that_the_fewest_tokens_are_computed() -> None:
    def computed(division: list[list[list[int]]]) -> int:
        total = 0
        for group in division:
            alike = sum(
                len(set(column)) == 1 for column in itertools.takewhile(lambda c: len(set(c)) == 1, zip(*group, strict=False))
            )
            shared = min(alike, min(map(len, group)) - 1) if len(group) > 1 else 0
            total += shared + sum(len(row) - shared for row in group)
        return total

    def divisions(rows: list[list[int]]) -> Any:
        if not rows:
            yield []
            return
        first, *others = rows
        for division in divisions(others):
            yield [[first], *division]
            for i in range(len(division)):
                yield [*division[:i], [first, *division[i]], *division[i + 1 :]]

    rng = random.Random(5)
    for _ in range(60):
        rows = [[rng.randrange(2) for _ in range(rng.randrange(1, 9))] for _ in range(rng.randrange(1, 6))]
        found = groups(rows)
        assert sorted(i for members, _ in found for i in members) == list(range(len(rows)))
        ours = sum(common + sum(len(rows[i]) - common for i in members) for members, common in found)
        assert ours == min(computed(division) for division in divisions(rows))


@pytest.mark.parametrize("variant", ["4.0-hybrid", "4.0-hybrid-moe"])
def test_recurrent_layers_keep_padded_batches_and_say_so(variant: str, tmp_path: Path) -> None:
    base = tiny.make(variant, tmp_path / "base")
    params = FinetuneParameters(base=str(base), trainer="hf")
    model = trainers.trainable(base, params, "hf", torch.float32)
    chosen = trainers.batching(model, "hf", params, _rows(10, [5, 6]))
    assert chosen.kind == "padded" and "layers carry a state from token to token" in chosen.reason
    rows = _rows(20, [5, 9, 2])
    wanted, expected = _loss_and_gradients(model, pad(_PAD, rows))
    loss, gradients = _loss_and_gradients(model, chosen.collate(rows))
    assert loss == pytest.approx(wanted, rel=1e-5)
    assert float((gradients - expected).norm() / expected.norm()) <= 1e-5


def test_a_model_whose_loss_is_another_one_keeps_padded_batches(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    base = tiny.make("3.x-dense", tmp_path / "base")
    params = FinetuneParameters(base=str(base), trainer="hf")
    model = trainers.trainable(base, params, "hf", torch.float32)
    made = packing.pack
    monkeypatch.setattr(packing, "pack", lambda rows, *, share: {**made(rows), "input_ids": made(rows)["input_ids"] * 0})
    chosen = trainers.batching(model, "hf", params, _rows(10, [5, 6]))
    assert chosen.kind == "padded" and "the model's loss is another one there" in chosen.reason
    monkeypatch.setattr(packing, "pack", lambda rows, *, share: {"nothing": torch.zeros(1)})
    chosen = trainers.batching(model, "hf", params, _rows(10, [5, 6]))
    assert chosen.kind == "padded" and "takes no rows in one sequence" in chosen.reason
    assert model.get_base_model().config._attn_implementation == "sdpa"


def test_with_dropout_nothing_is_shared(tmp_path: Path) -> None:
    base = tiny.make("3.x-dense", tmp_path / "base")
    params = FinetuneParameters(base=str(base), trainer="hf", dropout=0.1)
    model = trainers.trainable(base, params, "hf", torch.float32)
    rows = _rows(40, [7, 12])
    chosen = trainers.batching(model, "hf", params, rows)
    assert chosen.kind == "packed" and "dropout" in chosen.reason and chosen.saved == 0
    assert chosen.collate(rows)["input_ids"].shape == (1, 2 * 40 + 7 + 12)


def test_sliding_windows_are_refused() -> None:
    class Config:
        layer_types = ("sliding_attention", "full_attention")

    assert "window" in packing.obstacle(Config()) and not packing.obstacle(object())


def test_each_epoch_has_every_row_once_and_its_own_order() -> None:
    batches = Batches(["a"] * 7 + ["b"] * 6 + ["c"], 4, seed=3)
    orders = []
    for epoch in (0, 1, 0):
        batches.set_epoch(epoch)
        orders.append(list(batches))
    assert all(sorted(order) == list(range(14)) for order in orders)
    assert orders[0] == orders[2] != orders[1] and len(batches) == 14
    assert list(Batches(["a"] * 14, 4, seed=4)) != list(Batches(["a"] * 14, 4, seed=3))


def test_rows_of_one_head_share_batches_and_the_smaller_one_comes_last() -> None:
    heads = ["a", "b", "c"] * 9 + ["d"]
    order = list(Batches(heads, 4, seed=1))
    whole = [Counter(heads[i] for i in order[k : k + 4]) for k in range(0, 28, 4)]
    # two of four whole batches of nine rows each; what is left over is mixed
    assert sum(len(batch) == 1 for batch in whole) >= 6
    lone = list(Batches(["x"] * 10, 4, seed=1))
    assert sorted(lone) == list(range(10))


def test_padded_batches_have_rows_of_like_length() -> None:
    lengths = [random.Random(i).randrange(1, 500) for i in range(400)]
    order = list(Batches([""] * 400, 8, 0, lengths))
    wasted = sum(
        8 * max(lengths[i] for i in order[k : k + 8]) - sum(lengths[i] for i in order[k : k + 8]) for k in range(0, 400, 8)
    )
    assert sorted(order) == list(range(400)) and wasted < 0.15 * sum(lengths)


def test_the_share_of_saved_tokens_is_what_packing_saves() -> None:
    rows = [_example([*range(100), 1000 + i, 2000 + i], range(101, 102)) for i in range(16)]
    assert packing.saved(rows, 4, 0) == pytest.approx(300 / 408)
    assert packing.saved(_rows(0, [9]), 4, 0) == 0
