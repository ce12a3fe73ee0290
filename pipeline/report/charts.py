"""The charts of the report and of the certificate in it, each an ``<svg>`` element, or '' where there is nothing to draw."""

import itertools
import math
from collections import Counter
from collections.abc import Mapping, Sequence
from typing import Any

from pipeline.report.canvas import PALETTE, Canvas
from pipeline.report.phrases import words
from pipeline.report.schema import Backend, Point

_MAX_POINTS = 500
_SMOOTH_FROM = 120  # log entries; a shorter history is readable as it is
_BINS = tuple(range(-9, 2))  # powers of ten of the divergence, in nats


def loss_curve(history: Sequence[Point]) -> str:
    """Training loss by step (with its moving mean, when noisy) and held-out loss; '' without two points of either."""
    steps = [(p.step, p.loss) for p in history if p.loss is not None]
    held_out = [(p.step, p.eval_loss) for p in history if p.eval_loss is not None]
    if len(steps) < 2 and len(held_out) < 2:
        return ""
    canvas = Canvas("loss", "Loss by training step", 4.0)
    axes = canvas.axes
    if len(steps) >= 2:
        noisy = len(steps) > _SMOOTH_FROM
        colour, width = (PALETTE["before"], 1.0) if noisy else (PALETTE["after"], 2.0)
        axes.plot(*zip(*_thin(steps), strict=True), label="training", color=colour, linewidth=width)
        if noisy:
            half = len(steps) // 60
            smooth = list(zip([s for s, _ in steps], _centred_mean([y for _, y in steps], half), strict=True))
            label = f"training, mean of {2 * half + 1} entries"
            axes.plot(*zip(*_thin(smooth), strict=True), color=PALETTE["after"], linewidth=2.2, label=label)
    if held_out:
        canvas.points(_thin(held_out), "held-out", "held-out loss {y:.3f} at step {x}")
    axes.margins(y=0.08)
    axes.set_ylim(bottom=0)
    return canvas.svg("step", "loss", grid="y")


def before_after(before: Mapping[str, float], after: Mapping[str, float]) -> str:
    """Share of held-out rows right by field, before and after fine-tuning; '' without a field."""
    names = [name for name in after if name in before]
    if not names:
        return ""
    canvas = Canvas("scores", "Held-out rows right, by field, before and after fine-tuning", 1.1 + 0.42 * len(names))
    before_rows = [(words(name), before[name] * 100, f"{words(name)}, before: {before[name]:.1%}") for name in names]
    after_rows = [(words(name), after[name] * 100, f"{words(name)}, after: {after[name]:.1%}") for name in names]
    canvas.bars(before_rows, "before", "before fine-tuning", -0.19)
    canvas.bars(after_rows, "after", "after fine-tuning", 0.19)
    canvas.axes.set(xlim=(0, 112), xticks=[0, 25, 50, 75, 100])
    return canvas.svg("% of held-out rows")


def latency(backends: Sequence[Backend]) -> str:
    """Time to first token by backend, median and 95th percentile, in milliseconds; '' when none was measured."""
    measured = [(b.shown, b.ttft_ms) for b in backends if b.ttft_ms is not None]
    if not measured:
        return ""
    canvas = Canvas("ttft", "Time to first token by backend", 1.3 + 0.62 * len(measured))
    half = [(name, t.p50, f"{name}: median {t.p50:.0f} ms") for name, t in measured]
    tail = [(name, t.p95, f"{name}: 95th percentile {t.p95:.0f} ms") for name, t in measured]
    canvas.bars(half, "after", "median", -0.19)
    canvas.bars(tail, "before", "95th percentile", 0.19)
    canvas.axes.set_xlim(0, max(t.p95 for _, t in measured) * 1.18 or 1)
    return canvas.svg("milliseconds, less is better")


def throughput(backends: Sequence[Backend]) -> str:
    """Generated tokens per second by backend; '' when none was measured."""
    measured = [(b.shown, b.tokens_per_second) for b in backends if b.tokens_per_second is not None]
    if not measured:
        return ""
    canvas = Canvas("throughput", "Generated tokens per second by backend", 1.3 + 0.62 * len(measured))
    canvas.bars([(name, rate, f"{name}: {rate:.1f} tokens/s") for name, rate in measured], "after", "all requests together", 0.0)
    canvas.axes.set_xlim(0, max(rate for _, rate in measured) * 1.18 or 1)
    return canvas.svg("tokens per second, more is better")


