"""The account of a dataset: what became of each key and text of its rows, the same table in ``data``, ``train`` and notebook 1."""

from collections import Counter
from collections.abc import Iterable
from typing import Any

from training.datasets.dataset import Dataset
from training.tuning.prepare import Prepared

_SHOWN = 50


def account(files: Iterable[Dataset], prepared: Iterable[Prepared] = ()) -> dict[str, Any]:
    """``keys``: (key, fate, rows) of the files; ``neutralised``: rows; ``refused``: how many, and the first with their reasons."""
    files, prepared = list(files), list(prepared)
    counts: Counter[tuple[str, str]] = Counter()
    for dataset in files:
        for key, fate, rows in dataset.keys:
            counts[key, fate] += rows
    for one in prepared:
        for row, example in one.pairs:
            counts.update((key, "not in the prompt") for key in set(example.unused) - set(row.unused))
    refused = [one for dataset in files for one in dataset.refused] + [one for part in prepared for one in part.refused]
    return {
        "keys": [[key, fate, rows] for (key, fate), rows in counts.items()],
        "neutralised": sum(one.neutralised for one in prepared),
        "too_long": sum(len(one.too_long) for one in prepared),
        "refused": len(refused),
        "refusals": [[one.where, one.reason] for one in refused[:_SHOWN]],
    }


def table(found: dict[str, Any]) -> list[dict[str, Any]]:
    """An account as rows of a table: what, what became of it, in how many rows."""
    rows = [{"what": key, "became": fate, "rows": count} for key, fate, count in found["keys"]]
    for what, became in (("neutralised", "control tokens written as text"), ("too_long", "left out"), ("refused", "left out")):
        if found[what]:
            rows.append({"what": f"rows {what.replace('_', ' ')}", "became": became, "rows": found[what]})
    return rows


def told(found: dict[str, Any]) -> list[str]:
    """An account as lines for a log: one for each fate, then each refusal that is known."""
    by_fate: dict[str, list[str]] = {}
    for row in table(found):
        by_fate.setdefault(row["became"], []).append(f"{row['what']} ({row['rows']})")
    refused = [f"left out: {where}: {reason}" for where, reason in found["refusals"]]
    return [*(f"{fate}: {', '.join(keys)}" for fate, keys in by_fate.items()), *refused]
