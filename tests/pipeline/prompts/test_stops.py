from __future__ import annotations

import json

import pytest

from pipeline.errors import ModelError
from pipeline.prompts.chat import ChatTemplate
from pipeline.prompts.stops import (
    StopFiles,
    Token,
    folder_problems,
    gguf_problems,
    repair_folder,
    repair_stops,
    special_ids,
    turn_end,
)
from pipeline.runs.files import read_json, write_json

END = Token("<|end_of_text|>", 0)
VOCABULARY = {"<|end_of_text|>": 0, "<fim_pad>": 4, "<|start_of_role|>": 5}
RIGHT = StopFiles(
    {"eos_token_id": 0, "pad_token_id": 4}, {"eos_token_id": [0, 9], "pad_token_id": 4}, {"eos_token": "<|end_of_text|>", "pad_token": "<fim_pad>"}
)  # fmt: skip


def test_turn_end_is_what_the_template_writes(template):
    assert turn_end(template, VOCABULARY) == END


def test_longest_token_wins():
    template = ChatTemplate("{% for m in messages %}{{ m.content }}</s>!{% endfor %}")
    assert turn_end(template, {"</": 1, "</s>": 2, "</s>?": 3}) == Token("</s>", 2)


def test_template_without_end_token_is_refused():
    with pytest.raises(ModelError, match="no control token"):
        turn_end(ChatTemplate("{% for m in messages %}{{ m.content }}\n{% endfor %}"), VOCABULARY)


def test_agreeing_files_are_left_alone():
    assert repair_stops(RIGHT, END, VOCABULARY) == (RIGHT, [])


def test_swapped_eos_and_pad_are_repaired_and_said():
    swapped = StopFiles(
        {"eos_token_id": 4, "pad_token_id": 0}, {"eos_token_id": 4, "pad_token_id": 0}, {"eos_token": "<fim_pad>", "pad_token": "<|end_of_text|>"}
    )  # fmt: skip
    files, notes = repair_stops(swapped, END, VOCABULARY)
    assert files.config == {"eos_token_id": 0, "pad_token_id": 4}
    assert files.tokenizer == {"eos_token": "<|end_of_text|>", "pad_token": "<fim_pad>"}
    assert notes == [
        "config.json: eos_token_id 4 is now 0 (<|end_of_text|>), which ends a turn",
        "generation_config.json: eos_token_id 4 is now 0 (<|end_of_text|>), which ends a turn",
        "tokenizer_config.json: eos_token <fim_pad> is now <|end_of_text|>, which ends a turn",
        "tokenizer_config.json: pad_token <|end_of_text|> is now <fim_pad>",
        "config.json: pad_token_id 0 is now 4 (<fim_pad>)",
        "generation_config.json: pad_token_id 0 is now 4 (<fim_pad>)",
    ]


def test_published_granite_3_pads_with_its_end_token():
    """All of eos, bos and pad are 0 there: the end would be masked in training, and answers would never stop."""
    published = StopFiles({"eos_token_id": 0, "pad_token_id": 0}, {"eos_token_id": 0, "pad_token_id": 0}, {"eos_token": {"content": "<|end_of_text|>"}, "pad_token": "<|end_of_text|>"})  # fmt: skip
    files, notes = repair_stops(published, END, VOCABULARY)
    assert (files.config["pad_token_id"], files.tokenizer["pad_token"], len(notes)) == (4, "<fim_pad>", 3)


def test_no_token_to_pad_with_is_refused():
    with pytest.raises(ModelError, match="must be learned"):
        repair_stops(RIGHT, END, {"<|end_of_text|>": 0})


def test_folder_is_repaired_in_place(tokenizer_folder, tmp_path):
    for name in ("tokenizer.json", "chat_template.jinja"):
        (tmp_path / name).write_bytes((tokenizer_folder / name).read_bytes())
    write_json(tmp_path / "tokenizer_config.json", {"eos_token": "<|pad|>", "pad_token": "<|pad|>", "other": 1})
    write_json(tmp_path / "config.json", {"eos_token_id": 1, "model_type": "granite"})
    ids = special_ids(tmp_path)
    notes = repair_folder(tmp_path)
    assert len(notes) == 5
    assert read_json(tmp_path / "config.json") == {
        "eos_token_id": ids["<|end_of_text|>"],
        "model_type": "granite",
        "pad_token_id": ids["<|pad|>"],
    }
    assert json.loads((tmp_path / "tokenizer_config.json").read_text()) == {
        "eos_token": "<|end_of_text|>",
        "pad_token": "<|pad|>",
        "other": 1,
    }
    assert repair_folder(tmp_path) == []


@pytest.mark.parametrize(
    ("metadata", "problems"),
    [
        ({"eos_token_id": 0, "padding_token_id": 4}, []),
        ({"eos_token_id": 0, "eot_token_id": 0}, []),
        ({"eos_token_id": 7, "eot_token_id": 0}, ["eos_token_id is 7"]),
        ({"eos_token_id": 0, "eot_token_id": 9}, ["its eot_token_id 9"]),
        ({"eos_token_id": 4, "padding_token_id": 0}, ["eos and pad are swapped", "answers would not stop", "pads with 0"]),
        ({"eos_token_id": 0, "add_bos_token": True}, ["adds its bos token"]),
    ],
)
def test_gguf(metadata, problems):
    found = gguf_problems({f"tokenizer.ggml.{name}": value for name, value in metadata.items()}, END)
    assert len(found) == len(problems)
    assert all(part in text for part, text in zip(problems, found, strict=True))


def test_folder_problems_say_what_repair_would_change(tokenizer_folder, tmp_path):
    for name in ("tokenizer.json", "tokenizer_config.json", "chat_template.jinja"):
        (tmp_path / name).write_bytes((tokenizer_folder / name).read_bytes())
    ids = special_ids(tmp_path)
    end, pad = Token("<|end_of_text|>", ids["<|end_of_text|>"]), ids["<|pad|>"]
    assert folder_problems(tmp_path, end, ids) == []
    write_json(tmp_path / "config.json", {"eos_token_id": pad, "pad_token_id": end.id})
    assert folder_problems(tmp_path, end, ids) == [
        "eos and pad are swapped",
        f"config.json: eos_token_id {pad} should be {end.id} (<|end_of_text|>), which ends a turn",
        f"config.json: pad_token_id {end.id} should be {pad} (<|pad|>)",
    ]