def intervals(fields: Mapping[str, Mapping[str, Sequence[float]]]) -> str:
    """Share of held-out rows right by field, before and after, each with its 95 % interval; '' without a field."""
    if not fields:
        return ""
    canvas = Canvas("intervals", "Held-out rows right by field, with 95 % intervals", 1.1 + 0.42 * len(fields))
    for role, offset in (("before", -0.17), ("after", 0.17)):
        rows = [(name, [value * 100 for value in sides[role]]) for name, sides in fields.items()]
        for i, (_, (mean, low, high)) in enumerate(rows):
            canvas.axes.plot([low, high], [i + offset] * 2, color=PALETTE[role], linewidth=5, solid_capstyle="butt", alpha=0.55)
            label = f"{role} fine-tuning" if i == 0 else None
            canvas.mark(mean, i + offset, PALETTE[role], f"{rows[i][0]}, {role}: {mean:.1f} % ({low:.1f} to {high:.1f})", label)
    canvas.axes.set_yticks(range(len(fields)), [name.replace("_", " ")[:22] for name in fields], color=PALETTE["ink"])
    canvas.axes.set(ylim=(len(fields) - 0.4, -0.6), xlim=(-3, 103), xticks=[0, 25, 50, 75, 100])
    return canvas.svg("% of held-out rows, band: 95 % interval", grid="x")


def divergence(series: Mapping[str, Sequence[float]]) -> str:
    """Histogram of the divergence by position, one line a comparison, on a logarithmic axis; '' without a value."""
    drawn = {name: values for name, values in series.items() if values}
    if not drawn:
        return ""
    canvas = Canvas("divergence", "Divergence from the in-process model, by position", 3.6)
    colours = [PALETTE["after"], PALETTE["second"], PALETTE["before"], PALETTE["ink"]]
    for (name, values), colour in zip(drawn.items(), colours, strict=False):
        powers = (math.floor(math.log10(value)) if value > 0 else _BINS[0] for value in values)
        counts = Counter(min(max(power, _BINS[0]), _BINS[-1]) for power in powers)
        shares = [100 * counts[power] / len(values) for power in _BINS]
        canvas.axes.step([*_BINS, _BINS[-1] + 1], [*shares, shares[-1]], where="post", color=colour, linewidth=2, label=name)
    canvas.axes.set_xticks(_BINS[::2], [f"1e{power}" for power in _BINS[::2]])
    canvas.axes.set_ylim(bottom=0)
    return canvas.svg("KL divergence in nats (leftmost: that or less)", "% of positions", grid="y")


def tensor_errors(series: Mapping[str, Sequence[Sequence[Any]]]) -> str:
    """Largest error of each tensor as a share of its bound, in file order; those above it are named; '' without one."""
    drawn = {name: errors for name, errors in series.items() if errors}
    if not drawn:
        return ""
    canvas = Canvas("tensors", "Largest error by tensor, as a share of the bound", 3.2)
    highest = 1.0
    for (name, errors), colour in zip(drawn.items(), (PALETTE["after"], PALETTE["second"]), strict=False):
        ratios = [min(float(ratio), 1e6) if ratio is not None else 1e6 for _, ratio in errors]
        highest = max(highest, *ratios)
        canvas.axes.plot(range(len(ratios)), ratios, ".", color=colour, markersize=4, label=name)
        for i, ratio in enumerate(ratios):
            if ratio > 1:
                canvas.mark(i, ratio, colour, f"{name}, {errors[i][0]}: {ratio:.3g} of the bound")
    canvas.axes.axhline(1, color=PALETTE["ink"], linewidth=1, linestyle=(0, (4, 3)))
    if highest > 2:
        canvas.axes.set_yscale("log")
    else:
        canvas.axes.set_ylim(0, 1.15)
    return canvas.svg("tensor, in file order", "error / bound")


def _centred_mean(values: Sequence[float], half: int) -> list[float]:
    sums = [0.0, *itertools.accumulate(values)]
    ends = [(max(0, i - half), min(len(values), i + half + 1)) for i in range(len(values))]
    return [(sums[end] - sums[start]) / (end - start) for start, end in ends]


def _thin(points: Sequence[tuple[int, float]]) -> list[tuple[int, float]]:
    """Every k-th point and the last one, so that a long run does not make a huge page."""
    if len(points) <= _MAX_POINTS:
        return list(points)
    stride = -(-len(points) // _MAX_POINTS)
    return [*points[::stride], *points[-1:]]
