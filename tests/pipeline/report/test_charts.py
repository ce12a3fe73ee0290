import json
import re
from pathlib import Path
from xml.etree import ElementTree

import pytest

from pipeline.report import charts
from pipeline.report.charts import PALETTE
from pipeline.report.schema import Point, Result, parse
from pipeline.runs.text import visible

SAMPLE = Path(__file__).parents[1] / "sample_report.json"


@pytest.fixture(scope="module")
def sample() -> Result:
    return parse(json.loads(SAMPLE.read_text(encoding="utf-8")))


@pytest.fixture(scope="module")
def drawn(sample: Result) -> dict[str, str]:
    scores = sample.evaluation
    return {
        "loss": charts.loss_curve(sample.training.history),
        "scores": charts.before_after(scores.base.shares, scores.tuned.shares),
        "ttft": charts.latency(sample.backends),
        "throughput": charts.throughput(sample.backends),
    }


def texts(svg: str) -> list[str]:
    return [element.text or "" for element in ElementTree.fromstring(svg).iter("text")]


def titles(svg: str) -> list[str]:
    return [element.text or "" for element in ElementTree.fromstring(svg).iter("title")]


@pytest.mark.parametrize("name", ["loss", "scores", "ttft", "throughput"])
def test_markup_fits_an_inline_svg_under_a_strict_policy(drawn: dict[str, str], name: str) -> None:
    root = ElementTree.fromstring(drawn[name])
    assert root.tag == "svg"
    assert root.get("role") == "img"
    assert root.get("aria-label")
    assert {e.tag for e in root.iter()} <= {"svg", "g", "path", "text", "title", "defs", "use", "clipPath", "rect"}
    used = {attribute for e in root.iter() for attribute in e.attrib}
    assert "style" not in used
    ids = [e.get("id") for e in root.iter() if e.get("id")]
    assert len(ids) == len(set(ids))
    assert all(str(i).startswith(f"{name}-") for i in ids)
    references = set(re.findall(r'(?:href="#|url\(#)([^")]+)', drawn[name]))
    assert references <= set(ids)


def test_colours_follow_the_page(drawn: dict[str, str]) -> None:
    css = (Path(charts.__file__).parent / "templates" / "report.css").read_text(encoding="utf-8")
    used = set(re.findall(r'\b((?:fill|stroke)-(?:ink|muted|grid|before|after|second))\b(?=[ "])', " ".join(drawn.values())))
    assert {"fill-ink", "fill-muted", "stroke-grid", "fill-before", "fill-after", "stroke-after", "fill-second"} <= used
    assert all(f".{name} {{" in css for name in used)
    colours = {c.lower() for svg in drawn.values() for c in re.findall(r'(?:fill|stroke)="(#[0-9a-f]+)"', svg)}
    assert colours <= set(PALETTE.values())
    assert all(f"--{role}: {colour};" in css for role, colour in PALETTE.items())


def test_bars_carry_their_figures(drawn: dict[str, str]) -> None:
    assert titles(drawn["ttft"]) == [
        *("vLLM: median 412 ms", "llama.cpp: median 655 ms", "vLLM: 95th percentile 968 ms", "llama.cpp: 95th percentile 1420 ms")
    ]
    assert [t for t in texts(drawn["throughput"]) if t in ("vLLM", "llama.cpp", "441", "119")] == [
        "vLLM",
        "llama.cpp",
        "441",
        "119",
    ]
    assert "technique, after: 92.2%" in titles(drawn["scores"])


def test_same_input_gives_the_same_bytes(sample: Result, drawn: dict[str, str]) -> None:
    assert charts.loss_curve(sample.training.history) == drawn["loss"]


def test_nothing_to_draw_gives_no_chart(sample: Result) -> None:
    assert charts.loss_curve([]) == ""
    assert charts.loss_curve([Point(step=1, loss=2.0)]) == ""
    assert charts.before_after({}, {"exact": 1.0}) == ""
    assert charts.latency([b for b in sample.backends if b.status == "skipped"]) == ""
    assert charts.throughput([]) == ""


def test_a_long_noisy_history_is_thinned_and_smoothed() -> None:
    svg = charts.loss_curve([Point(step=i, loss=2.0 + i % 2) for i in range(1, 20_001)])
    assert len(svg) < 60_000
    assert "training, mean of 667 entries" in texts(svg)


def test_held_out_loss_alone_is_drawn() -> None:
    history = [Point(step=0, eval_loss=2.5), Point(step=50, eval_loss=0.5)]
    assert titles(charts.loss_curve(history)) == ["held-out loss 2.500 at step 0", "held-out loss 0.500 at step 50"]


@pytest.mark.parametrize(
    "name", ["</text><script>alert(1)</script>", '" onload="alert(1)', "$\\frac{", "重大度", "a\x00\x1b\u202eb", "x" * 300]
)
def test_labels_are_text_and_nothing_else(name: str) -> None:
    svg = charts.before_after({name: 0.5}, {name: 1.0})
    root = ElementTree.fromstring(svg)
    assert {e.tag for e in root.iter()} <= {"svg", "g", "path", "text", "title", "defs", "use", "clipPath", "rect"}
    assert not any(attribute.startswith("on") for e in root.iter() for attribute in e.attrib)
    assert len(max(texts(svg), key=len)) <= 40
    assert any(visible(name)[:10] in t for t in texts(svg))
