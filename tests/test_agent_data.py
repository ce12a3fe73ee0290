import json

import pytest

from benchmarks.agent_data import KINDS, TOOLS, UNKNOWN, generate
from pipeline.model.toolcalls import plain_calls
from training.datasets.dataset import load, overlap


@pytest.mark.parametrize("what", ["tools", "documents"])
def test_the_same_seed_makes_the_same_rows_and_no_held_out_prompt_is_trained_on(what, tmp_path):
    made, again = generate(what, 400, 100), generate(what, 400, 100)
    assert made == again
    files = []
    for name, rows in zip(("train", "heldout"), made, strict=True):
        files.append(tmp_path / f"{name}.jsonl")
        files[-1].write_text("".join(json.dumps(row) + "\n" for row in rows))
    train, held_out = (load(str(path)) for path in files)
    assert overlap(train.rows, held_out.rows) == []
    assert len(train.rows) == 400
    assert len(held_out.rows) >= 80


def test_calls_name_listed_tools_and_copy_from_the_alert():
    train, held_out = generate("tools", 400, 100)
    schemas = {tool["function"]["name"]: tool["function"]["parameters"] for tool in TOOLS}
    kinds = {len(row["messages"][1].get("tool_calls", ())) for row in held_out}
    assert kinds == {0, 1, 2}
    assert KINDS.count("none") == 2
    for row in [*train, *held_out]:
        for call in plain_calls(row["messages"][1].get("tool_calls", ())):
            assert sorted(call["arguments"]) == sorted(schemas[call["name"]]["required"])
            for key, value in call["arguments"].items():
                assert key == "kind" or value in row["messages"][0]["content"]


def test_answers_stand_in_a_document_or_are_said_not_to():
    train, held_out = generate("documents", 200, 40)
    unknown = 0
    for row in [*train, *held_out]:
        host, _, value = row["messages"][1]["content"].rstrip(".").partition(": ")
        sheets = {document["title"]: document["text"] for document in row["documents"]}
        asked = row["messages"][0]["content"]
        if row["messages"][1]["content"] == UNKNOWN:
            unknown += 1
            assert not any(title in asked for title in sheets)
        else:
            assert host in asked
            assert value in sheets[host]
    assert unknown == 40
