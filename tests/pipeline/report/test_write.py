import copy
import io
import json
import re
from base64 import b64encode
from hashlib import sha256
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import pytest
from junitparser import JUnitXml
from rich.console import Console

from pipeline.errors import InputError
from pipeline.report.write import junit_xml, render_html, summary_table, write_report

SAMPLE = Path(__file__).parents[1] / "sample_report.json"
HOSTILE = '</text></svg><script>alert(1)</script><img src=x onerror=alert(1)>"\' onmouseover="alert(1)" {{ 7*7 }} {% raw %} ]]> \x00\x1b[31m\u202e'
VOID = {"meta", "br"}


class Page(HTMLParser):
    """Tags with their attributes, the visible text, and tags left open."""

    def __init__(self, markup: str) -> None:
        super().__init__(convert_charrefs=True)
        self.tags: list[tuple[str, dict[str, str | None]]] = []
        self.words: list[str] = []
        self.open: list[str] = []
        self.feed(markup)
        self.close()

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append((tag, dict(attrs)))
        if tag not in VOID:
            self.open.append(tag)

    def handle_startendtag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append((tag, dict(attrs)))

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag

    def handle_data(self, data: str) -> None:
        if self.open and self.open[-1] != "style":
            self.words.append(data)

    @property
    def text(self) -> str:
        return re.sub(r"\s+", " ", " ".join(self.words))


@pytest.fixture
def result() -> dict[str, Any]:
    found: dict[str, Any] = json.loads(SAMPLE.read_text(encoding="utf-8"))
    return found


@pytest.fixture
def failed(result: dict[str, Any]) -> dict[str, Any]:
    return break_parity(result)


def break_parity(result: dict[str, Any]) -> dict[str, Any]:
    result["passed"] = False
    result["backends"][0].update(status="failed", prompt_parity=False, exact=0.618, reason="2 checks failed")
    for check in result["checks"]:
        if check["id"] in ("vllm.prompt_parity", "vllm.scores"):
            check.update(status="failed", detail="token 14 is 198, the tokenizer has 12586\nmore below")
    return result


@pytest.fixture(scope="module")
def passed_page() -> str:
    """Drawn once, because charts take most of a test's time."""
    return render_html(json.loads(SAMPLE.read_text(encoding="utf-8")))


@pytest.fixture(scope="module")
def failed_page() -> str:
    return render_html(break_parity(json.loads(SAMPLE.read_text(encoding="utf-8"))))


def poison(value: Any) -> Any:
    """Every string replaced by hostile text, except those the contract fixes; mapping keys too where they are free."""
    if isinstance(value, str):
        return value if value in ("passed", "failed", "skipped", "warning") else HOSTILE
    if isinstance(value, list):
        return [poison(item) for item in value]
    if isinstance(value, dict):
        return {key: poison(item) for key, item in value.items()}
    return value


def test_the_page_is_whole_and_well_formed(passed_page: str) -> None:
    page = Page(passed_page)
    assert page.open == []
    assert {tag for tag, _ in page.tags} <= {
        *(
            "html",
            "head",
            "meta",
            "title",
            "style",
            "body",
            "main",
            "div",
            "section",
            "header",
            "nav",
            "footer",
            "details",
            "summary",
        ),
        *("h1", "h2", "h3", "h4", "p", "a", "em", "strong", "code", "pre", "span", "mark", "del", "ul", "li", "dl", "dt", "dd"),
        *("table", "thead", "tbody", "tr", "th", "td", "figure", "figcaption"),
        *("svg", "g", "path", "text", "defs", "use", "clippath", "rect"),
    }


def test_the_page_fetches_nothing_and_runs_nothing(passed_page: str) -> None:
    page = Page(passed_page)
    links = [
        value for _, attrs in page.tags for name, value in attrs.items() if name in ("href", "src", "srcset", "action", "data")
    ]
    assert links
    assert all(str(link).startswith("#") for link in links)
    assert not any(name == "style" or name.startswith("on") for _, attrs in page.tags for name in attrs)
    style = passed_page.partition("<style>")[2].partition("</style>")[0]
    assert not re.search(r"url\(|@import", style)
    digest = b64encode(sha256(style.encode()).digest()).decode()
    policy = next(attrs["content"] for tag, attrs in page.tags if attrs.get("http-equiv") == "Content-Security-Policy")
    assert policy == f"default-src 'none'; style-src 'sha256-{digest}'; base-uri 'none'; form-action 'none'"


