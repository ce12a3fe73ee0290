"""The SOC alert-triage set: a deterministic generator over the tables in ``training/data/soc_tables.json``.

``python -m benchmarks.soc_data`` writes ``soc_train.jsonl`` and ``soc_eval.jsonl`` there; ``--check`` verifies that the
committed files are what this generator makes. The labelling rules are written out in the tables under ``rules``.
"""

import json
import random
import sys
from pathlib import Path
from typing import Any

from pipeline.errors import DataError
from pipeline.runs.files import read_object, write_atomic
from training.datasets.dataset import SOC_EVAL, SOC_TRAIN

FOLDER = SOC_TRAIN.parent
TRAIN, EVAL = SOC_TRAIN, SOC_EVAL

SEED = 20261
TRAIN_ROUNDS = 50
EVAL_ROUNDS = 12
BENIGN_PER_ROUND = 3
# of the rows a modifier fits, this share carries it
BLOCKED_SHARE = 0.12
CONTROLLER_SHARE = 0.15
# held-out rows whose wording was never seen in training
UNSEEN_SHARE = 0.15
# a row stays near 80 tokens, so that a CPU trains on the whole set in minutes
MAX_CHARACTERS = 78

Table = dict[str, Any]


def tables() -> Table:
    """The committed tables: techniques, wordings, hosts, users and the labelling rules."""
    return read_object(FOLDER / "soc_tables.json")


def normalise(prompt: str) -> str:
    """A prompt with case and white space folded, the form in which two prompts count as the same."""
    return " ".join(prompt.lower().split())


def generate(table: Table | None = None) -> tuple[list[Table], list[Table]]:
    """All training and held-out rows, in committed order.

    Both come in rounds holding every technique once and ``BENIGN_PER_ROUND`` benign alerts, so any prefix is balanced.
    """
    table = table or tables()
    seen: set[str] = set()
    # the held-out rows are drawn first: training is then free to be any length without changing them
    held_out = _rounds(table, random.Random(SEED), EVAL_ROUNDS, seen, unseen=UNSEEN_SHARE)
    train = _rounds(table, random.Random(SEED + 1), TRAIN_ROUNDS, seen, unseen=0.0)
    return train, held_out


def _rounds(table: Table, rng: random.Random, count: int, seen: set[str], unseen: float) -> list[Table]:
    rows = []
    for _ in range(count):
        one = [*table["techniques"], *[None] * BENIGN_PER_ROUND]
        rng.shuffle(one)
        rows += [_row(table, technique, rng, seen, unseen) for technique in one]
    return rows


def _row(table: Table, technique: Table | None, rng: random.Random, seen: set[str], unseen: float) -> Table:
    for _ in range(1000):
        which = "held_out" if rng.random() < unseen else "train"
        alert, answer = _benign(table, rng, which) if technique is None else _threat(table, technique, rng, which)
        if len(alert) <= MAX_CHARACTERS and normalise(alert) not in seen:
            seen.add(normalise(alert))
            contents = {"system": table["system"], "user": alert, "assistant": json.dumps(answer, separators=(",", ":"))}
            return {"messages": [{"role": role, "content": content} for role, content in contents.items()]}
    raise DataError(f"soc_tables.json has too few wordings for {technique['id'] if technique else 'benign'}")


def _threat(table: Table, technique: Table, rng: random.Random, which: str) -> tuple[str, Table]:
    """One alert of a technique, with at most one of the two severity modifiers, and its labels."""
    answer = {"severity": technique["severity"], "technique": technique["id"]}
    answer |= {"verdict": technique["verdict"], "action": technique["action"]}
    text = _text(technique, rng, which)
    draw = rng.random()
    if technique["on_dc"] and draw < CONTROLLER_SHARE:
        text = f"{text} {_fill(table, rng.choice(table['domain_controller'][which]), rng)}"
        answer |= {"severity": "critical", "action": "escalate"}
    else:
        text = f"{text} {_fill(table, rng.choice(technique['places']), rng)}"
        if draw > 1 - BLOCKED_SHARE:
            text = rng.choice(table["blocked"][which]).format(text=text)
            answer |= {"severity": "low", "action": "monitor"}
    return _lay_out(table, technique["sources"], text, rng, which), answer


def _benign(table: Table, rng: random.Random, which: str) -> tuple[str, Table]:
    """Either routine activity, or a technique inside an authorised test; both say so in words."""
    answer = {"severity": "low", "technique": "none", "verdict": "benign", "action": "close_alert"}
    if rng.random() < 0.5:
        benign = table["benign"]
        text = f"{rng.choice(benign[which])} {_fill(table, rng.choice(benign['places']), rng)}"
        return _lay_out(table, benign["sources"], text, rng, which), answer
    technique = rng.choice([t for t in table["techniques"] if t["approvable"]])
    text = f"{_text(technique, rng, which)} {_fill(table, rng.choice(technique['places']), rng)}"
    text = rng.choice(table["approved"][which]).format(text=text)
    return _lay_out(table, technique["sources"], text, rng, which), answer


def _text(technique: Table, rng: random.Random, which: str) -> str:
    return str(rng.choice(technique[which])).format(tool=rng.choice(technique["tool"]))


def _fill(table: Table, place: str, rng: random.Random) -> str:
    """A place with its host, web server, domain controller and user drawn from the tables and numbered 1 to 9."""
    names = {kind: f"{rng.choice(table[kind])}{rng.randint(1, 9)}" for kind in ("host", "web", "dc", "user")}
    return place.format(**names)


def _lay_out(table: Table, sources: list[str], text: str, rng: random.Random, which: str) -> str:
    return str(rng.choice(table["layouts"][which])).format(source=rng.choice(sources), alert=text)


def lines(rows: list[Table]) -> str:
    """Rows as JSON Lines, the exact text of the committed files."""
    return "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows)


def check() -> list[Path]:
    """The committed files that differ from what the generator makes; empty when all agree."""
    made = dict(zip((TRAIN, EVAL), map(lines, generate()), strict=True))
    return [path for path, text in made.items() if not path.is_file() or path.read_text(encoding="utf-8") != text]


def main(arguments: list[str]) -> int:
    """Write the two files, or with ``--check`` compare them; 0 when they are right afterwards."""
    if "--check" not in arguments:
        for path, rows in zip((TRAIN, EVAL), generate(), strict=True):
            write_atomic(path, lines(rows))
    different = check()
    for path in different:
        sys.stderr.write(f"{path} differs from the generator's output; run: python -m benchmarks.soc_data\n")
    return 1 if different else 0


if __name__ == "__main__":
    raise SystemExit(main(sys.argv[1:]))
