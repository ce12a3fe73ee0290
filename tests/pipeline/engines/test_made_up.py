"""An engine that exists in this file only: every room knows it, from its plan to the report, with no line elsewhere."""

from __future__ import annotations

import json
import shutil
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
from typer.testing import CliRunner

from pipeline import config, engines
from pipeline.cli import app
from pipeline.engines.base import Container, Engine, Launch
from pipeline.engines.choose import recommend
from pipeline.machine.hardware import Cpu, Hardware
from pipeline.machine.named import hardware_from
from pipeline.model.model import Model
from pipeline.net.loopback import claim
from pipeline.planning.overrides import Known, Overrides
from pipeline.planning.plan import Memory, Plan, Request, Setting
from pipeline.runs.folder import RunFolder
from pipeline.runs.manifest import Manifest
from pipeline.serve import start
from pipeline.verify.score import read_held_out, read_reference, rows_asked, score

# answers a held-out "Say N." with N, and anything that wants JSON with the colour that verify asks for
SERVER = """
import json, os, sys
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

given = dict(zip(sys.argv[1::2], sys.argv[2::2]))
model = {"id": given["--name"], "root": given["--weights"], "max_model_len": int(given["--context"])}

class Handler(BaseHTTPRequestHandler):
    def do_GET(self):
        self.answer({"data": [model]} if self.path == "/v1/models" else {})

    def do_POST(self):
        asked = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
        text = asked["messages"][-1]["content"].removeprefix("Say ").rstrip(".")
        text = json.dumps({"colour": "red", "count": 1}) if "response_format" in asked else text
        # as an engine that samples where it is told nothing
        text += "" if "temperature" in asked else os.environ.get("SAMPLED", "")
        usage, end = {"completion_tokens": 2}, {"finish_reason": "stop"}
        if not asked.get("stream"):
            return self.answer({"choices": [{"message": {"content": text}, **end}], "usage": usage})
        parts = [{"choices": [{"delta": {"content": letter}}]} for letter in text]
        self.send([f"data: {json.dumps(part)}" for part in parts] + ["data: [DONE]"])

    def answer(self, found):
        self.send([json.dumps(found)])

    def send(self, lines):
        self.send_response(200)
        self.end_headers()
        self.wfile.write("\\n\\n".join(lines).encode())

ThreadingHTTPServer((given["--host"], int(given["--port"])), Handler).serve_forever()
"""


class MadeUp(Engine):
    """A few lines of HTTP as an inference engine."""

    name = "madeup"
    title = "MadeUp <1>"
    default_port = claim("127.0.0.1", 0)
    call_forms = ()
    flags = Known({"--weights", "--name", "--context"})
    container = Container(image="made/up:1", gpu_image="made/up:1-cuda", variables={"--name": "MADEUP_MODEL"})
    settings = {"MADEUP_CONTEXT": "context"}  # noqa: RUF012

    def plan(self, request: Request) -> Plan:
        user = Overrides.of(request.overrides, self.flags)
        planned = [
            Setting("--weights", str(request.model.path), "the folder to serve"),
            Setting("--name", request.served_name, "the name clients ask for"),
            Setting("--context", "512", "enough"),
        ]
        flags, env = user.lay_over(planned, self.flags)
        length = user.integer("--context", 1, 4096) or 512
        return Plan(self.name, True, flags, env, "float32", None, 1, length, 2, Memory(weights=0.1, available=1.0))

    def launch(self, plan: Plan, request: Request, *, host: str, port: int) -> Launch:
        argv = (sys.executable, "-c", SERVER, *plan.arguments, "--host", host, "--port", str(port))
        return Launch(self.name, argv, plan.environment, f"http://{host}:{port}", "/health", request.served_name, 30.0)