def test_anchors_and_ids_meet(passed_page: str) -> None:
    page = Page(passed_page)
    ids = [attrs["id"] for _, attrs in page.tags if "id" in attrs]
    assert len(ids) == len(set(ids))
    assert {str(attrs["href"])[1:] for _, attrs in page.tags if "href" in attrs} <= set(ids)


def test_a_passed_run_says_so_first(passed_page: str) -> None:
    text = Page(passed_page).text
    assert "Passed: what is served is what was trained" in text
    assert "vLLM and llama.cpp answer held-out prompts as the fine-tuned model does. Ollama was skipped, not tested." in text
    for figure in ("0 % → 86.3 %", "of 204 held-out rows", "0.5 points below the trained model", "2 of 2", "8 min 42 s"):
        assert figure in text
    assert "curl -fsSL https://ollama.com/install.sh | sh" in text
    assert "VLLM_CPU_KVCACHE_SPACE=1 VLLM_CPU_OMP_THREADS_BIND=auto python -m vllm.entrypoints.openai.api_server" in text


def test_a_failed_run_names_the_broken_check(failed_page: str) -> None:
    page = Page(failed_page)
    assert "Failed: vLLM, prompt parity token 14 is 198, the tokenizer has 12586. 1 more check failed." in page.text
    assert "Passed: what is served" not in page.text
    assert "vllm.prompt_parity vllm.scores" in page.text
    assert "1 of 2 engines feed the model" in page.text


def test_a_run_that_no_engine_served_is_not_passed(result: dict[str, Any]) -> None:
    skipped = result["backends"][2]
    result["backends"] = [{**skipped, "name": name, "title": title} for name, title in (("vllm", "vLLM"), ("ollama", "Ollama"))]
    result["checks"] = []
    text = Page(render_html(result)).text
    assert "Not verified: no engine answered" in text
    assert "vLLM and Ollama were skipped, not tested." in text


def test_a_run_that_failed_without_a_check_is_failed(result: dict[str, Any]) -> None:
    result["passed"] = False
    assert "The run did not pass, and no check says why." in Page(render_html(result)).text


def test_differences_from_the_expected_answer_are_marked(passed_page: str) -> None:
    assert '<dt>technique</dt><dd dir="auto"><mark>T1567.002</mark>' in re.sub(r"\s*\n\s*", "", passed_page)
    text = Page(passed_page).text
    assert "Fine-tuned, in process · vLLM · llama.cpp ✓ as expected" in text
    assert "llama.cpp ≠ differs in technique" in text
    assert "Before fine-tuning ≠ not a JSON object" in text


def test_status_is_told_in_words_and_signs(failed_page: str) -> None:
    text = Page(failed_page).text
    assert "✕ failed prompt parity token 14 is 198" in text
    assert "– skipped available" in text
    assert "✓ 6 of 6 passed" in text


def test_hostile_text_stays_text(failed: dict[str, Any], passed_page: str) -> None:
    failed["eval"]["tuned"][HOSTILE] = failed["eval"]["base"][HOSTILE] = 0.5
    failed["backends"][0]["fields"][HOSTILE] = 0.5
    failed["backends"][0]["env"] = {HOSTILE: "x"}
    failed["manifest"] = {HOSTILE: {HOSTILE: [HOSTILE, {HOSTILE: 1}]}}
    failed["examples"].append(
        {"prompt": "p", "expected": json.dumps({HOSTILE: HOSTILE}), "answers": {"vllm": json.dumps({HOSTILE: "b", "c": HOSTILE})}}
    )
    result = poison(failed)
    markup = render_html(result)
    page = Page(markup)
    clean_tags = {tag for tag, _ in Page(passed_page).tags}
    assert {tag for tag, _ in page.tags} <= clean_tags | {"del"}
    assert not any(name.startswith("on") or name == "src" for _, attrs in page.tags for name in attrs)
    assert "<script" not in markup
    assert "{{ 7*7 }}" in page.text
    assert not set("\x00\x1b\u202e") & set(markup)
    assert page.open == []


def test_what_may_be_missing_is_left_out(result: dict[str, Any]) -> None:
    kept = ("schema", "run", "passed", "base_model", "eval", "checks")
    bare = {**{key: result[key] for key in kept}, "backends": []}
    page = Page(render_html(bare))
    assert page.open == []
    assert "Answers side by side" not in page.text
    assert "Not verified" in page.text
    one = {**result["backends"][0], "ttft_ms": None, "memory_gib": None, "memory_measured_gib": None}
    assert "Memory" not in Page(render_html({**bare, "backends": [one]})).text


