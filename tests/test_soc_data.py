import json
import re
from collections import Counter

import pytest

from benchmarks import soc_data as soc
from pipeline.errors import DataError
from training.datasets.dataset import load, overlap

BENIGN = re.compile(
    r"\b(?:approved|authorised|scheduled (?:backup|patch|vulnerability)|nightly|routine|eicar|planned|once|expected)\b"
)


@pytest.fixture(scope="module")
def made():
    return soc.generate()


def _alert(row):
    return row["messages"][1]["content"]


def _answer(row):
    return json.loads(row["messages"][2]["content"])


def test_committed_files_are_what_the_generator_makes():
    assert soc.check() == []


def test_check_names_a_file_that_differs(monkeypatch, tmp_path, capsys):
    edited = tmp_path / "soc_train.jsonl"
    edited.write_text(soc.TRAIN.read_text(encoding="utf-8").replace("LockBit", "Lockbit", 1), encoding="utf-8")
    monkeypatch.setattr(soc, "TRAIN", edited)
    assert soc.main(["--check"]) == 1
    assert capsys.readouterr().err == f"{edited} differs from the generator's output; run: python -m benchmarks.soc_data\n"


def test_writing_repairs_a_missing_file(monkeypatch, tmp_path):
    monkeypatch.setattr(soc, "TRAIN", tmp_path / "train.jsonl")
    monkeypatch.setattr(soc, "EVAL", tmp_path / "eval.jsonl")
    assert soc.main(["--check"]) == 1
    assert soc.main([]) == 0
    assert soc.main(["--check"]) == 0


def test_sizes_and_row_shape(made):
    train, held_out = made
    assert (len(train), len(held_out)) == (850, 204)
    for row in train + held_out:
        assert [m["role"] for m in row["messages"]] == ["system", "user", "assistant"]
        assert list(_answer(row)) == ["severity", "technique", "verdict", "action"]
        assert len(_alert(row)) <= soc.MAX_CHARACTERS
        assert "{" not in _alert(row)


def test_no_prompt_appears_twice(made):
    prompts = [soc.normalise(_alert(row)) for rows in made for row in rows]
    assert len(set(prompts)) == len(prompts) == 1054
    assert overlap(load(soc.TRAIN).rows, load(soc.EVAL).rows) == []


def test_every_round_holds_every_technique_once_and_three_benign_alerts(made):
    ids = sorted(t["id"] for t in soc.tables()["techniques"])
    assert len(set(ids)) == 14
    for rows in made:
        for start in range(0, len(rows), 17):
            assert sorted(_answer(row)["technique"] for row in rows[start : start + 17]) == ids + ["none"] * 3


def test_labels_follow_the_written_rules(made):
    techniques = {t["id"]: t for t in soc.tables()["techniques"]}
    for row in made[0] + made[1]:
        alert, answer = _alert(row).lower(), _answer(row)
        benign = BENIGN.search(alert)
        if answer["technique"] == "none":
            assert benign, alert
            assert answer == {"severity": "low", "technique": "none", "verdict": "benign", "action": "close_alert"}
            continue
        assert not benign, alert
        known = techniques[answer["technique"]]
        severity, action = known["severity"], known["action"]
        if "blocked" in alert:
            severity, action = "low", "monitor"
        if "domain controller" in alert:
            severity, action = "critical", "escalate"
        assert (answer["severity"], answer["verdict"], answer["action"]) == (severity, known["verdict"], action), alert


def test_an_alert_is_blocked_or_on_a_domain_controller_never_both(made):
    alerts = [_alert(row).lower() for rows in made for row in rows]
    assert not [a for a in alerts if "blocked" in a and "domain controller" in a]
    assert sum("blocked" in a for a in alerts) > 50
    assert sum("domain controller" in a for a in alerts) > 50


def test_held_out_has_wordings_training_never_saw(made):
    train, held_out = made
    layout = re.compile(r"^\[\w")
    unseen = [row for row in held_out if layout.search(_alert(row))]
    assert not [row for row in train if layout.search(_alert(row))]
    assert 0.10 <= len(unseen) / len(held_out) <= 0.20


def test_no_wording_is_in_both_lists():
    table = soc.tables()
    for part in [*table["techniques"], table["benign"], table["layouts"], table["blocked"], table["approved"]]:
        assert not set(part["train"]) & set(part["held_out"])


def test_each_wording_and_tool_is_used(made):
    alerts = " | ".join(_alert(row) for rows in made for row in rows)
    for technique in soc.tables()["techniques"]:
        assert all(tool in alerts for tool in technique["tool"]), technique["id"]


def test_verdicts_are_mixed(made):
    share = Counter(_answer(row)["verdict"] for row in made[0])
    assert {verdict: round(count / 850, 2) for verdict, count in share.items()} == {
        "malicious": 0.71,
        "benign": 0.18,
        "suspicious": 0.12,
    }


def test_tables_too_small_is_a_clear_error():
    table = soc.tables()
    one = next(t for t in table["techniques"] if t["id"] == "T1003")
    few = {"train": ["x"], "held_out": ["x"], "places": ["y"], "on_dc": False, "approvable": True}
    small = table | {"techniques": [one | few], "layouts": {"train": ["{alert}"], "held_out": ["{alert}"]}}
    with pytest.raises(DataError, match=r"soc_tables\.json has too few wordings for T1003"):
        soc.generate(small)
