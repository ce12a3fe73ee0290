"""A figure as inline SVG: matplotlib's drawing, restyled so that the page's CSS colours it.

Colours become classes (light, dark and print follow the page), style attributes become presentation attributes (the page's
content security policy allows none), ids get a prefix (several charts share one page), and marks carry ``<title>`` tooltips.
"""

from __future__ import annotations

import io
import re
import warnings
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any, Literal
from xml.etree import ElementTree

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
            self.axes.set_yticks(range(len(rows)), [_short(name) for name, _, _ in rows], color=PALETTE["ink"])
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


def _short(name: str) -> str:
    name = re.sub(r"\s+", " ", visible(name))
    return name if len(name) <= 22 else f"{name[:21]}…"