@pytest.fixture(autouse=True)
def _engine(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    engines.register(MadeUp)
    for name in ("OLLAMA", "VLLM", "LLAMACPP", "SGLANG"):
        monkeypatch.setenv(f"{name}_BASE_URL", "http://127.0.0.1:9")
    monkeypatch.setenv("LLM_BACKEND", "madeup")
    monkeypatch.setenv("MADEUP_MODEL", "soc")
    yield
    engines.unregister("madeup")


@pytest.fixture
def run(base: Path, tmp_path: Path) -> RunFolder:
    """A run that was trained to say numbers."""
    made = RunFolder("numbers", tmp_path)
    shutil.copytree(base, made.merged)
    made.adapter.mkdir()
    (made.adapter / "adapter_config.json").write_text("{}")
    rows = [[{"role": "user", "content": f"Say {n}."}, {"role": "assistant", "content": f"{n}"}] for n in range(100, 108)]
    made.heldout.write_text("".join(json.dumps({"messages": row}) + "\n" for row in rows))
    manifest = Manifest(made.manifest)
    parameters = {"base": "somewhere", "data": "numbers", "method": "lora"}
    learned = {"method": "lora", "trainer": "hf", "dtype": "float32", "steps": 1, "eval_loss": {"before": 2.0, "after": 1.0}}
    trained = {"parameters": parameters, "base": {"id": "somewhere", "sha256": "b"}, "data": {"train": "d"}}
    manifest.record("finetune", trained, [made.adapter, made.heldout], learned, 1.0)
    manifest.record("merge", {"base": "b"}, [made.merged], {}, 1.0)
    for which, text in (("base", "?"), ("tuned", "")):
        path = made.reference(which)
        path.parent.mkdir(parents=True, exist_ok=True)
        answers = [{"text": text or row[1]["content"], "finish_reason": "stop"} for row in rows]
        path.write_text("".join(json.dumps(answer) + "\n" for answer in answers))
        manifest.record(
            f"evaluate_{which}", {}, [path], score(*rows_asked(read_held_out(made.heldout), read_reference(path))), 1.0
        )
    return made


def _call(*words: object, code: int | None = 0) -> str:
    result = CliRunner().invoke(app, [str(word) for word in words])
    assert code in (None, result.exit_code), (result.output, result.exception)
    return result.stdout


def test_it_is_configured_by_its_own_variables(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("MADEUP_CONTEXT", "256")
    (tmp_path / ".env").write_text("MADEUP_ORCHESTRATOR_MODEL=conductor\n")
    settings = config.load(tmp_path / ".env")
    address = settings.address()
    assert (address.backend, address.model, address.orchestrator_model) == ("madeup", "soc", "conductor")
    assert address.base_url == f"http://127.0.0.1:{MadeUp.default_port}/v1"
    assert settings.overrides("madeup") == {"context": "256"}
    monkeypatch.setenv("MADEUP_BASE_URL", "http://elsewhere:1/v1")
    assert config.load(tmp_path / ".env").address("madeup").root == "http://elsewhere:1"


def test_it_is_planned(run: RunFolder) -> None:
    made = engines.get("madeup").plan(Request(Model.open(run.merged), Hardware(Cpu(1), 1.0, 1.0), served_name="soc"))
    assert made.arguments == ["--weights", str(run.merged), "--name", "soc", "--context", "512"]
    planned = json.loads(
        _call("plan", "--engine", "madeup", "--run", run.name, "--output", run.output, "--set", "context=99", "--json")
    )
    assert planned["max_model_len"] == 99
    assert planned["argv"][-4:] == ["--host", "127.0.0.1", "--port", str(MadeUp.default_port)]
    assert "measurements" in recommend(hardware_from("h100")).others["madeup"]


def test_it_is_served_and_listed_everywhere(run: RunFolder, monkeypatch: pytest.MonkeyPatch) -> None:
    target = start.Target.of_run(run, "madeup", "soc")
    endpoint = start.serve("madeup", target, start.Options(port=MadeUp.default_port), lambda text: None)
    try:
        assert start.attach("madeup", target) is not None
        servers = json.loads(_call("status", "--run", run.name, "--output", run.output, "--json"))["servers"]
        assert [(row["backend"], row["model"], row["healthy"]) for row in servers] == [("madeup", "soc", True)]
        models = json.loads(_call("models", "--output", run.output, "--json"))
        ours = models["madeup"][0]
        assert (ours["name"], ours["available"], ours["artefact"]["run"]) == ("soc", True, run.name)
        told = json.loads(_call("doctor", "--run", run.name, "--output", run.output, "--json", code=None))
        assert any("madeup" in finding["check"] for finding in told["findings"])
    finally:
        assert start.stop(run.path, endpoint.engine)


def test_it_is_verified_and_drawn(run: RunFolder) -> None:
    _call("verify", "--run", run.name, "--output", run.output, "--backends", "madeup")
    report = json.loads((run.report / "report.json").read_text())
    entry = report["backends"][0]
    assert (entry["name"], entry["status"], entry["prompts"]) == ("madeup", "passed", {"total": 8, "passed": 8})
    assert entry["prompt_parity"] is None
    assert entry["plain_client"]["same"] == entry["plain_client"]["rows"] == 8
    parity = next(check for check in report["checks"] if check["id"] == "madeup.prompt_parity")
    assert (parity["status"], parity["detail"].startswith("MadeUp <1> does not tell")) == ("skipped", True)
    assert "MadeUp &lt;1&gt;" in (run.report / "report.html").read_text()


def test_an_engine_that_samples_where_it_is_told_nothing_is_warned_of_and_not_failed(
    run: RunFolder, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("SAMPLED", "0")
    _call("verify", "--run", run.name, "--output", run.output, "--backends", "madeup")
    report = json.loads((run.report / "report.json").read_text())
    entry = report["backends"][0]
    assert (report["passed"], entry["status"], entry["exact"]) == (True, "passed", 1.0)
    figures = {key: entry["plain_client"][key] for key in ("rows", "exact", "exact_greedy", "same")}
    assert figures == {"rows": 8, "exact": 0.0, "exact_greedy": 1.0, "same": 0}
    check = next(check for check in report["checks"] if check["id"] == "madeup.plain_client")
    assert check["status"] == "warning"
    assert check["detail"].endswith(
        "takes settings of its own where a request names none: send temperature 0 and top_p 1; the gateway fills it in"
    )
    assert "send temperature 0 and top_p 1" in (run.report / "report.html").read_text()


def test_it_runs_on_a_cluster(run: RunFolder) -> None:
    """By its image's own entry point: it names no program."""
    words = ["--run", run.name, "--output", run.output, "--engine", "madeup", "--hardware", "cpu-4c-16g", "--json"]
    deployment = json.loads(_call("kubernetes", *words))["items"][0]
    server = deployment["spec"]["template"]["spec"]["containers"][0]
    assert (server["image"], "command" in server) == ("made/up:1", False)
    assert server["args"][:2] == ["--weights", f"/runs/{run.name}/merged_fp16"]
    assert server["args"][-4:] == ["--host", "0.0.0.0", "--port", str(MadeUp.default_port)]


def test_it_runs_in_containers() -> None:
    import yaml

    services = yaml.safe_load(_call("compose"))["services"]
    assert services["madeup"]["profiles"] == ["local-madeup"]
    assert "${MADEUP_MODEL:-granite-soc}" in services["madeup"]["command"]
    assert f"MADEUP_BASE_URL=http://madeup:{MadeUp.default_port}/v1" in services["status-api"]["environment"]
    assert "made/up:1-cuda" in _call("compose", "--gpu", "--hardware", "l4")
