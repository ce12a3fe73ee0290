import builtins

import pytest

from pipeline.errors import DataError, EnvironmentFailure
from training.datasets.sources import HubId, records, resolve


def _read(path, raw):
    path.write_bytes(raw if isinstance(raw, bytes) else raw.encode())
    return [(record.where.removeprefix(f"{path}:"), record.value or record.problem) for record in records(resolve(path))]


@pytest.fixture
def table(tmp_path):
    return lambda raw, name="rows.csv": _read(tmp_path / name, raw)


def test_csv_with_quotes_newlines_bom_and_crlf(table):
    raw = b'\xef\xbb\xbfprompt,completion\r\n"a ""b""\r\nc",d\r\n\r\ne,f\r\n'
    assert table(raw) == [("2", {"prompt": 'a "b"\r\nc', "completion": "d"}), ("5", {"prompt": "e", "completion": "f"})]


def test_csv_with_semicolons_and_tsv(table):
    row = [("2", {"prompt": "a,b", "completion": "c"})]
    assert table("prompt;completion\na,b;c\n") == row
    assert table("prompt\tcompletion\na,b\tc\n", "rows.tsv") == row


def test_csv_rows_of_a_wrong_width(table):
    assert table("prompt,completion\na\nb,c\nd,e,f\n") == [
        ("2", "1 fields where the header has 2"),
        ("3", {"prompt": "b", "completion": "c"}),
        ("4", "3 fields where the header has 2"),
    ]


def test_csv_goes_on_after_a_bad_quote(table):
    assert table('prompt,completion\n"a"b,c\nd,e\n') == [
        ("2", "not valid CSV (',' expected after '\"')"),
        ("3", {"prompt": "d", "completion": "e"}),
    ]


def test_csv_with_an_open_quote(table):
    assert table('prompt,completion\na,b\n"c,d\n') == [
        ("2", {"prompt": "a", "completion": "b"}),
        ("3", "not valid CSV (unexpected end of data)"),
    ]


def test_csv_cells_longer_than_the_usual_limit(table):
    [(_, value)] = table("prompt,completion\n" + "x" * 300_000 + ",y\n")
    assert len(value["prompt"]) == 300_000


def test_csv_header_with_a_column_twice(table):
    with pytest.raises(DataError, match=r"rows\.csv:1: a column name appears twice in the header: prompt, prompt"):
        table("prompt,prompt\na,b\n")


def test_parquet_leaves_out_the_nulls_that_other_rows_fill(tmp_path):
    pyarrow = pytest.importorskip("pyarrow")
    parquet = pytest.importorskip("pyarrow.parquet")
    path = tmp_path / "rows.parquet"
    turns = [[{"role": "user", "content": "q"}], [{"role": "user", "content": "q", "name": "n"}]]
    parquet.write_table(pyarrow.Table.from_pylist([{"messages": each, "id": None} for each in turns]), path)
    assert [(record.where, record.value) for record in records(path)] == [
        (f"{path}:1", {"messages": [{"role": "user", "content": "q"}]}),
        (f"{path}:2", {"messages": [{"role": "user", "content": "q", "name": "n"}]}),
    ]


@pytest.mark.parametrize("raw", [b"", b"PAR1", b"not parquet at all"])
def test_a_file_that_is_not_parquet(tmp_path, raw):
    pytest.importorskip("pyarrow")
    path = tmp_path / "rows.parquet"
    path.write_bytes(raw)
    with pytest.raises(DataError, match=r"rows\.parquet cannot be read as Parquet"):
        list(records(path))


@pytest.mark.parametrize(
    ("start", "what"),
    [
        (b"\x1f\x8b\x08", "is gzip-compressed"),
        (b"PK\x03\x04", "is a ZIP archive or a spreadsheet"),
        ('{"a": 1}'.encode("utf-16"), "is UTF-16 text; save it as UTF-8"),
        (b"PAR1", "is a Parquet file; name it .parquet"),
    ],
)
def test_other_kinds_of_file_are_named(tmp_path, start, what):
    path = tmp_path / "rows.csv"
    path.write_bytes(start)
    with pytest.raises(DataError) as caught:
        records(path)
    assert caught.value.message.startswith(f"{path} {what}")


