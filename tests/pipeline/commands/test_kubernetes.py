"""``kubernetes``: what it prints of real runs is what ``plan`` plans, and what it cannot print it says with a remedy."""

from __future__ import annotations

import json
import shlex
import shutil
from pathlib import Path
from typing import Any

import pytest
import tiny
import yaml
from cluster import VERSIONS, errors, leaves, read
from small_run import make_servable_run, record_exports
from typer.testing import CliRunner, Result

from pipeline.cli import app
from pipeline.errors import EngineError, InputError
from pipeline.runs.folder import RunFolder
from pipeline.runs.manifest import Manifest
from pipeline.serve.artefacts import manifest_hash

pytestmark = pytest.mark.usefixtures("no_settings")


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> RunFolder:
    """A run whose folder and GGUF are real models."""
    run = make_servable_run(RunFolder("Mine_1", tmp_path_factory.mktemp("runs")))
    shutil.rmtree(run.merged)
    # vLLM's CPU build computes no smaller heads
    tiny.make("4.1", run.merged, hidden_size=256, head_dim=64, num_key_value_heads=4)
    run.modelfile.write_text("FROM ./unsloth.Q8_0.gguf\n")
    record_exports(run)
    return run


def _asked(run: RunFolder, *words: str, verb: str = "kubernetes") -> Result:
    return CliRunner().invoke(app, [verb, "--run", run.name, "--output", str(run.output), *words])


def _manifests(run: RunFolder, *words: str) -> list[dict[str, Any]]:
    done = _asked(run, *words)
    assert done.exit_code == 0, done.output
    return read(done.stdout)


def _plan(run: RunFolder, *words: str) -> dict[str, Any]:
    done = _asked(run, "--json", *words, verb="plan")
    assert done.exit_code == 0, done.output
    return dict(json.loads(done.stdout))


@pytest.mark.parametrize("machine", ["cpu-4c-16g", "l4", "2xl4", "8xh100"])
@pytest.mark.parametrize("engine", ["vllm", "sglang", "llamacpp", "ollama"])
def test_a_pod_is_told_what_plan_says(made: RunFolder, engine: str, machine: str) -> None:
    words = ["--engine", engine, "--hardware", machine]
    plan = _plan(made, *words)
    if not plan["feasible"]:
        assert isinstance(_asked(made, *words).exception, EngineError)
        return
    deployment, *around = _manifests(made, *words)
    assert [(v, errors(one, v)) for v in VERSIONS for one in (deployment, *around) if errors(one, v)] == []
    server = deployment["spec"]["template"]["spec"]["containers"][0]
    folder = str(made.path)
    planned = [word.replace(folder, "/runs/Mine_1") for word in plan["argv"]]
    if engine == "ollama":
        assert server["args"] == planned[-1:] == ["serve"]
    else:
        # the program is the image's; it answers the pod's address, where plan says this machine's
        flags = planned[planned.index(next(word for word in planned if word in ("--model", "--model-path"))) :]
        flags[flags.index("--host") + 1] = "0.0.0.0"
        drain = server["args"][len(flags) :]
        assert server["args"] == [*flags, *drain]
        assert drain == (["--shutdown-timeout", "60"] if engine == "vllm" else [])
    assert plan["env"].items() <= {one["name"]: one.get("value") for one in server["env"]}.items()


def test_names_hash_and_head(made: RunFolder) -> None:
    done = _asked(made, "--engine", "vllm", "--hardware", "l4", "--replicas", "2", "--storage", "pvc://claim/deep")
    wanted = manifest_hash(Manifest(made.manifest))
    head = [line.removeprefix("# ") for line in done.stdout.splitlines() if line.startswith("#")]
    assert shlex.split(head[0].removeprefix("Made by: ")) == [
        *("granite-pipeline", "kubernetes", "--run", "Mine_1", "--engine", "vllm", "--hardware", "l4"),
        *("--replicas", "2", "--storage", "pvc://claim/deep", "--output", str(made.output)),
    ]
    assert "the claim claim, its folder deep/Mine_1" in head[2]
    deployment = yaml.safe_load(done.stdout.split("---\n")[1])
    assert deployment["metadata"]["name"] == f"mine-1-{wanted[:12]}"
    assert deployment["spec"]["replicas"] == 2
    check = deployment["spec"]["template"]["spec"]["initContainers"][0]
    again = CliRunner().invoke(app, [*check["command"][1:], *(w.replace("/runs", str(made.output)) for w in check["args"])])
    assert again.exit_code == 0, again.output


def test_what_a_user_sets_reaches_the_pod_and_a_name_cannot_leave_its_line(made: RunFolder) -> None:
    name = "x\nkind: Secret\n--- $(HOME)"
    done = _asked(made, "--engine", "vllm", "--hardware", "l4", "--served-model-name", name, "--set", "max-model-len=256")
    found = read(done.stdout)
    assert [one["kind"] for one in found] == ["Deployment", "Service", "Service", "PodDisruptionBudget", "NetworkPolicy"]
    args = found[0]["spec"]["template"]["spec"]["containers"][0]["args"]
    assert args[args.index("--served-model-name") + 1] == name.replace("$", "$$")
    assert args[args.index("--max-model-len") + 1] == "256"


