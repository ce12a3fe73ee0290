import csv
import json

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from pipeline.errors import DataError
from training.datasets.dataset import Row, load, overlap, prompt_key, read, split
from training.parameters import reading

ROW = {"messages": [{"role": "user", "content": "q"}, {"role": "assistant", "content": "a"}]}


def _chat(*contents, where="f:1"):
    """A conversation that starts with the user."""
    roles = ("user", "assistant")
    return Row(tuple({"role": roles[i % 2], "content": text} for i, text in enumerate(contents)), where)


def test_a_good_file(write):
    path = write(ROW, {**ROW, "id": 7})
    made = read(path)
    assert made.source == str(path)
    assert made.format == "messages"
    assert [row.where for row in made.rows] == [f"{path}:1", f"{path}:2"]
    assert made.rows[0].messages == tuple(ROW["messages"])
    assert (made.refused, [key for key in made.keys if key.fate != "used"], len(made.sha256)) == ((), [("id", "harmless", 1)], 64)
    assert load(str(path)) == made


@pytest.mark.parametrize("name", ["rows.jsonl", "rows.json", "rows.csv", "rows.parquet"])
def test_one_dataset_in_four_kinds_of_file_is_the_same(tmp_path, name):
    rows = [{"instruction": "do", "input": "", "output": "done"}, {"instruction": "say", "input": "x", "output": "é"}]
    path = tmp_path / name
    if name.endswith("jsonl"):
        path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    elif name.endswith("json"):
        path.write_text(json.dumps(rows, indent=1))
    elif name.endswith("csv"):
        with path.open("w", newline="", encoding="utf-8") as handle:
            writer = csv.DictWriter(handle, rows[0])
            writer.writeheader()
            writer.writerows(rows)
    else:
        pyarrow = pytest.importorskip("pyarrow")
        pytest.importorskip("pyarrow.parquet").write_table(pyarrow.Table.from_pylist(rows), path)
    made = load(path)
    assert made.format == "alpaca"
    assert [[m["content"] for m in row.messages] for row in made.rows] == [["do", "done"], ["say\n\nx", "é"]]


def test_broken_json_on_line_7(write):
    path = write(*[ROW] * 6, '{"messages": [', ROW)
    made = read(path)
    assert len(made.rows) == 7
    [refusal] = made.refused
    assert (refusal.where, refusal.reason) == (f"{path}:7", "not valid JSON (Expecting value, column 15)")
    with pytest.raises(DataError) as caught:
        load(path)
    assert caught.value.message == f"{path}: 1 of 8 rows cannot be used"
    assert caught.value.evidence == f"{path}:7: not valid JSON (Expecting value, column 15)"
    assert caught.value.exit_code == 2


def test_load_shows_five_refusals_and_counts_the_rest(write):
    path = write(ROW, *[{**ROW, f"key{n}": "x"} for n in range(7)], *["{"] * 3)
    with pytest.raises(DataError) as caught:
        load(path)
    lines = caught.value.evidence.splitlines()
    assert [line.split(": ")[0] for line in lines[:5]] == [f"{path}:{n}" for n in range(2, 7)]
    assert lines[5:] == ["... and 3 more reasons"]


def test_one_cause_is_one_line(write):
    path = write(ROW, *["{"] * 7)
    with pytest.raises(DataError, match="7 of 8 rows cannot be used") as caught:
        load(path)
    reason = "not valid JSON (Expecting property name enclosed in double quotes, column 2)"
    assert caught.value.evidence == f"{path}:2 (and 6 more): {reason}"


def test_a_row_without_assistant_turn(write):
    path = write(ROW, {"messages": ROW["messages"][:1]})
    [refusal] = read(path).refused
    assert (refusal.where, refusal.reason) == (f"{path}:2", "has no assistant turn, so there is nothing to learn from")


def test_bytes_that_are_not_utf8_are_refused_with_their_line(tmp_path):
    path = tmp_path / "rows.jsonl"
    bad = json.dumps(ROW).replace('"q"', '"\N{BULLET}"').encode("cp1252")
    path.write_bytes(json.dumps(ROW).encode() + b"\n" + bad + b"\n")
    made = read(path)
    assert len(made.rows) == 1
    assert [(r.where, r.reason) for r in made.refused] == [(f"{path}:2", "is not valid UTF-8")]


def test_the_first_known_row_decides_the_format(write):
    path = write({"note": 1}, ROW, {"prompt": "q", "completion": "a"})
    made = read(path)
    assert made.format == "messages"
    assert [(r.where.rpartition(":")[2], r.reason) for r in made.refused] == [
        ("1", "no known columns (columns: note)"),
        ("3", "has no 'messages' (columns: prompt, completion)"),
    ]


