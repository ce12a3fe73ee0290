import builtins
import gzip

import pytest

from pipeline.errors import DataError, EnvironmentFailure
from training.datasets import rows
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
    assert [(record.where, record.value) for record in records((path,))] == [
        (f"{path}:1", {"messages": [{"role": "user", "content": "q"}]}),
        (f"{path}:2", {"messages": [{"role": "user", "content": "q", "name": "n"}]}),
    ]


@pytest.mark.parametrize("raw", [b"", b"PAR1", b"not parquet at all"])
def test_a_file_that_is_not_parquet(tmp_path, raw):
    pytest.importorskip("pyarrow")
    path = tmp_path / "rows.parquet"
    path.write_bytes(raw)
    with pytest.raises(DataError, match=r"rows\.parquet cannot be read as Parquet"):
        list(records((path,)))


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
        list(records((path,)))
    assert caught.value.message.startswith(f"{path} {what}")


def test_bytes_are_reported_as_they_are_read(tmp_path):
    path = tmp_path / "rows.jsonl"
    path.write_bytes(b'{"a": 1}\r\n{"a": 2}\n')
    told: list[int] = []
    assert len(list(records((path,), told.append))) == 2
    assert told == [10, 9]


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("hub:owner/name", HubId("owner/name", None, "train")),
        ("owner/name", HubId("owner/name", None, "train")),
        ("owner/name:test", HubId("owner/name", None, "test")),
        ("hub:owner/na.me@v1.0:train[:10%]", HubId("owner/na.me", "v1.0", "train[:10%]")),
        ("hub:owner/name:easy:test", HubId("owner/name", None, "test", "easy")),
        ("hub:owner/name@v1:easy:train[:5%]", HubId("owner/name", "v1", "train[:5%]", "easy")),
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
        ("folder", "folder has no data file in it"),
        ("folder/*.jsonl", "folder/*.jsonl matches no file"),
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
    assert list(map(str, resolve("owner/rows.csv"))) == ["owner/rows.csv"]


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


def test_csv_as_spreadsheets_and_pandas_write_it(table):
    assert table("sep=;\nprompt;completion\na,b;c\n") == [("3", {"prompt": "a,b", "completion": "c"})]
    assert table("prompt,completion,,\na,b,,\n") == [("2", {"prompt": "a", "completion": "b"})]
    assert table("prompt,completion,\na,b,x\n") == [("2", {"prompt": "a", "completion": "b", "column 3": "x"})]
    assert table(",prompt,completion\n0,a,b\n") == [("2", {"__index_level_0__": "0", "prompt": "a", "completion": "b"})]


def test_a_csv_that_begins_with_nothing_is_refused(table):
    with pytest.raises(DataError, match=r"rows\.csv:1: the first line names no column"):
        table("\n\nprompt,completion\nq,a\n")


def test_gzip_is_unpacked_and_damage_is_told(tmp_path):
    path = tmp_path / "rows.jsonl.gz"
    whole = gzip.compress(b'{"a": 1}\n{"a": 2}\n')
    assert _read(path, whole) == [("1", {"a": 1}), ("2", {"a": 2})]
    assert _read(tmp_path / "rows.csv.gz", gzip.compress(b"a,b\n1,2\n")) == [("2", {"a": "1", "b": "2"})]
    for raw in (whole[:-9], whole[:12], b"plain text\n", whole[:15] + b"\0\0\0" + whole[18:]):
        with pytest.raises(DataError, match="is a damaged gzip file, or none"):
            _read(path, raw)
    assert _read(path, b"") == []


def test_a_gzip_bomb_is_not_unpacked(tmp_path, monkeypatch):
    monkeypatch.setattr(rows, "_BOMB", 1 << 20)
    line = b'{"a": "' + b"x" * 1000 + b'"}\n'
    with pytest.raises(DataError, match="too large to be a row, or to be a dataset"):
        _read(tmp_path / "rows.jsonl.gz", gzip.compress(line * 5000))
    monkeypatch.setattr(rows, "_LONGEST", 500)
    with pytest.raises(DataError, match=r"rows\.jsonl:1: too large"):
        _read(tmp_path / "rows.jsonl", line)


def test_a_folder_and_a_glob_are_all_their_files(tmp_path):
    folder = tmp_path / "d\N{LATIN SMALL LETTER A WITH DIAERESIS} ta[1]"
    folder.mkdir()
    for name, text in (("b.jsonl", '{"a": 2}'), ("a.ndjson", '{"a": 1}'), (".hidden.jsonl", "x"), ("README.md", "x")):
        (folder / name).write_text(text)
    names = [("a.ndjson:1", {"a": 1}), ("b.jsonl:1", {"a": 2})]

    def read(source):
        return [(record.where.rpartition("/")[2], record.value) for record in records(resolve(source))]

    assert read(str(folder)) == names
    assert read(str(tmp_path / "d*" / "*.*json*")) == names
    assert read(str(folder / "b.jsonl")) == names[1:]
    with pytest.raises(DataError, match=r"README\.md: unknown kind of file"):
        resolve(str(tmp_path / "d*" / "*"))
    for name, said in (("more.xlsx", "is no data file, and"), ("sub", "is a folder, and")):
        (folder / name).mkdir() if name == "sub" else (folder / name).write_bytes(b"PK")
        with pytest.raises(DataError, match=said):
            resolve(str(folder))
        (folder / name).rmdir() if name == "sub" else (folder / name).unlink()


@pytest.mark.parametrize(
    ("name", "raw", "said", "remedy"),
    [
        (
            "a.csv",
            "prompt;completion\nä;b\nö;„c“\n".encode("cp1252"),
            "a.csv:2: not UTF-8; it looks like cp1252 (Windows)",
            "CSV UTF-8",
        ),
        (
            "a.jsonl",
            '{"a": "ä"}\n{"a": "ö"}\n'.encode("latin-1"),
            "a.jsonl:1: not UTF-8; it looks like cp1252 (Windows)",
            "as UTF-8",
        ),
        ("a.jsonl", b'{"a": "\x81"}\n{"a": "\x8d"}\n', "a.jsonl:1: not UTF-8", "as UTF-8"),
        ("a.csv", "prompt,completion\na,b\n".encode("utf-16-le"), "a.csv looks like UTF-16 text", "as UTF-8"),
    ],
)
def test_another_encoding_is_one_line(tmp_path, name, raw, said, remedy):
    with pytest.raises(DataError) as caught:
        _read(tmp_path / name, raw)
    assert caught.value.message == f"{tmp_path}/{said}"
    assert remedy in caught.value.remedy


def test_a_single_word_may_be_a_configuration(monkeypatch):
    datasets = pytest.importorskip("datasets")

    def load(name, config=None, *, revision, split):
        if config is None:
            raise ValueError("Config name is missing. Please pick one among the available configs: ['easy', 'hard']")
        return [{"config": config, "split": split}]

    monkeypatch.setattr(datasets, "load_dataset", load)
    monkeypatch.setattr(datasets, "get_dataset_config_names", lambda name, revision: ["easy", "hard"])
    assert [one.value for one in records(resolve("hub:a/b:easy"))] == [{"config": "easy", "split": "train"}]
    assert [one.value for one in records(resolve("hub:a/b:hard:test"))] == [{"config": "hard", "split": "test"}]
    with pytest.raises(DataError) as caught:
        list(records(resolve("hub:a/b")))
    assert caught.value.message == "hub:a/b has several configurations: easy, hard"
