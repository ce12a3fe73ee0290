"""The certificate's charts, drawn as the report's others: intervals by field, divergence, error by tensor."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

from pipeline.charts import PALETTE, Canvas

_BINS = tuple(range(-9, 2))  # powers of ten of the divergence, in nats


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
    canvas.axes.set_ylim(len(fields) - 0.4, -0.6)
    canvas.axes.set_xlim(-3, 103)
    canvas.axes.set_xticks([0, 25, 50, 75, 100])
    canvas.axes.set_xlabel("% of held-out rows, band: 95 % interval")
    canvas.axes.grid(axis="x", color=PALETTE["grid"], linewidth=0.8)
    canvas.legend()
    return canvas.svg()


def divergence(series: Mapping[str, Sequence[float]]) -> str:
    """Histogram of the divergence by position, one line a comparison, on a logarithmic axis; '' without a value."""
    drawn = {name: values for name, values in series.items() if values}
    if not drawn:
        return ""
    canvas = Canvas("divergence", "Divergence from the in-process model, by position", 3.6)
    colours = [PALETTE["after"], PALETTE["second"], PALETTE["before"], PALETTE["ink"]]
    for (name, values), colour in zip(drawn.items(), colours, strict=False):
        counts = _histogram(values)
        shares = [100 * count / len(values) for count in counts]
        canvas.axes.step([*_BINS, _BINS[-1] + 1], [*shares, shares[-1]], where="post", color=colour, linewidth=2, label=name)
    canvas.axes.set_xticks(_BINS[::2], [f"1e{power}" for power in _BINS[::2]])
    canvas.axes.set_xlabel("KL divergence in nats (leftmost: that or less)")
    canvas.axes.set_ylabel("% of positions")
    canvas.axes.set_ylim(bottom=0)
    canvas.axes.grid(axis="y", color=PALETTE["grid"], linewidth=0.8)
    canvas.legend()
    return canvas.svg()


def _histogram(values: Sequence[float]) -> list[int]:
    counts = [0] * len(_BINS)
    for value in values:
        power = math.floor(math.log10(value)) if value > 0 else _BINS[0]
        counts[min(max(power, _BINS[0]), _BINS[-1]) - _BINS[0]] += 1
    return counts


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
    canvas.axes.set_xlabel("tensor, in file order")
    canvas.axes.set_ylabel("error / bound")
    canvas.legend()
    return canvas.svg()
