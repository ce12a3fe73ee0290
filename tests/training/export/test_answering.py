"""The decoder says what ``generate`` says, token by token, in every state of a batch; what is kept of the weights changes nothing."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from pipeline.runs.stages import Partial
from pipeline.verify.score import CUT, Answer, HeldOut
from tests.support import tiny

pytest.importorskip("torch")

import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from training.export import answering, evaluate

BUDGET = 12
# one begins another, one is long, all begin alike
PROMPTS = [[5, 6, 7, *range(20, 20 + n)] for n in (1, 4, 30, 9, 2)]


@pytest.fixture(scope="module", params=["3.x-dense", "3.x-moe", "4.0-dense", "4.1"])
def folder(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny.make(request.param, tmp_path_factory.mktemp("answering") / "base")


def _alone(folder: Path, prompts: list[list[int]], ends: set[int]) -> list[list[int]]:
    """Each prompt by itself, with generate, in float32."""
    model = AutoModelForCausalLM.from_pretrained(str(folder), dtype=torch.float32).eval()
    model.generation_config.eos_token_id = sorted(ends)
    found = []
    for ids in prompts:
        start = torch.tensor([ids])
        out = model.generate(input_ids=start, attention_mask=torch.ones_like(start), max_new_tokens=BUDGET, do_sample=False)
        found.append(out[0, len(ids) :].tolist())
    return found


def test_each_row_of_a_batch_is_answered_as_if_alone(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    plain = _alone(folder, PROMPTS, set())
    # tokens that end some rows early, and not others
    ends = {plain[0][3], plain[3][6]}
    want = _alone(folder, PROMPTS, ends)
    assert len({len(ids) for ids in want}) > 1
    monkeypatch.setattr(answering, "PREFILL_TOKENS", 40)  # prompts in parts
    for mapped in (False, True):
        model = answering.load(folder, "cpu", torch.float32, mapped=mapped)
        assert answering.obstacle(model) is None
        found = answering.decode(model, PROMPTS, BUDGET, ends)
        assert [one.ids for one in found] == want
        assert [one.reason for one in found] == ["stop" if ids[-1] in ends else "length" for ids in want]
    # nothing in common, and one alone
    for prompts in ([[9, 8], [3, 4, 5]], PROMPTS[2:3]):
        assert [one.ids for one in answering.decode(model, prompts, BUDGET, ())] == _alone(folder, prompts, set())


def test_a_row_without_hope_ends_and_the_others_go_on(folder: Path) -> None:
    model = answering.load(folder, "cpu", torch.float32)
    want = [one.ids for one in answering.decode(model, PROMPTS, BUDGET, ())]
    found = answering.decode(model, PROMPTS, BUDGET, (), lambda row, ids: row in (0, 2) and len(ids) == 4)
    assert [one.reason for one in found] == ["cut", "length", "cut", "length", "length"]
    assert [one.ids for one in found] == [ids[: 4 if row in (0, 2) else BUDGET] for row, ids in enumerate(want)]


def test_weights_that_stay_as_stored_are_not_held_as_float32(tmp_path: Path) -> None:
    folder = tiny.make("3.x-dense", tmp_path / "base")
    half = AutoModelForCausalLM.from_pretrained(str(folder), dtype=torch.float16)
    half.save_pretrained(str(folder))
    whole, stored = (answering.load(folder, "cpu", torch.float32, mapped=mapped) for mapped in (False, True))
    sizes = [{p.dtype for p in model.parameters() if p.numel() > 2**16} for model in (whole, stored)]
    assert sizes == [{torch.float32}, {torch.float16}]
    assert answering.decode(whole, PROMPTS, BUDGET, ()) == answering.decode(stored, PROMPTS, BUDGET, ())
    assert {p.dtype for p in stored.parameters() if p.numel() > 2**16} == {torch.float16}


@pytest.mark.parametrize("variant", ["4.0-hybrid", "4.0-hybrid-moe"])
def test_a_hybrid_is_left_to_generate_and_it_is_said_why(variant: str, tmp_path: Path) -> None:
    model = answering.load(tiny.make(variant, tmp_path / "base"), "cpu", torch.float32)
    assert "its cache has other layers" in str(answering.obstacle(model))


def test_a_generation_config_that_changes_the_likeliest_token_is_left_to_generate(tmp_path: Path) -> None:
    model = answering.load(tiny.make("3.x-dense", tmp_path / "base"), "cpu", torch.float32)
    model.generation_config.repetition_penalty = 1.1
    assert answering.obstacle(model) == "its generation config sets repetition_penalty"


def _rows(count: int, expected: str) -> list[HeldOut]:
    return [HeldOut(({"role": "user", "content": f"question {'x ' * (i % 5)}{i}"},), expected) for i in range(count)]


def test_rows_answered_before_a_kill_are_not_asked_again(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder, rows = tiny.make("3.x-dense", tmp_path / "base"), _rows(9, "some words")
    whole, how = evaluate.answer_all(folder, evaluate.Asked(rows), Partial(tmp_path / "whole.part", "k"))
    assert how == {"engine": "transformers", "dtype": "float32"}
    monkeypatch.setattr(evaluate, "_BATCH_ROWS", 2)
    half = Partial(tmp_path / "half.part", "k")
    decode, asked = answering.decode, []

    def dies(*given: Any, **more: Any) -> Any:
        asked.append(len(given[1]))
        if len(asked) == 3:
            raise KeyboardInterrupt
        return decode(*given, **more)

    monkeypatch.setattr(answering, "decode", dies)
    with pytest.raises(KeyboardInterrupt):
        evaluate.answer_all(folder, evaluate.Asked(rows), half)
    again = evaluate.answer_all(folder, evaluate.Asked(rows), Partial(tmp_path / "half.part", "k"))
    assert again == (whole, how)
    assert sum(asked) == len(rows) + asked[2]


def test_only_answers_of_which_nothing_but_the_score_is_used_are_cut(tmp_path: Path) -> None:
    # with these settings it says words
    folder, rows = tiny.make("3.x-dense", tmp_path / "base", embedding_multiplier=1.0), _rows(6, '{"verdict":"benign"}')
    whole, _ = evaluate.answer_all(folder, evaluate.Asked(rows), Partial(tmp_path / "a.part", "k"))
    short, _ = evaluate.answer_all(folder, evaluate.Asked(rows, [0, 5], cut=True), Partial(tmp_path / "b.part", "k"))
    assert {answer.finish_reason for answer in whole} <= {"stop", "length"}
    # random weights say no JSON
    assert [answer.finish_reason for answer in short] == [CUT, CUT]
    assert [one.text.startswith(cut.text) for one, cut in zip((whole[0], whole[5]), short, strict=True)] == [True, True]
    free, _ = evaluate.answer_all(folder, evaluate.Asked(_rows(2, "words"), cut=True), Partial(tmp_path / "c.part", "k"))
    assert CUT not in {answer.finish_reason for answer in free}


@pytest.mark.parametrize("same", [True, False])
def test_bfloat16_answers_only_what_it_was_proven_to_answer_alike(
    same: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder, rows = tiny.make("3.x-dense", tmp_path / "base"), _rows(20, "some words")
    float32, _ = evaluate.answer_all(folder, evaluate.Asked(rows), Partial(tmp_path / "a.part", "k"))
    monkeypatch.setattr(evaluate._Line, "_long", lambda *_: True)
    decoded, dtypes = evaluate._Line._decoded, []

    def sees(self: Any, model: Any, chosen: Any) -> list[Answer]:
        dtypes.append(next(model.parameters()).dtype)
        if same or dtypes[-1] == torch.float32:
            return [float32[i] for i in chosen]
        return [*decoded(self, model, chosen)[:-1], Answer("another", "stop")]

    monkeypatch.setattr(evaluate._Line, "_decoded", sees)
    partial = Partial(tmp_path / "b.part", "k")
    found, how = evaluate.answer_all(folder, evaluate.Asked(rows), partial)
    assert found == float32
    assert dtypes == [torch.float32, torch.bfloat16, torch.bfloat16 if same else torch.float32]
    proved = {"dtype": "bfloat16", "proved_on": 8} if same else {"dtype": "float32"}
    assert how == {"engine": "transformers", **proved}


def test_rows_that_begin_alike_share_batches_and_all_fit_the_room(tmp_path: Path) -> None:
    tokenizer = AutoTokenizer.from_pretrained(str(tiny.make("3.x-dense", tmp_path / "base")))
    systems = [HeldOut(({"role": "system", "content": f"s{i % 2}"}, {"role": "user", "content": "q"}), "x") for i in range(40)]
    prompts = [[i % 2] * (10 + i) for i in range(43)]
    line = evaluate._Line(
        tmp_path, evaluate.Asked([*systems, *_rows(3, "x")]), tokenizer, prompts, 5, Partial(tmp_path / "p", "k")
    )
    line.batch_tokens = 600
    batches = line._batches(range(43))
    assert sorted(i for batch in batches for i in batch) == list(range(43))
    assert all(len({i % 2 for i in batch}) == 1 for batch in batches if max(batch) < 40)
    assert all(len(batch) * (max(len(prompts[i]) for i in batch) + 5) <= 600 for batch in batches)