def test_bytes_are_reported_as_they_are_read(tmp_path):
    path = tmp_path / "rows.jsonl"
    path.write_bytes(b'{"a": 1}\r\n{"a": 2}\n')
    told: list[int] = []
    assert len(list(records(path, told.append))) == 2
    assert told == [10, 9]


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("hub:owner/name", HubId("owner/name", None, "train")),
        ("owner/name", HubId("owner/name", None, "train")),
        ("owner/name:test", HubId("owner/name", None, "test")),
        ("hub:owner/na.me@v1.0:train[:10%]", HubId("owner/na.me", "v1.0", "train[:10%]")),
        ("owner/name@refs/pr/1", HubId("owner/name", "refs/pr/1", "train")),
    ],
)
def test_hub_names(text, expected):
    assert resolve(text) == expected


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("missing.jsonl", "missing.jsonl: no such file"),
        ("data/missing.jsonl", "data/missing.jsonl: no such file"),
        ("folder/missing", "folder/missing: no such file"),
        ("/nowhere/at/all", "/nowhere/at/all: no such file"),
        ("folder", "folder is a folder"),
        ("notes.txt", "notes.txt: unknown kind of file"),
        ("hub:name", "hub:name is not a hub dataset"),
        ("hub:../etc/passwd", "hub:../etc/passwd is not a hub dataset"),
    ],
)
def test_what_is_neither_file_nor_hub_dataset(tmp_path, monkeypatch, text, message):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "folder").mkdir()
    (tmp_path / "notes.txt").write_text("x")
    with pytest.raises(DataError) as caught:
        resolve(text)
    assert caught.value.message == message


def test_an_existing_file_wins_over_a_hub_name(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "owner").mkdir()
    (tmp_path / "owner" / "rows.csv").write_text("a,b\n")
    assert str(resolve("owner/rows.csv")) == "owner/rows.csv"


def test_a_hub_that_cannot_be_reached_is_one_clear_error(monkeypatch):
    datasets = pytest.importorskip("datasets")
    monkeypatch.setattr(datasets.config, "HF_HUB_OFFLINE", True)
    with pytest.raises(EnvironmentFailure) as caught:
        list(records(HubId("no-such-owner/no-such-dataset")))
    assert caught.value.message == "hub:no-such-owner/no-such-dataset: the hub cannot be reached"
    assert caught.value.exit_code == 3


@pytest.mark.parametrize(
    ("raised", "kind", "message"),
    [
        ("DatasetNotFoundError", DataError, "hub:a/b is not on the hub, or not open to this account"),
        ("ValueError", DataError, "hub:a/b has no usable split 'train'"),
        ("PermissionError", EnvironmentFailure, "hub:a/b could not be downloaded"),
    ],
)
def test_what_the_hub_answers_becomes_our_error(monkeypatch, raised, kind, message):
    datasets = pytest.importorskip("datasets")
    error = getattr(datasets.exceptions, raised, None) or getattr(builtins, raised)

    def fail(*_, **__):
        raise error("first line\nsecond line")

    # a hub that answers so cannot be had in a test
    monkeypatch.setattr(datasets, "load_dataset", fail)
    with pytest.raises(kind) as caught:
        list(records(HubId("a/b")))
    assert (caught.value.message, caught.value.evidence) == (message, "first line")


def test_hub_rows_are_counted_from_one(monkeypatch):
    datasets = pytest.importorskip("datasets")
    rows = [{"prompt": "q", "completion": "a", "id": None}]
    monkeypatch.setattr(datasets, "load_dataset", lambda name, revision, split: rows)
    found = list(records(HubId("a/b", "v1")))
    assert [(record.where, record.value) for record in found] == [("hub:a/b@v1:1", {"prompt": "q", "completion": "a"})]


def test_csv_with_carriage_returns_only(table):
    with pytest.raises(DataError, match=r"rows\.csv:1: not valid CSV \(new-line character seen in unquoted field"):
        table("prompt,completion\ra,b\r")


def test_a_parquet_date_that_python_cannot_hold_names_its_row_and_column(tmp_path):
    pyarrow = pytest.importorskip("pyarrow")
    from pyarrow import parquet

    days = pyarrow.array([0, 2**31 - 1], pyarrow.int32()).cast(pyarrow.date32())
    parquet.write_table(pyarrow.table({"prompt": ["a", "b"], "on": days}), tmp_path / "d.parquet")
    with pytest.raises(DataError, match=r"d\.parquet:2: on cannot be read"):
        list(records(resolve(tmp_path / "d.parquet")))
