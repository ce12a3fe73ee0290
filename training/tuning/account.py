"""The account of a dataset: what became of each key and text of its rows, the same table in ``data``, ``train``, notebook 1 and the report."""

from collections import Counter
from collections.abc import Sequence
from typing import Any

from training.datasets.dataset import Dataset
from training.tuning.prepare import Prepared

_SHOWN = 50


def account(files: Sequence[Dataset], prepared: Sequence[Prepared] = ()) -> dict[str, Any]:
    """``table``: {"what", "became", "rows"} of each key and text; ``refused``: how many rows; ``refusals``: the first, with reasons."""
    counts: Counter[tuple[str, str]] = Counter()
    for dataset in files:
        counts.update({(key, fate): rows for key, fate, rows in dataset.keys})
    for one in prepared:
        for row, example in one.pairs:
            counts.update((key, "not in the prompt") for key in set(example.unused) - set(row.unused))
        counts["control tokens in texts", "neutralised"] += one.neutralised
        counts["rows longer than the maximum", "left out"] += len(one.too_long)
    refused = [one for dataset in files for one in dataset.refused] + [one for part in prepared for one in part.refused]
    counts["rows", "refused"] += len(refused)
    return {
        "table": [{"what": what, "became": fate, "rows": rows} for (what, fate), rows in counts.items() if rows],
        "refused": len(refused),
        "refusals": [[one.where, one.reason] for one in refused[:_SHOWN]],
    }


def told(found: dict[str, Any]) -> list[str]:
    """An account as lines for a log: one for each fate, then each refusal that is known."""
    by_fate: dict[str, list[str]] = {}
    for row in found["table"]:
        by_fate.setdefault(row["became"], []).append(f"{row['what']} ({row['rows']})")
    refused = [f"refused: {where}: {reason}" for where, reason in found["refusals"]]
    return [*(f"{fate}: {', '.join(keys)}" for fate, keys in by_fate.items()), *refused]