def test_other_datasets_fields_are_shown(result: dict[str, Any]) -> None:
    scores = {"n": 9, "json_valid": 1.0, "severity": None, "technique": None, "exact": 0.5, "root_cause": 0.9995}
    result["eval"] = {"base": scores, "tuned": scores}
    text = Page(render_html(result)).text
    assert "root cause > 99.9 % > 99.9 %" in text
    assert "severity 9" not in text


def test_junit_has_a_suite_a_backend_and_a_case_a_check(failed: dict[str, Any]) -> None:
    suites = list(JUnitXml.fromstring(junit_xml(failed).encode()))
    assert [(s.name, s.tests, s.failures, s.skipped) for s in suites] == [
        ("line", 6, 0, 0),
        ("vllm", 6, 2, 0),
        ("llamacpp", 6, 0, 0),
        ("ollama", 1, 0, 1),
    ]
    broken = next(case for case in suites[1] if case.name == "prompt_parity")
    assert broken.classname == "generic.vllm"
    assert [r.message for r in broken.result] == ["token 14 is 198, the tokenizer has 12586\nmore below"]
    (absent,) = list(suites[3])
    assert absent.result[0].message == "no ollama program on PATH and OLLAMA_BASE_URL is not set"


def test_a_backend_without_checks_still_has_its_case(result: dict[str, Any]) -> None:
    result["checks"] = []
    result["passed"] = False
    result["backends"][0].update(status="failed", reason="port 8003 in use")
    suites = {
        s.name: [(c.name, [type(r).__name__ for r in c.result]) for c in s]
        for s in JUnitXml.fromstring(junit_xml(result).encode())
    }
    assert suites == {"line": [], "vllm": [("backend", ["Failure"])], "llamacpp": [], "ollama": [("backend", ["Skipped"])]}


def test_junit_is_xml_whatever_the_text(failed: dict[str, Any]) -> None:
    suites = list(JUnitXml.fromstring(junit_xml(poison(failed)).encode()))
    assert sum(s.failures for s in suites) == 3  # two checks, and the backend whose name now fits neither
    assert "<script>alert(1)</script>" in suites[0].name + str([c.name for s in suites for c in s])


def test_three_files_are_written_and_hold_what_was_given(result: dict[str, Any], tmp_path: Path) -> None:
    result["training"]["history"][3]["loss"] = float("nan")
    result["backends"][0]["env"]["VLLM_API_KEY"] = "secret-value"
    paths = write_report(result, tmp_path / "report")
    assert sorted(p.name for p in (tmp_path / "report").iterdir()) == ["junit.xml", "report.html", "report.json"]
    result["training"]["history"][3]["loss"] = None
    result["backends"][0]["env"]["VLLM_API_KEY"] = "(hidden)"
    assert json.loads(paths.json.read_text(encoding="utf-8")) == result
    assert not any("secret-value" in p.read_text(encoding="utf-8") for p in (paths.json, paths.html, paths.junit))


def test_a_refused_result_changes_no_file(result: dict[str, Any], tmp_path: Path) -> None:
    paths = write_report(result, tmp_path)
    before = [p.read_bytes() for p in (paths.json, paths.html, paths.junit)]
    broken = copy.deepcopy(result)
    del broken["backends"][1]["prompt_parity"]
    with pytest.raises(InputError, match=r"backends\[1\]\.prompt_parity is missing"):
        write_report(broken, tmp_path)
    assert [p.read_bytes() for p in (paths.json, paths.html, paths.junit)] == before


def test_the_table_shows_each_backend_and_no_control_sequence(failed: dict[str, Any]) -> None:
    failed["backends"][1] |= {"name": "[red]x[/red]\x1b[2J", "title": None}
    console = Console(file=io.StringIO(), width=160, force_terminal=False)
    console.print(summary_table(failed))
    text = console.file.getvalue()  # type: ignore[attr-defined]
    assert "Failed: vLLM, prompt parity" in text
    assert "[red]x[/red]‹U+001B›[2J" in text
    assert "\x1b" not in text
    row = next(line for line in text.splitlines() if line.strip(" │").startswith("vLLM "))
    assert [cell.strip() for cell in row.strip("│").split("│")] == [
        "vLLM",
        "failed",
        "61.8\u00a0%",
        "differs",
        "100\u00a0%",
        "412",
        "441.3",
    ]
