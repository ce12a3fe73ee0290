"""Your own checks: the format, the judging, a real HTTP endpoint, and the worked example of the documentation."""

from __future__ import annotations

import json
import threading
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import pytest

from pipeline.certify.links import own
from pipeline.errors import InputError
from pipeline.runs.folder import RunFolder
from pipeline.serve.start import Endpoint

EXAMPLE = Path(__file__).parents[4] / "docs" / "examples"


class _Echo(BaseHTTPRequestHandler):
    """Answers an alert as the SOC model would; anything else with the prompt."""

    def do_POST(self) -> None:
        body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
        prompt = body["messages"][-1]["content"]
        alert = '{"severity":"low","technique":"none","verdict":"benign","action":"close_alert"}'
        text = alert if "Approved" in prompt else f"you said {prompt}"
        data = json.dumps({"choices": [{"message": {"content": text}}]}).encode()
        self.send_response(200)
        self.send_header("Content-Length", str(len(data)))
        self.end_headers()
        self.wfile.write(data)

    def log_message(self, *_: object) -> None:
        pass


@pytest.fixture
def endpoint() -> Iterator[Endpoint]:
    server = ThreadingHTTPServer(("127.0.0.1", 0), _Echo)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    yield Endpoint("openai", f"http://127.0.0.1:{server.server_port}", "m")
    server.shutdown()
    server.server_close()


@pytest.mark.parametrize(
    ("check", "text", "passes"),
    [
        ({"exact": "yes"}, " yes\n", True),
        ({"exact": "yes"}, "Yes", False),
        ({"contains": "T1059"}, "it is T1059.001", True),
        ({"contains": "T1059"}, "t1059", False),
        ({"regex": r"^\d+$"}, "42", True),
        ({"regex": r"^\d+$"}, "42 apples", False),
        ({"json_schema": {"type": "object", "required": ["a"]}}, '{"a": 1}', True),
        ({"json_schema": {"type": "object", "required": ["a"]}}, '{"b": 1}', False),
        ({"json_schema": {"type": "object"}}, "no JSON", False),
    ],
)
def test_each_check(check: dict[str, object], text: str, passes: bool) -> None:
    assert own.Rule.model_validate(check).passes(text) is passes


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("- prompt: hi\n", "prompts.0.check: Field required"),
        ("- prompt: hi\n  check: {exact: a, regex: b}\n", "this has exact, regex"),
        ("- prompt: hi\n  check: {regex: '('}\n", "the regular expression is wrong"),
        ("- check: {exact: a}\n", "give either prompt or messages"),
        ("[]\n", "at least 1 item"),
        ("minimum: 2\nprompts: [{prompt: a, check: {exact: a}}]\n", "minimum"),
        ("- prompt: hi\n  chek: {exact: a}\n", "prompts.0"),
        ("a: [\n", "cannot be read as YAML"),
        ("- !!python/object/apply:os.system ['true']\n", "cannot be read as YAML"),
    ],
)
def test_a_wrong_file_is_refused_with_its_place(tmp_path: Path, text: str, words: str) -> None:
    path = tmp_path / "mine.yaml"
    path.write_text(text)
    with pytest.raises(InputError) as caught:
        own.load(str(path))
    assert str(path) in str(caught.value)
    assert words in str(caught.value)


def test_the_worked_example_in_yaml(endpoint: Endpoint, run: RunFolder) -> None:
    found = own.run_own(str(EXAMPLE / "soc_checks.yaml"), endpoint, run)
    assert (found.id, found.status) == ("own.openai_soc_checks", "passed")
    assert [case["passed"] for case in found.data["cases"]] == [True, True]


def test_the_worked_example_in_python(endpoint: Endpoint, run: RunFolder, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.syspath_prepend(str(EXAMPLE))
    found = own.run_own("soc_eval:evaluate", endpoint, run)
    assert (found.status, found.data["results"]) == ("passed", {"valid JSON": 1.0, "benign is closed": 1.0})


def test_below_the_minimum_fails_and_shows_the_first_wrong_answer(endpoint: Endpoint, run: RunFolder, tmp_path: Path) -> None:
    path = tmp_path / "mine.yml"
    path.write_text(
        "minimum: 0.6\nprompts:\n- {prompt: a, check: {contains: a}}\n- {name: second, prompt: b, check: {exact: c}}\n"
    )
    found = own.run_own(str(path), endpoint, run)
    assert found.status == "failed"
    assert found.figure == "1 of 2 answers as they should be; first that is not: 'second' answered 'you said b'"


@pytest.mark.parametrize("spec", ["no_such_module:f", "json:nothing", "json:__doc__", "json"])
def test_a_function_that_is_not_there_is_refused(spec: str) -> None:
    with pytest.raises(InputError, match="--eval"):
        own.load(spec)


def test_a_function_that_raises_fails_by_itself(
    endpoint: Endpoint, run: RunFolder, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "bad_eval.py").write_text("def f(ask):\n    return 1 / 0\n")
    monkeypatch.syspath_prepend(str(tmp_path))
    found = own.run_own("bad_eval:f", endpoint, run)
    assert (found.status, "ZeroDivisionError" in found.figure) == ("failed", True)