def test_no_secret_of_the_environment_is_printed(made: RunFolder, monkeypatch: pytest.MonkeyPatch) -> None:
    for variable in ("VLLM_API_KEY", "LLAMA_API_KEY", "HF_TOKEN", "GATEWAY_API_KEY"):
        monkeypatch.setenv(variable, "planted-secret-1234")
    for engine in ("vllm", "llamacpp"):
        for secret in ([], ["--secret", "llm-keys"]):
            done = _asked(made, "--engine", engine, "--hardware", "l4", *secret)
            assert done.exit_code == 0, done.output
            assert "planted" not in done.stdout
            assert ("llm-keys" in leaves(read(done.stdout))) == bool(secret)
    assert isinstance(_asked(made, "--prometheus", "http://me:planted@prom:9090").exception, InputError)


def test_json_and_a_file_hold_the_same(made: RunFolder, tmp_path: Path) -> None:
    words = ["--engine", "llamacpp", "--hardware", "l4"]
    whole = json.loads(_asked(made, *words, "--json").stdout)
    assert (whole["kind"], whole["items"]) == ("List", _manifests(made, *words))
    done = _asked(made, *words, "--out", str(tmp_path / "a.yaml"))
    assert (done.exit_code, done.stdout) == (0, "")
    assert read((tmp_path / "a.yaml").read_text()) == whole["items"]


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["--flavour", "helm"], "no flavour 'helm'"),
        (["--engine", "tgi"], "no engine 'tgi'"),
        (["--engine", "openai"], "openai is not started from here"),
        (["--hardware", "l5"], "no machine 'l5'"),
        (["--storage", "s3://bucket"], "no place for a run folder"),
        (["--engine", "llamacpp", "--nodes", "2"], "is not planned over several machines"),
        (["--hardware", "2xl4", "--flavour", "lws"], "for a model over several nodes"),
        (["--hardware", "2xl4", "--flavour", "kserve", "--served-model-name", "a b"], "through a shell"),
        (["--sweep", "nowhere.yaml"], "nowhere.yaml"),
    ],
)
def test_what_is_not_supported_is_refused(made: RunFolder, words: list[str], said: str) -> None:
    error = _asked(made, *([] if "--engine" in words else ["--engine", "vllm"]), *words).exception
    assert isinstance(error, InputError)
    assert said in error.message


def test_several_nodes_for_a_model_that_fits_one_are_refused(made: RunFolder) -> None:
    error = _asked(made, "--engine", "vllm", "--hardware", "2xl4", "--nodes", "2").exception
    assert isinstance(error, EngineError)
    assert "one node holds this model" in error.evidence


def test_a_run_whose_files_are_not_those_on_record_is_refused(made: RunFolder, tmp_path: Path) -> None:
    shutil.copytree(made.output, tmp_path / "runs")
    copy = RunFolder(made.name, tmp_path / "runs")
    assert _asked(copy, "--engine", "llamacpp", "--hardware", "l4").exit_code == 0
    with copy.gguf.open("r+b") as handle:
        handle.seek(-1, 2)
        handle.write(b"\xff\xff")
    error = _asked(copy, "--engine", "llamacpp", "--hardware", "l4").exception
    assert isinstance(error, InputError) and "no pod would start with it" in error.message
    assert error.remedy == "granite-pipeline export --run Mine_1"
    missing = RunFolder("nothing", tmp_path / "runs")
    assert isinstance(_asked(missing, "--engine", "vllm").exception, InputError)


def test_a_sweep_is_a_job_with_a_pod_a_run(tmp_path: Path) -> None:
    spec = tmp_path / "sweep.yaml"
    spec.write_text(
        "grid: {SEED: [1, 2, 3]}\nruns: {a: {RANK: 4}, b: {RANK: 8}}\nresources: {cpus: 2, gpus: 1, memory_gib: 16}\n"
    )
    words = ["kubernetes", "--sweep", str(spec), "--storage", "pvc://runs", "--replicas", "4"]
    done = CliRunner().invoke(app, words)
    assert done.exit_code == 0, done.output
    (job,) = read(done.stdout)
    assert [errors(job, version) for version in VERSIONS] == [[], []]
    assert (job["spec"]["completions"], job["spec"]["parallelism"]) == (6, 4)
    name = job["metadata"]["name"]
    assert "runs/sweep.yaml" in done.stdout.splitlines()[1]
    spec.write_text(spec.read_text().replace("1, 2, 3", "1, 2"))
    (other,) = read(CliRunner().invoke(app, words).stdout)
    assert (other["spec"]["completions"], other["metadata"]["name"] == name) == (4, False)
    spec.write_text("grid: {SEEED: [1]}\n")
    wrong = CliRunner().invoke(app, words).exception
    assert isinstance(wrong, InputError) and "SEEED" in wrong.message