def test_unknown_columns_name_those_seen_and_those_understood(write):
    path = write({"ask": "q", "answer": "a"}, {"body": "t"})
    with pytest.raises(DataError) as caught:
        read(path)
    assert caught.value.message == f"{path}: unknown column set (answer, ask, body)"
    assert caught.value.evidence == (
        "understood are messages: messages; conversations: conversations; xlam: query, answers, tools; prompt/completion: prompt, completion; "
        "alpaca: instruction, output; dolly: instruction, response; question/answer: question, answer; text: text"
    )


def test_a_set_of_preferences_is_told_how_to_train_on_the_chosen_answers(write):
    path = write({"prompt": "q", "chosen": "a", "rejected": "b"})
    with pytest.raises(DataError) as caught:
        read(path)
    assert "--columns completion=chosen --ignore rejected" in caught.value.remedy
    chosen = read(path, reading=reading("completion=chosen", ["rejected"]))
    assert [m["content"] for m in chosen.rows[0].messages] == ["q", "a"]
    assert ("rejected", "ignored", 1) in chosen.keys


def test_columns_can_be_named(write):
    path = write({"ask": "q", "reply": "a", "id": 1}, {"ask": "q"}, {"ask": "q", "reply": "a", "prompt": "other"})
    named = read(path, reading=reading("prompt=ask,completion=reply"))
    assert [row.where for row in named.rows] == [f"{path}:1"]
    assert [one.reason for one in named.refused] == [
        "has no 'reply', which --columns names (columns: ask)",
        "has a column 'prompt' already, which --columns wants to fill; --ignore prompt leaves it out",
    ]
    swapped = read(write({"prompt": "a", "completion": "q"}), reading=reading("prompt=completion,completion=prompt"))
    assert [m["content"] for m in swapped.rows[0].messages] == ["q", "a"]


def test_bad_rows_can_be_skipped_as_long_as_there_are_good_ones(write):
    good = {"prompt": "q", "completion": "a"}
    assert [r.where[-1] for r in load(write(good, {"prompt": "q"}, good), skip_bad=True).rows] == ["1", "3"]
    with pytest.raises(DataError, match="1 of 1 rows cannot be used"):
        load(write({"prompt": "q", "completion": ""}), skip_bad=True)


def test_documents_make_prompts_differ(write):
    row = {"prompt": "q", "completion": "a"}
    one, two = ({**row, "documents": [{"text": text}]} for text in ("x", "y"))
    rows = read(write(row, one, two)).rows
    assert len({prompt_key(row) for row in rows}) == 3
    assert rows[1].documents == ({"text": "x"},)


@pytest.mark.parametrize(
    ("name", "text"), [("a.jsonl", ""), ("a.jsonl", " \n\n"), ("a.json", "[]"), ("a.csv", "prompt,completion\n"), ("a.csv", "")]
)
def test_an_empty_file(tmp_path, name, text):
    path = tmp_path / name
    path.write_text(text)
    with pytest.raises(DataError) as caught:
        read(path)
    assert caught.value.message == f"{path} has no rows"


def test_a_missing_file(tmp_path):
    with pytest.raises(DataError, match=r"gone\.jsonl: no such file"):
        load(tmp_path / "gone.jsonl")


def test_a_file_without_a_row_has_no_format(write):
    made = read(write("5"))
    assert (made.format, made.rows, len(made.refused)) == ("unknown", (), 1)


def test_the_digest_is_of_the_bytes(write):
    one, two = write(ROW, name="one.jsonl"), write(ROW, "", name="two.jsonl")
    assert read(one).rows[0].messages == read(two).rows[0].messages
    assert read(one).sha256 != read(two).sha256


def test_split_keeps_order_and_is_deterministic():
    rows = [_chat(f"q{n}", "a", where=f"f:{n}") for n in range(100)]
    train, held_out = split(rows, 0.1, seed=1)
    assert (len(train), len(held_out)) == (90, 10)
    assert sorted([*train, *held_out], key=rows.index) == rows
    assert held_out == sorted(held_out, key=rows.index)
    assert split(rows, 0.1, seed=1) == (train, held_out)
    assert split(rows, 0.1, seed=2)[1] != held_out


def test_split_does_not_depend_on_the_order_of_rows():
    rows = [_chat(f"q{n}", "a", where=f"f:{n}") for n in range(50)]
    forth, back = split(rows, 0.2, 1)[1], split(rows[::-1], 0.2, 1)[1]
    assert forth == back[::-1]


