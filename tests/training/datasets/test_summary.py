import json

import pytest

from pipeline.errors import ModelError
from training.datasets.dataset import read
from training.datasets.summary import summarise

ROW = {"messages": [{"role": "user", "content": "q"}, {"role": "assistant", "content": "a"}]}


def test_summary_counts(write):
    answer = {"role": "assistant", "content": '{"label": "x", "sure": true, "why": ["list"]}'}
    user = {"role": "user", "content": "12345678"}
    path = write(
        {"messages": [user, answer]},
        {"messages": [user, answer]},
        {"messages": [user | {"content": "12345678 "}, answer | {"content": '{"label": "y", "sure": null}'}]},
        {"messages": [user | {"content": "<|end_of_text|>"}, answer | {"content": "text"}], "tools": [{"name": "f"}]},
        "{",
    )
    summary = summarise(read(path), max_length=16)
    assert (summary.rows, summary.turns, summary.roles) == (4, 8, {"user": 4, "assistant": 4})
    assert (summary.duplicates, summary.repeated_prompts) == (1, 1)
    assert (summary.control_token_rows, summary.tools_rows, summary.json_answers) == (1, 1, 3)
    assert [(label.field, label.distinct, label.top) for label in summary.labels] == [
        ("label", 2, (("x", 2), ("y", 1))),
        ("sure", 2, (("true", 2), ("null", 1))),
    ]
    assert summary.refused[0][0] == f"{path}:5"
    # 8 characters are 2 tokens, the first answer's 45 are 12; 6 more a turn; the tools' 97 characters are 25
    assert summary.tokens is not None
    assert (summary.tokens.minimum, summary.tokens.median, summary.tokens.p95, summary.tokens.maximum) == (22, 26, 39, 39)
    assert (summary.tokens.total, summary.tokens.how) == (113, "estimated as characters / 4")
    assert summary.over_length == 4


def test_summary_as_json(write):
    made = summarise(read(write(ROW, "{"))).to_json()
    assert made["tokens"] == {
        "minimum": 14,
        "median": 14,
        "p95": 14,
        "maximum": 14,
        "total": 14,
        "how": "estimated as characters / 4",
    }
    assert made["refused"][0]["reason"].startswith("not valid JSON")
    assert (made["rows"], made["labels"], made["over_length"]) == (1, {}, None)


def test_summary_without_rows(write):
    summary = summarise(read(write("{")))
    assert (summary.rows, summary.tokens, summary.labels) == (0, None, ())


def test_tokens_are_counted_by_a_tokenizer(write, tmp_path):
    from tokenizers import Tokenizer
    from tokenizers.models import WordLevel
    from tokenizers.pre_tokenizers import Whitespace

    tokenizer = Tokenizer(WordLevel({"[UNK]": 0}, unk_token="[UNK]"))
    tokenizer.pre_tokenizer = Whitespace()
    tokenizer.save(str(tmp_path / "tokenizer.json"))
    row = {"prompt": "three words here", "completion": "two words"}
    summary = summarise(read(write(row)), tmp_path)
    assert summary.tokens is not None
    assert (summary.tokens.maximum, summary.tokens.how) == (3 + 2 + 12, "counted by the tokenizer")


def test_a_folder_without_tokenizer(write, tmp_path):
    with pytest.raises(ModelError, match=r"has no tokenizer\.json"):
        summarise(read(write(ROW)), tmp_path)


def test_labels_that_are_not_utf8_can_be_printed(write):
    row = {"prompt": "q", "completion": '{"label": "\\ud800"}'}
    summary = summarise(read(write(row)))
    assert summary.labels[0].top == (("\N{REPLACEMENT CHARACTER}", 1),)
    assert json.dumps(summary.to_json(), ensure_ascii=False).encode()
