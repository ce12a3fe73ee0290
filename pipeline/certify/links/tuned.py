"""Link 5: the tuned model is not the base - held-out scores with intervals, per field and per class, and canary answers."""

import math
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from pipeline.report.check import Check, held, skipped
from pipeline.verify.score import Answer, HeldOut, calls_right, exactly, field_right, fields_of, parse, same, wilson

_RESAMPLES = 2000
_LEVEL = 0.95
_SEED = 20261
_MOST_CLASSES = 20
_SMALLEST_CLASS = 5
# canary prompts that a near-tie may answer as the base does
_BASE_SHARE = 0.02
# canary prompts answered as the tuned model answers in process
_CANARY_SHARE = 0.25
_BOOTSTRAP = "95 % bootstrap interval over the held-out rows, 2000 resamples"


@dataclass(frozen=True)
class Interval:
    """A mean over rows and its 95 % interval."""

    mean: float
    low: float
    high: float

    def __str__(self) -> str:
        return f"{self.mean:.1%} ({self.low:.1%} to {self.high:.1%})"


def interval(values: Sequence[float]) -> Interval:
    """The mean of at least one value (0 or 1 a row, or paired differences) and its 95 % interval; the seed is fixed."""
    import numpy as np

    sample = np.asarray(values, dtype=np.float64)
    chosen = np.random.default_rng(_SEED).integers(0, len(sample), (_RESAMPLES, len(sample)))
    low, high = np.quantile(sample[chosen].mean(axis=1), [(1 - _LEVEL) / 2, (1 + _LEVEL) / 2])
    return Interval(float(sample.mean()), float(low), float(high))


def check_scores(rows: Sequence[HeldOut], base: Sequence[Answer | None], tuned: Sequence[Answer]) -> list[Check]:
    """Scores before and after, by field and by class, in the rows that both were asked (None: the base was not); a class that
    got worse is named.
    """
    if not rows:
        return [skipped("tuned.scores", "no held-out rows")]
    every, both = (rows, tuned), [i for i, answer in enumerate(base) if answer is not None]
    fields = fields_of(rows)
    rows, sides = [rows[i] for i in both], ([one for one in base if one is not None], [tuned[i] for i in both])
    measures = {name: [field_right(name, rows, answers) for answers in sides] for name in fields}
    called = any(row.calls for row in rows)
    if called:
        measures["calls"] = [calls_right(rows, answers) for answers in sides]
    measures["exact"] = [exactly(rows, answers, every[0]) for answers in sides]
    if not fields and not called and not any(map(any, measures["exact"])):
        reason = "no score for free text: no answer is the expected one word for word, before or after; see the distributions"
        return [skipped("tuned.scores", reason), _classes(rows, measures, fields)]
    before, after = map(interval, measures["exact"])
    gain = interval([b - a for a, b in zip(*measures["exact"], strict=True)])
    table = {name: _sides(*pair) for name, pair in measures.items()}
    figure, bound = f"exact {before} before, {after} after, {len(rows)} rows", "not worse: the interval of the gain reaches 0"
    wilson_base, asked = wilson(before.mean, len(rows)), {"before": len(rows), "after": len(every[0])}
    if len(rows) < len(every[0]):
        figure += f", a sample that both answered; {interval(exactly(*every))} after in all {len(every[0])}"
    scores = held("tuned.scores", gain.high >= 0, figure, bound, _BOOTSTRAP, fields=table, asked=asked, before_wilson=wilson_base)
    return [scores, _classes(rows, measures, fields)]


def _sides(before: Sequence[bool], after: Sequence[bool]) -> dict[str, Any]:
    sides = {"before": interval(before), "after": interval(after)}
    return {when: [round(number, 4) for number in (one.mean, one.low, one.high)] for when, one in sides.items()}


def _classes(rows: Sequence[HeldOut], measures: dict[str, list[list[bool]]], fields: Sequence[str]) -> Check:
    """Each value of each field as a class: the share of its rows with that field right, before and after."""
    table, worse = [], []
    for name in fields:
        values = [str((parse(row.answer) or {}).get(name)) for row in rows if not row.calls]
        counts = Counter(values)
        if len(counts) > _MOST_CLASSES:
            continue
        for value, count in counts.most_common():
            mine = [i for i, other in enumerate(values) if other == value]
            before, after = ([side[i] for i in mine] for side in measures[name])
            gain = interval([b - a for a, b in zip(before, after, strict=True)])
            table.append({"field": name, "value": value, "n": count, **_sides(before, after)})
            worse += [f"{name}={value} ({count} rows)"] if count >= _SMALLEST_CLASS and gain.high < 0 else []
    if not table:
        return skipped("tuned.classes", "the answers have no field with few enough values to be classes")
    lowest = min(table, key=lambda row: row["after"][0])
    figure = f"{len(table)} classes; weakest after: {lowest['field']}={lowest['value']} {lowest['after'][0]:.1%} of {lowest['n']}"
    figure += f"; worse than before: {', '.join(worse)}" if worse else ""
    bound = "no class worse: each interval of the gain reaches 0"
    return held("tuned.classes", not worse, figure, bound, _BOOTSTRAP, classes=table)


def canaries(rows: Sequence[HeldOut], base: Sequence[Answer | None], tuned: Sequence[Answer]) -> list[int]:
    """Prompts to which the base and the tuned model say different things in process: they tell the two apart."""
    return [i for i, (row, a, b) in enumerate(zip(rows, base, tuned, strict=True)) if a is not None and not same(row, a, b)]


def check_canaries(rows: Sequence[HeldOut], base: Sequence[Answer | None], tuned: Sequence[Answer]) -> Check:
    """There are prompts that tell base and tuned apart."""
    found = canaries(rows, base, tuned)
    asked = sum(answer is not None for answer in base)
    figure = f"{len(found)} of {asked} held-out prompts answered differently from the base"
    return held("tuned.canaries", bool(found), figure, "at least 1", "an identical model was not tuned")


def check_served_canaries(
    engine: str, rows: Sequence[HeldOut], base: Sequence[Answer | None], tuned: Sequence[Answer], answers: Sequence[Answer | None]
) -> Check:
    """On the canary prompts among those that it was asked (None: not asked), a backend answers as the tuned model, not as the base."""
    asked = {i: said for i in canaries(rows, base, tuned) if (said := answers[i]) is not None}
    if not asked:
        return skipped(f"tuned.{engine}", "no canary prompt was asked")
    like_tuned = sum(same(rows[i], said, tuned[i]) for i, said in asked.items())
    like_base = sum(same(rows[i], said, before) for i, said in asked.items() if (before := base[i]) is not None)
    most = max(1, math.floor(_BASE_SHARE * len(asked)))  # among few short labels a tipped near-tie lands on the base's
    ok = like_base <= most and like_base < len(asked) and like_tuned >= _CANARY_SHARE * len(asked)
    figure = f"of {len(asked)} canary prompts {like_tuned} answered as the tuned model in process, {like_base} as the base"
    bound = f"at least {_CANARY_SHARE:.0%} as tuned, at most {most} as the base"
    return held(f"tuned.{engine}", ok, figure, bound, "near-ties may tip by rounding; see bounds")
