import json
import math

import pytest

from pipeline.errors import DataError
from training.datasets.sources import records, resolve


def _read(path, raw):
    path.write_bytes(raw if isinstance(raw, bytes) else raw.encode())
    return [(record.where.removeprefix(f"{path}:"), record.value or record.problem) for record in records(resolve(path))]


@pytest.fixture
def jsonl(tmp_path):
    return lambda raw: _read(tmp_path / "rows.jsonl", raw)


@pytest.fixture
def array(tmp_path):
    return lambda raw: _read(tmp_path / "rows.json", raw)


def test_jsonl_counts_blank_lines(jsonl):
    assert jsonl('{"a": 1}\n\n  \n{"a": 2}\n') == [("1", {"a": 1}), ("4", {"a": 2})]


def test_jsonl_with_bom_crlf_and_no_last_newline(jsonl):
    assert jsonl(b'\xef\xbb\xbf{"a": 1}\r\n{"a": 2}') == [("1", {"a": 1}), ("2", {"a": 2})]


def test_jsonl_lines_end_at_newlines_only(jsonl):
    assert jsonl('{"a": "x\u2028y\u0085z"}\n{"a": 2}') == [("1", {"a": "x\u2028y\u0085z"}), ("2", {"a": 2})]


@pytest.mark.parametrize(
    ("line", "problem"),
    [
        ('{"a": 1, "a": 2}', "key 'a' appears twice in one object"),
        ('{"a": {"b": 1, "b": 2}}', "key 'b' appears twice in one object"),
        ("5", "a row must be a JSON object, this is int"),
        ("null", "a row must be a JSON object, this is NoneType"),
        ('{"a": 1} {"a": 2}', "not valid JSON (Extra data, column 10)"),
        ('{"a": ' + "[" * 200_000, "not valid JSON (nested too deeply)"),
        ("{", "not valid JSON (Expecting property name enclosed in double quotes, column 2)"),
    ],
    ids=lambda value: value[:20],
)  # fmt: skip
def test_strict_json(jsonl, line, problem):
    assert jsonl(line) == [("1", problem)]


@pytest.mark.parametrize("text", ["NaN", "-Infinity", "1e999"])
def test_numbers_that_are_none_are_left_to_whoever_uses_them(jsonl, text):
    [(where, value)] = jsonl(f'{{"a": {text}}}')
    assert (where, math.isfinite(value["a"])) == ("1", False)


def test_the_one_list_in_an_object_is_the_rows(array):
    rows = [("3", {"a": 1}), ("4", {"a": 2})]
    assert array('{"version": "1.0", "data": [\n\n{"a": 1},\n{"a": 2}], "info": {"x": [1]}}') == rows
    assert array('{\n"data": [\n{"a": 1},\n{"a": 2}]}') == rows
    assert array('{"rows": [{"a": 1}, {"a": 2}]}\n') == [("1", {"a": 1}), ("1", {"a": 2})]


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ('{"train": [{"a": 1}],\n"test": [{"a": 2}]}', ":1: holds several lists (train, test)"),
        ('{"system": "s",\n"rows": [{"a": 1}]}', ":1: 'system' stands beside the list of rows 'rows'"),
        ('{\n"messages": [{"role": "user"}]\n}', ":1: is one object over several lines"),
        ('{\n"a": 1\n}\n{\n"a": 2\n}\n', " is neither JSON Lines nor one JSON value"),
        ("no\njson\nat all\n", " is neither JSON Lines nor one JSON value"),
    ],
)
def test_a_file_that_is_wrong_as_a_whole_has_one_line(array, text, said):
    with pytest.raises(DataError) as caught:
        array(text)
    assert caught.value.message.endswith(said)


def test_a_bad_first_line_does_not_hide_the_others(jsonl):
    found = jsonl('{"a": \n{"a": 2}\n\n{"a": 3}')
    assert [where for where, _ in found] == ["1", "2", "4"]
    assert [value for _, value in found[1:]] == [{"a": 2}, {"a": 3}]


def test_array_elements_have_their_lines(array):
    assert array('\n[\n  {"a": 1},\n\n  {\n    "a": 2\n  }\n]\n') == [("3", {"a": 1}), ("5", {"a": 2})]


def test_array_in_one_line_and_under_the_jsonl_name(array, jsonl):
    expected = [("1", {"a": 1}), ("1", {"a": 2})]
    assert array('[{"a": 1}, {"a": 2}]') == expected
    assert jsonl('[{"a": 1}, {"a": 2}]') == expected


def test_empty_array(array):
    assert array("[ ]") == []


def test_broken_json_is_a_problem_on_its_line_and_the_rest_is_read(jsonl):
    good = '{"a": 1}\n'
    found = jsonl(good * 6 + '{"a": 1,}\n' + good)
    reason = "not valid JSON (Expecting property name enclosed in double quotes, column 9)"
    assert found[6] == ("7", reason)
    assert [where for where, _ in found] == ["1", "2", "3", "4", "5", "6", "7", "8"]


def test_an_endless_number_is_a_problem(jsonl):
    [(where, problem)] = jsonl('{"a": ' + "9" * 5000 + "}")
    assert where == "1"
    assert problem.startswith("Exceeds the limit (4300 digits) for integer string conversion")


def test_bytes_that_are_not_utf8_reach_the_row_check(jsonl):
    assert jsonl(b'{"a": "\xff"}\n{"a": 2}') == [("1", {"a": "\udcff"}), ("2", {"a": 2})]


def test_a_10_mb_line(jsonl):
    [(where, value)] = jsonl(json.dumps({"a": "x" * 10_000_000}))
    assert (where, len(value["a"])) == ("1", 10_000_000)


def test_json_lines_under_the_json_name(array):
    assert array('{"a": 1}\n{"a": 2}\n') == [("1", {"a": 1}), ("2", {"a": 2})]


@pytest.mark.parametrize(
    ("text", "where", "reason"),
    [
        ('[\n{"a": 1},\n{"a": }\n]', "3", "Expecting value, column 7"),
        ('[{"a": 1}\n{"a": 2}]', "2", "expected ',' or ']' after a row, column 1"),
        ('[{"a": 1},\n]', "2", "comma before ']', column 1"),
        ('[{"a": 1}', "1", "expected ',' or ']' after a row, column 10"),
        ('[{"a": 1}]\n\nx', "3", "text after the array, column 1"),
        ('[{"a": 1},\n' + "[" * 200_000, "2", "nested too deeply, column 1"),
    ],
    ids=["value", "comma", "trailing", "open", "after", "deep"],
)
def test_a_broken_array_is_read_up_to_there(array, text, where, reason):
    found = array(text)
    assert found == [(found[0][0], {"a": 1}), (where, f"not valid JSON ({reason}); the rest of the file was not read")]


def test_an_array_goes_on_after_an_element_that_is_not_strict(array):
    assert array('[{"a": 0},\n{"b": 1, "b": 2},\n7,\n{"a": 1}]') == [
        ("1", {"a": 0}),
        ("2", "key 'b' appears twice in one object"),
        ("3", "a row must be a JSON object, this is int"),
        ("4", {"a": 1}),
    ]