def test_split_holds_out_at_least_one_row():
    train, held_out = split([_chat("one", "a"), _chat("two", "a")], 0.001, 1)
    assert (len(train), len(held_out)) == (1, 1)


@pytest.mark.parametrize("share", [0, 1, -0.1, 1.5, float("nan")])
def test_split_refuses_a_share_out_of_range(share):
    with pytest.raises(DataError, match="share must lie between 0 and 1"):
        split([_chat("one", "a"), _chat("two", "a")], share, 1)


@pytest.mark.parametrize("rows", [[], [_chat("one", "a")], [_chat("one", "a"), _chat(" ONE", "b")]])
def test_one_prompt_cannot_be_split(rows):
    with pytest.raises(DataError, match="cannot be split"):
        split(rows, 0.5, 1)


TURNS = st.lists(st.sampled_from(["a", "b", "A ", "c"]), min_size=1, max_size=3)


@settings(max_examples=200, deadline=None, derandomize=True)
@given(st.lists(TURNS, min_size=2, max_size=12), st.floats(0.01, 0.99), st.integers(0, 3))
def test_no_prompt_is_on_both_sides_of_a_split(questions, share, seed):
    rows = [_chat(*[text for turn in turns for text in (turn, "x")]) for turns in questions]
    try:
        train, held_out = split(rows, share, seed)
    except DataError:
        assert len({turns[0].strip().lower() for turns in questions}) <= 1 or len(rows) < 2
        return
    assert train
    assert held_out
    assert len(train) + len(held_out) == len(rows)
    assert overlap(train, held_out) == overlap(held_out, train) == []


def test_overlap_sees_through_case_and_white_space():
    known, new = _chat("Who are you?", "x"), _chat("who else?", "x")
    again = _chat(" who  ARE\nyou?", "y")
    assert overlap([known], [again, new]) == [again]


def test_overlap_finds_a_prompt_answered_in_the_middle_of_a_conversation():
    long, short = _chat("q", "a", "more", "b"), _chat("q", "other")
    assert overlap([long], [short]) == [short]
    assert overlap([short], [long]) == []


def test_overlap_tells_different_system_prompts_apart():
    system = {"role": "system", "content": "s"}
    row = _chat("q", "a")
    assert overlap([row], [Row((system, *row.messages), "f:1")]) == []


def test_what_a_refusal_quotes_can_be_printed(tmp_path):
    path = tmp_path / "rows.jsonl"
    path.write_bytes(json.dumps(ROW).encode() + b'\n{"\xff": 1}\n{"' + b"x" * 3000 + b'": 1}\n')
    bad, long = (refusal.reason for refusal in read(path).refused)
    assert bad == "has no 'messages' (columns: \N{REPLACEMENT CHARACTER})"
    assert len(long) == 2003


def test_unknown_columns_that_are_not_utf8(tmp_path):
    path = tmp_path / "rows.jsonl"
    path.write_bytes(b'{"\xff": 1}\n')
    with pytest.raises(DataError) as caught:
        read(path)
    assert caught.value.message == f"{path}: unknown column set (\N{REPLACEMENT CHARACTER})"


def test_ids_of_calls_do_not_make_prompts_differ(write):
    def row(number):
        call = {"id": f"call_{number}", "type": "function", "function": {"name": "f", "arguments": {"x": 1}}}
        turns = [*ROW["messages"][:1], {"role": "assistant", "tool_calls": [call]}]
        return {"messages": [*turns, {"role": "tool", "tool_call_id": f"call_{number}", "content": "r"}, *ROW["messages"][1:]]}

    rows = read(write(*(row(number) for number in range(3)))).rows
    assert len({prompt_key(row) for row in rows}) == 1
    assert overlap(rows[:1], rows[1:]) == list(rows[1:])


def test_a_row_in_one_line_is_no_list_of_rows(write):
    turns = [{"role": "user", "content": "q"}, {"role": "assistant", "content": "a"}]
    assert len(read(write({"dialogue": turns, "id": 1}), reading=reading("messages=dialogue")).rows) == 1


def test_a_key_is_quoted_as_a_shell_takes_it(write):
    [refusal] = read(write({**ROW, "$(touch x), y": "z"})).refused
    assert "--ignore '$(touch x), y' leaves it out" in refusal.reason
    assert len(read(write({**ROW, "$(touch x), y": "z"}), reading=reading(ignore=["$(touch x), y"])).rows) == 1
