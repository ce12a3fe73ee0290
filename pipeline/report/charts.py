"""The charts of the report and of the certificate in it, each an ``<svg>`` element, or '' where there is nothing to draw.

A chart is matplotlib's drawing, restyled so that the page's CSS colours it: colours become classes (light, dark and print
follow the page), style attributes become presentation attributes (the page's content security policy allows none), ids get a
prefix (several charts share one page), and marks carry ``<title>`` tooltips.
"""

from __future__ import annotations

import io
import itertools
import math
import re
import warnings
from collections import Counter
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any, Literal
from xml.etree import ElementTree

from pipeline.report.phrases import words
from pipeline.report.schema import Backend, Point
from pipeline.runs.text import visible

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

# role -> colour on white; templates/report.css holds the dark ones under the same names
PALETTE = {"ink": "#1c2530", "muted": "#5a6674", "grid": "#dfe4ea", "before": "#8d99a8", "after": "#1d5fd1", "second": "#c2571a"}
_ROLE = {colour: role for role, colour in PALETTE.items()}
_RC = {"svg.fonttype": "none", "svg.hashsalt": "granite-pipeline", "text.parse_math": False, "font.size": 10.5}
_WIDTH = 5.4  # inches; 72 SVG units each, so that text stays readable when a phone shrinks the chart to 350 pixels
_STYLE = {"fill", "fill-opacity", "stroke", "stroke-width", "stroke-dasharray", "stroke-dashoffset", "stroke-linecap"}
_STYLE |= {"stroke-linejoin", "stroke-opacity", "opacity", "font-size", "font-weight", "text-anchor"}
_MAX_POINTS = 500
_SMOOTH_FROM = 120  # log entries; a shorter history is readable as it is
_BINS = tuple(range(-9, 2))  # powers of ten of the divergence, in nats


class Canvas:
    """One figure with the report's plain axes, no pyplot state, and the tooltip of each mark."""

    def __init__(self, prefix: str, label: str, height: float) -> None:
        import matplotlib
        from matplotlib.figure import Figure

        self._rc = matplotlib.rc_context
        self.prefix, self.label = prefix, label
        self.titles: dict[str, str] = {}
        with self._rc(_RC):
            self.figure: Figure = Figure(figsize=(_WIDTH, height), layout="constrained")
            self.axes: Axes = self.figure.add_subplot()
        for artist in (self.figure.patch, self.axes.patch):
            artist.set_visible(False)
        self.axes.spines[["top", "right", "left"]].set_visible(False)
        self.axes.spines["bottom"].set_color(PALETTE["grid"])
        self.axes.tick_params(colors=PALETTE["muted"], length=0)
        for axis in (self.axes.xaxis, self.axes.yaxis):
            axis.label.set_color(PALETTE["muted"])

    def bars(self, rows: Sequence[tuple[str, float, str]], role: str, label: str, offset: float) -> None:
        """Horizontal bars (name, value, tooltip), the first on top, each with its figure at the end."""
        height = 0.36 if offset else 0.5
        with self._rc(_RC):
            drawn = self.axes.barh(
                [i + offset for i in range(len(rows))], [v for _, v, _ in rows], height, color=PALETTE[role], label=label
            )
            for bar, (_, value, tooltip) in zip(drawn, rows, strict=True):
                self._tip(bar, tooltip)
                at, ink = (value, bar.get_y() + height / 2), PALETTE["ink"]
                said = f"{value:.0f}" if value >= 100 or value == int(value) else f"{value:.1f}"
                self.axes.annotate(said, at, (4, 0), textcoords="offset points", va="center", size=10, color=ink)
            self.axes.set_yticks(range(len(rows)), [short(name) for name, _, _ in rows], color=PALETTE["ink"])
        self.axes.set_ylim(len(rows) - 0.4, -0.6)

    def points(self, points: Sequence[tuple[int, float]], label: str, tooltip: str) -> None:
        """A dotted line whose marks each have a tooltip."""
        self.axes.plot(*zip(*points, strict=True), color=PALETTE["second"], linewidth=1.4, linestyle=(0, (4, 3)))
        for i, (x, y) in enumerate(points):
            self.mark(x, y, PALETTE["second"], tooltip.format(x=x, y=y), label if i == 0 else None)

    def mark(self, x: float, y: float, colour: str, tooltip: str, label: str | None = None) -> None:
        """One dot with its tooltip; ``label`` puts it into the key."""
        (drawn,) = self.axes.plot(x, y, "o", color=colour, markersize=6, label=label)
        self._tip(drawn, tooltip)

    def svg(self, xlabel: str, ylabel: str = "", grid: Literal["x", "y", ""] = "") -> str:
        """The figure as an ``<svg>`` element for an HTML page, its axes labelled, the key above them and left-aligned."""
        self.axes.set(xlabel=xlabel, ylabel=ylabel)
        if grid:
            self.axes.grid(axis=grid, color=PALETTE["grid"], linewidth=0.8)
        buffer = io.StringIO()
        with self._rc(_RC), warnings.catch_warnings():
            # labels in a script matplotlib's font lacks: the browser draws them, only the measured width is off
            warnings.filterwarnings("ignore", message="Glyph .* missing from font")
            self.figure.legend(loc="outside upper left", ncols=3, frameon=False, labelcolor=PALETTE["ink"], fontsize=10.5)
            self.figure.savefig(buffer, format="svg", metadata={"Date": None})
        return _inline(buffer.getvalue(), self.prefix, self.label, self.titles)

    def _tip(self, artist: Any, text: str) -> None:
        gid = f"tip{len(self.titles)}"
        artist.set_gid(gid)
        self.titles[gid] = text


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


def _inline(markup: str, prefix: str, label: str, titles: Mapping[str, str]) -> str:
    root = ElementTree.fromstring(markup)
    for parent in list(root.iter()):
        parent.tag = parent.tag.rpartition("}")[2]
        for child in list(parent):
            if child.tag.rpartition("}")[2] in ("metadata", "style"):
                parent.remove(child)
    for element in root.iter():
        _restyle(element, prefix)
        tooltip = titles.get(element.get("id", "").removeprefix(f"{prefix}-"))
        if tooltip is not None:
            note = ElementTree.Element("title")
            note.text = visible(tooltip)
            element.insert(0, note)
    for name in ("width", "height", "version"):
        root.attrib.pop(name, None)
    root.attrib.update({"class": "chart", "role": "img", "aria-label": label})
    return ElementTree.tostring(root, encoding="unicode")


def _restyle(element: ElementTree.Element, prefix: str) -> None:
    attributes: dict[str, str] = {}
    classes: list[str] = []
    for name, value in element.attrib.items():
        plain = name.rpartition("}")[2]
        if plain == "id":
            attributes["id"] = f"{prefix}-{value}"
        elif plain == "href":
            attributes["href"] = f"#{prefix}-{value.removeprefix('#')}"
        elif plain == "clip-path":
            attributes["clip-path"] = value.replace("url(#", f"url(#{prefix}-")
        elif plain != "style":
            attributes[plain] = value
    for declaration in element.get("style", "").split(";"):
        key, _, value = (part.strip() for part in declaration.partition(":"))
        if key in _STYLE:
            attributes[key] = value.removesuffix("px")
            if value in _ROLE:
                classes.append(f"{key}-{_ROLE[value]}")
    if classes:
        attributes["class"] = " ".join(classes)
    element.attrib.clear()
    element.attrib.update(attributes)


def short(name: str) -> str:
    """A name that fits beside a bar."""
    name = re.sub(r"\s+", " ", visible(name))
    return name if len(name) <= 22 else f"{name[:21]}…"
