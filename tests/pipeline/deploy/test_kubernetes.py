"""Manifests: accepted by strict schemas of two Kubernetes versions, one fine-tune an address, the plan's own words, and no secret."""

from __future__ import annotations

import json
import re
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from cluster import VERSIONS, errors, expanded, leaves, read

from pipeline import engines
from pipeline.deploy.container import Storage, contained
from pipeline.deploy.flavours import FLAVOURS, Sweep, sweep_job
from pipeline.deploy.kubernetes import Options, Served, dns_label, to_yaml
from pipeline.engines.llamacpp_server import parser as xllamacpp_parser
from pipeline.errors import EngineError, InputError
from pipeline.machine.named import hardware_from
from pipeline.model.model import Model
from pipeline.net.chat import SAMPLING
from pipeline.planning.plan import Request

HASH = "0123456789" * 6 + "12e4"
CLAIM = Storage.of("pvc://shared/runs")
IMAGE = Storage.of(f"image://registry.example/mine@sha256:{'0' * 64}")
MACHINES = ("cpu-4c-16g", "l4", "2xl4", "8xh100")
# a model that one such machine does not hold, and two do
TOO_LARGE = {"cpu-4c-16g": "granite-4.1-3b", "l4": "granite-4.1-30b", "2xl4": "granite-4.0-h-small"}
GPUS = {"cpu-4c-16g": 0, "l4": 1, "2xl4": 1, "8xh100": 1}
ODD = ["y", "off", "1e3", "0x1f", "12:30", "~", "", " ", "a b", "it's", 'say "hi"', "$(HOME)", "$$(X)", "$HOME", "`id`", "{{ .Name }}", "#x", "a: b", "- a", "x\n---\nkind: Secret", "\t", "é\u2028", "*a", "&a", "!a", "%a", "@a"]  # fmt: skip


def _request(
    engine: str, machine: str, *, shape: str = "granite-4.0-350m", nodes: int = 1, name: str = "soc", **given: str
) -> Request:
    model = Model.from_shape(shape)
    if engines.get(engine).serves == "gguf":
        model = replace(model, format="gguf", quantization="Q8_0", weight_bytes=int(model.q8_0_gib() * 2**30))
    return Request(model, hardware_from(machine), "serve", name, given, sampling=SAMPLING, nodes=nodes)


def _served(engine: str, request: Request, *, run: str = "mine", storage: Storage = CLAIM, **options: Any) -> Served:
    chosen = engines.get(engine)
    artefact = "merged_fp16" if chosen.serves == "folder" else "unsloth.Q8_0.gguf"
    return Served(run, HASH, contained(chosen, request, Path("/runs", run, artefact)), storage, Options(**options))


def _made(flavour: str, served: Served) -> list[dict[str, Any]]:
    """As a reader of the file finds them."""
    made = FLAVOURS[flavour](served)
    found = read(to_yaml(made, ["Made by: a test"]))
    assert found == json.loads(json.dumps(made))
    return found


def _pods(made: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """The pod specs in manifests."""
    spec = made[0]["spec"]
    group = spec.get("leaderWorkerTemplate")
    templates = [group["leaderTemplate"], group["workerTemplate"]] if group else [spec["template"]]
    return [template.get("spec", template) for template in templates]


def _every_case() -> list[Any]:
    cases = [("deployment", engine, machine, 1) for engine in ("vllm", "sglang", "llamacpp", "ollama") for machine in MACHINES]
    cases += [("lws", "vllm", machine, 2) for machine in TOO_LARGE] + [("kserve", "vllm", machine, 1) for machine in MACHINES]
    return [case for case in cases if case[1:3] != ("sglang", "cpu-4c-16g")]


@pytest.mark.parametrize(("flavour", "engine", "machine", "nodes"), _every_case())
def test_strict_schemas_accept_every_flavour(flavour: str, engine: str, machine: str, nodes: int) -> None:
    shape = TOO_LARGE[machine] if nodes > 1 else "granite-4.0-350m"
    request = _request(engine, machine, shape=shape, nodes=nodes)
    key = {"secret": "llm-keys"} if engines.get(engine).key_variable else {}
    scaled = {"most": 4} if engines.get(engine).container.queue and flavour != "kserve" else {}  # type: ignore[union-attr]
    for served in (
        _served(engine, request),
        _served(engine, request, replicas=2, runtime_class="nvidia", **key, **scaled),
        *([] if flavour == "kserve" else [_served(engine, request, storage=IMAGE)]),
    ):
        made = _made(flavour, served)
        assert [(v, one["kind"], errors(one, v)) for v in VERSIONS for one in made if errors(one, v)] == []
        assert "ScaledObject" in {one["kind"] for one in made} or not served.options.most
        _one_address(flavour, served, made)
        _hardened(served, made)


def _one_address(flavour: str, served: Served, made: list[dict[str, Any]]) -> None:
    """Names and labels fit, and what selects pods selects by the manifest hash."""
    for one in made:
        name, labels = one["metadata"]["name"], one["metadata"]["labels"]
        assert re.fullmatch(r"[a-z]([a-z0-9-]*[a-z0-9])?", name) and len(name) <= 45
        assert all(re.fullmatch(r"[A-Za-z0-9]([A-Za-z0-9._-]{0,61}[A-Za-z0-9])?", value) for value in labels.values())
        assert one["metadata"]["annotations"]["granite-pipeline.dev/manifest-sha256"] == HASH
        assert HASH[:12] in name
    assert len({(one["kind"], one["metadata"]["name"]) for one in made}) == len(made)
    if flavour != "kserve":
        service, every = [one["spec"] for one in made if one["kind"] == "Service"]
        assert every == {**service, "clusterIP": "None"}
    kinds = {one["kind"]: one["spec"] for one in made}
    hashed = {"granite-pipeline.dev/manifest": HASH[:63], "app.kubernetes.io/instance": served.name}
    if flavour != "kserve":
        template = (
            kinds["Deployment"]["template"]
            if flavour == "deployment"
            else kinds["LeaderWorkerSet"]["leaderWorkerTemplate"]["leaderTemplate"]
        )
        assert kinds["Service"]["selector"].items() <= template["metadata"]["labels"].items()
        assert hashed.items() <= kinds["Service"]["selector"].items()
        assert kinds["NetworkPolicy"]["podSelector"]["matchLabels"] == hashed
        assert kinds["NetworkPolicy"]["ingress"][0]["from"][0]["podSelector"]["matchLabels"] == {
            "granite-pipeline.dev/client": "true"
        }
    if flavour == "deployment":
        assert kinds["Deployment"]["selector"]["matchLabels"] == hashed
        assert ("replicas" in kinds["Deployment"]) == ("ScaledObject" not in kinds)
    assert kinds["PodDisruptionBudget"]["selector"]["matchLabels"] == hashed


def _hardened(served: Served, made: list[dict[str, Any]]) -> None:
    """Bytes are checked first and mounted read-only, nothing runs as root, keys come by reference."""
    for pod in _pods(made):
        (check,) = pod["initContainers"]
        args = check["args"]
        assert check["command"] == ["granite-pipeline", "check"]
        assert dict(zip(args[::2], args[1::2], strict=True)) == {
            "--run": "mine",
            "--output": "/runs",
            "--manifest": HASH,
            "--engine": served.inside.engine.name,
        }
        assert pod["securityContext"]["runAsNonRoot"] is True and pod["securityContext"]["runAsUser"] == 1000
        assert pod["automountServiceAccountToken"] is False
        assert check["securityContext"]["readOnlyRootFilesystem"] is True
        for container in (check, *(c for c in pod["containers"] if c["name"] != "main")):
            (run,) = [mount for mount in container["volumeMounts"] if mount["name"] == "runs"]
            assert (run["mountPath"], run["readOnly"]) == ("/runs/mine", True)
            assert run.get("subPath") == (None if served.storage.image else "runs/mine")
            assert container["securityContext"]["allowPrivilegeEscalation"] is False
            assert container["securityContext"]["capabilities"] == {"drop": ["ALL"]}
        (volume,) = [volume for volume in pod["volumes"] if volume["name"] == "runs"]
        assert volume.get("persistentVolumeClaim", {"readOnly": True})["readOnly"] is True
        (server,) = pod["containers"]
        # the hook that puts NVIDIA's driver into a container writes to its root file system
        assert server.get("securityContext", {}).get("readOnlyRootFilesystem") in (None, served.gpus == 0)
        assert server["resources"].get("limits", {}).get("nvidia.com/gpu", 0) == served.gpus
        by_reference = {one["name"]: one["valueFrom"] for one in server["env"] if "valueFrom" in one}
        key = served.inside.engine.key_variable
        wanted = {"secretKeyRef": {"name": "llm-keys", "key": key}} if served.options.secret else None
        assert by_reference.get(key) == wanted
        assert not [one for one in server["env"] if one["name"] == key and "value" in one]


@pytest.mark.parametrize("machine", MACHINES)
def test_a_pod_has_the_gpus_that_are_planned(machine: str) -> None:
    assert _served("vllm", _request("vllm", machine)).gpus == GPUS[machine]
    assert _served("llamacpp", _request("llamacpp", machine)).gpus == GPUS[machine]


def test_a_model_split_over_gpus_gets_them_all() -> None:
    assert _served("vllm", _request("vllm", "2xl4", shape="granite-4.1-30b", quantization="fp8")).gpus == 2
    assert _served("llamacpp", _request("llamacpp", "4xl4", shape="granite-4.1-30b")).gpus in (2, 3)
    assert _served("vllm", _request("vllm", "2xl4", shape="granite-4.0-h-small", nodes=2)).gpus == 2


@pytest.mark.parametrize(("flavour", "engine", "machine", "nodes"), [case for case in _every_case() if case[0] != "kserve"])
def test_a_container_is_told_what_the_plan_says(flavour: str, engine: str, machine: str, nodes: int) -> None:
    """One copy of argv: that of ``plan`` and ``serve``, with the model at its place in the pod."""
    chosen, shape = engines.get(engine), TOO_LARGE[machine] if nodes > 1 else "granite-4.0-350m"
    request = _request(engine, machine, shape=shape, nodes=nodes, name="soc $(HOME)")
    served = _served(engine, request)
    placed = replace(request, model=replace(request.model, path=served.inside.request.model.path))
    plan = chosen.plan(placed)
    launch = chosen.launch(plan, placed, host="0.0.0.0", port=chosen.default_port)
    planned = launch.argv[len(chosen.program()) :]
    leader, *workers = [pod["containers"][0] for pod in _pods(_made(flavour, served))]
    group = {"LWS_LEADER_ADDRESS": "mine-0.mine", "LWS_WORKER_INDEX": "1"}
    words = tuple(expanded(word, {"HOME": "/tmp", **group}) for word in leader["args"])
    ranked = ("--node-rank", "0", "--master-addr", "mine-0.mine") if nodes > 1 else ()
    drain = chosen.container.drain  # type: ignore[union-attr]
    if nodes > 1:
        assert words == (*planned[:-4], *ranked, *planned[-4:], *drain)
    else:
        assert words == (*planned, *drain)
    values = {one["name"]: expanded(one["value"], {}) for one in leader["env"] if "value" in one}
    assert launch.env.items() <= values.items()
    for worker in workers:
        words = tuple(expanded(word, group) for word in worker["args"])
        assert words == (*planned[:-4], "--node-rank", "1", "--master-addr", "mine-0.mine", "--headless", *drain)
        assert not {"ports", "livenessProbe", "readinessProbe", "startupProbe"} & set(worker)


@pytest.mark.parametrize("name", ODD)
def test_whatever_a_model_is_called_arrives_as_one_word(name: str) -> None:
    if not name.strip():
        return
    for engine, flag in (("vllm", "--served-model-name"), ("llamacpp", "--alias")):
        made = _made("deployment", _served(engine, _request(engine, "l4", name=name)))
        args = [expanded(word, {"HOME": "/root", "X": "x"}) for word in _pods(made)[0]["containers"][0]["args"]]
        assert args[args.index(flag) + 1] == name
        assert [one["kind"] for one in made] == ["Deployment", "Service", "Service", "PodDisruptionBudget", "NetworkPolicy"]


def test_ollamas_model_is_made_before_the_pod_is_ready_and_its_name_is_no_script() -> None:
    made = _made("deployment", _served("ollama", _request("ollama", "l4", name="x'; id; $(y) \"")))
    words = _pods(made)[0]["containers"][0]["lifecycle"]["postStart"]["exec"]["command"]
    assert words[:2] == ["sh", "-c"]
    assert words[3:] == ["/runs/mine", "ollama", "create", "x'; id; $(y) \"", "-f", "Modelfile"]


def test_ollamas_script_waits_and_hands_the_words_on(tmp_path: Path) -> None:
    """The real script in a real shell, with a program that is not up at first and writes down what it was given."""
    made = _made("deployment", _served("ollama", _request("ollama", "l4", name="x'; id; $(y) \"")))
    words = _pods(made)[0]["containers"][0]["lifecycle"]["postStart"]["exec"]["command"]
    program = tmp_path / "ollama"
    program.write_text(
        '#!/bin/sh\nif [ "$1" = list ]; then [ -e up ] && exit 0; touch up; exit 1; fi\npwd > said; printf "%s\\n" "$@" >> said\n'
    )
    program.chmod(0o755)
    place = tmp_path / "a run"
    place.mkdir()
    words[3] = str(place)
    subprocess.run(words, env={"PATH": f"{tmp_path}:/usr/bin:/bin"}, check=True, timeout=20)
    assert (place / "said").read_text().splitlines() == [str(place), "create", "x'; id; $(y) \"", "-f", "Modelfile"]


@pytest.mark.parametrize("name", [name for name in ODD if not re.fullmatch(r"[A-Za-z0-9_@%+=:,./-]+", name) and name])
def test_kserve_gets_no_word_that_its_shell_would_change(name: str) -> None:
    with pytest.raises(InputError, match="through a shell"):
        FLAVOURS["kserve"](_served("vllm", _request("vllm", "l4", name=name)))


@pytest.mark.parametrize("machine", MACHINES)
def test_kserves_arguments_survive_eval(machine: str) -> None:
    """As its start script does it, in a real bash."""
    container = _pods(_made("kserve", _served("vllm", _request("vllm", machine))))[0]["containers"][0]
    assert container["name"] == "main"
    assert not [word for word in container["args"] if set(word) & set(" {}\"'`$\\;&|<>()*?#~!\n")]
    assert not {"--model", "--served-model-name", "--tensor-parallel-size", "--host", "--port"} & set(container["args"])
    script = "eval \"printf '%s\\n' vllm serve /mnt/models $@\""
    done = subprocess.run(["bash", "-c", script, "--", *container["args"]], capture_output=True, text=True, check=True)
    assert done.stdout.splitlines() == ["vllm", "serve", "/mnt/models", *container["args"]]


def test_kserve_refuses_a_list_that_no_flag_without_braces_can_say() -> None:
    request = _request("vllm", "l4", hf_overrides='{"architectures": ["A"]}')
    with pytest.raises(InputError, match="through a shell"):
        FLAVOURS["kserve"](_served("vllm", request))


def test_llama_cpps_words_are_its_own() -> None:
    for machine in MACHINES:
        args = _pods(_made("deployment", _served("llamacpp", _request("llamacpp", machine))))[0]["containers"][0]["args"]
        assert xllamacpp_parser().parse_args(args).alias == "soc"


# as `vllm serve` reads them: the parser of its command line, and what it makes of the values
_PARSE = """
import json, sys
from vllm.entrypoints.cli.serve import ServeSubcommand
try:
    from vllm.utils.argparse_utils import FlexibleArgumentParser
except ImportError:
    from vllm.utils import FlexibleArgumentParser
parser = FlexibleArgumentParser()
ServeSubcommand().subparser_init(parser.add_subparsers(required=True, dest="subparser"))
for line in sys.stdin:
    found = vars(parser.parse_args(["serve", *json.loads(line)]))
    print("READ" + json.dumps(found, default=str))
"""


@pytest.mark.slow
def test_vllms_own_parser_reads_the_same_from_every_flavour() -> None:
    if not engines.get("vllm").available().usable:
        pytest.skip("vLLM is not installed")
    asked: list[tuple[str, list[str]]] = []
    for machine in MACHINES:
        request = _request("vllm", machine)
        (plain,) = _pods(_made("deployment", _served("vllm", request)))
        (kserve,) = _pods(_made("kserve", _served("vllm", request)))
        ahead = ["/runs/mine/merged_fp16", "--served-model-name", "soc", "--port", "8000"]
        asked += [("deployment", plain["containers"][0]["args"]), ("kserve", [*ahead, *kserve["containers"][0]["args"]])]
    for machine, shape in TOO_LARGE.items():
        pods = _pods(_made("lws", _served("vllm", _request("vllm", machine, shape=shape, nodes=2))))
        group = {"LWS_LEADER_ADDRESS": "mine-0.mine", "LWS_WORKER_INDEX": "1"}
        asked += [(f"rank {rank}", [expanded(w, group) for w in pod["containers"][0]["args"]]) for rank, pod in enumerate(pods)]
    lines = "".join(json.dumps(words) + "\n" for _, words in asked)
    done = subprocess.run([sys.executable, "-c", _PARSE], input=lines, capture_output=True, text=True, timeout=300, check=False)
    found = [json.loads(line.removeprefix("READ")) for line in done.stdout.splitlines() if line.startswith("READ")]
    assert len(found) == len(asked), done.stderr[-3000:]
    for (flavour, _), read_as in zip(asked, found, strict=True):
        assert read_as["model_tag"] == "/runs/mine/merged_fp16"
        assert read_as["served_model_name"] == ["soc"]
        assert read_as["override_generation_config"] == {"temperature": 0, "top_p": 1}
        assert "disable_any_whitespace=True" in str(read_as["structured_outputs_config"]).replace(": ", "=").replace("'", "")
        if flavour.startswith("rank"):
            assert (read_as["node_rank"], read_as["headless"]) == (int(flavour[-1]), flavour == "rank 1")
            assert (read_as["nnodes"], read_as["master_addr"], read_as["shutdown_timeout"]) == (2, "mine-0.mine", 60)
    same = set(found[0]) - {"host", "port", "shutdown_timeout", "model", "model_tag"}
    for plain_read, kserve_read in zip(found[0:8:2], found[1:8:2], strict=True):
        assert {name: plain_read[name] for name in same} == {name: kserve_read[name] for name in same}


@pytest.mark.parametrize(
    ("flavour", "engine", "machine", "more", "words"),
    [
        ("lws", "llamacpp", "l4", {}, "is not planned over several machines"),
        ("lws", "vllm", "l4", {}, "for a model over several nodes"),
        ("kserve", "llamacpp", "l4", {}, "does not start llama.cpp"),
        ("kserve", "ollama", "l4", {}, "does not start Ollama"),
        ("kserve", "sglang", "l4", {}, "does not start SGLang"),
        ("kserve", "vllm", "l4", {"storage": IMAGE}, "not KServe's kind of image"),
        ("kserve", "vllm", "l4", {"most": 3}, "scales by settings of its own"),
        ("deployment", "llamacpp", "l4", {"most": 3}, "no queue to scale by"),
        ("deployment", "ollama", "l4", {"secret": "keys"}, "asks for no key"),
        ("deployment", "vllm", "l4", {"secret": "No Secret"}, "cannot be a name"),
        ("deployment", "vllm", "l4", {"image": "a b"}, "cannot be a name"),
        ("deployment", "vllm", "l4", {"replicas": 3, "most": 2}, "is less than"),
        ("deployment", "llamacpp", "m2-16g", {}, "for GPUs of apple"),
    ],
)
def test_what_cannot_be_is_refused_with_a_remedy(
    flavour: str, engine: str, machine: str, more: dict[str, Any], words: str
) -> None:
    with pytest.raises(InputError, match=words) as caught:
        FLAVOURS[flavour](_served(engine, _request(engine, machine), **more))
    assert caught.value.remedy


def test_several_nodes_are_refused_where_one_is_enough_and_in_flavours_that_have_one() -> None:
    with pytest.raises(EngineError) as caught:
        _served("vllm", _request("vllm", "8xh100", nodes=2))
    assert "one node holds this model" in caught.value.evidence
    large = _served("vllm", _request("vllm", "2xl4", shape="granite-4.0-h-small", nodes=2))
    for flavour in ("deployment", "kserve"):
        with pytest.raises(InputError, match=r"on one node|on several nodes") as refused:
            FLAVOURS[flavour](large)
        assert "--flavour lws" in refused.value.remedy


def test_an_engine_elsewhere_and_a_plan_that_does_not_fit_are_refused() -> None:
    with pytest.raises(InputError, match="not run in a container"):
        contained(engines.get("openai"), _request("openai", "l4"), Path("/runs/mine"))
    with pytest.raises(EngineError, match="cannot serve this model"):
        _served("vllm", _request("vllm", "l4", shape="granite-4.0-h-small"))
    with pytest.raises(EngineError):
        _served("sglang", _request("sglang", "cpu-4c-16g"))


@pytest.mark.parametrize(
    "text",
    ["", "shared", "pvc://", "pvc://Shared", "pvc://a b", "pvc://a/../b", "pvc://a/b c", "image://reg/mine", "image://reg/mine:1.0", "image://reg/mine@sha256:abc", "s3://bucket", "pvc://a/\nb"],
)  # fmt: skip
def test_storage_that_is_none_is_refused(text: str) -> None:
    with pytest.raises(InputError, match="no place for a run folder"):
        Storage.of(text)


@pytest.mark.parametrize("run", ["a", "0", "Triage_v2.1", "x" * 64, "9" + "-" * 60 + "z", "a.-_b", "UPPER", "a" * 26 + "-b"])
def test_any_run_has_a_name_in_the_cluster(run: str) -> None:
    assert re.fullmatch(r"[a-z]([a-z0-9-]{0,25}[a-z0-9])?", dns_label(run))


# --- sweeps --------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("gpus", [None, 0.5, 2])
def test_a_sweep_is_an_indexed_job_that_both_schemas_accept(gpus: float | None) -> None:
    sweep = Sweep("sweeps/triage.yaml", "1e3" * 21 + "0", 100, 4, gpus, 23.5)
    job = sweep_job(sweep, CLAIM, Options(image="reg.example/granite:1", runtime_class="nvidia"), 8, "team-a")
    assert [errors(job, version) for version in VERSIONS] == [[], []]
    assert read(to_yaml([job], [])) == [job]
    spec = job["spec"]
    assert (spec["completionMode"], spec["completions"], spec["parallelism"]) == ("Indexed", 100, 8)
    assert (spec["backoffLimitPerIndex"], spec["maxFailedIndexes"], spec["podReplacementPolicy"]) == (6, 100, "Failed")
    ignore, fail = spec["podFailurePolicy"]["rules"]
    assert (ignore["action"], ignore["onPodConditions"][0]["type"]) == ("Ignore", "DisruptionTarget")
    assert (fail["action"], fail["onExitCodes"]["values"]) == ("FailIndex", [1, 2])
    pod = spec["template"]["spec"]
    assert pod["restartPolicy"] == "Never"
    (container,) = pod["containers"]
    assert fail["onExitCodes"]["containerName"] == container["name"]
    words = [expanded(word, {"JOB_COMPLETION_INDEX": "7"}) for word in container["args"]]
    assert words == ["/runs/sweeps/triage.yaml", "--index", "7", "--output", "/runs"]
    assert container["resources"].get("limits", {}).get("nvidia.com/gpu") == {None: None, 0.5: 1, 2: 2}[gpus]
    assert container["resources"]["requests"] == {"cpu": "4", "memory": "24Gi"}
    assert job["metadata"]["labels"]["kueue.x-k8s.io/queue-name"] == "team-a"


def test_a_sweep_needs_a_folder_that_can_be_written_and_a_file_that_has_a_plain_name() -> None:
    with pytest.raises(InputError, match="cannot be written"):
        sweep_job(Sweep("s.yaml", HASH, 1), IMAGE, Options(), 0)
    for file in ("../s.yaml", "a b.yaml", "$(x).yaml"):
        with pytest.raises(InputError, match="cannot be a name"):
            sweep_job(Sweep(file, HASH, 1), CLAIM, Options(), 0)


def test_the_judges_catch_what_is_wrong() -> None:
    """The tests above can fail: an unknown field, a wrong type and an unknown kind are told, all of them at once."""
    (deployment, *_) = FLAVOURS["deployment"](_served("vllm", _request("vllm", "l4")))
    pod = deployment["spec"]["template"]["spec"]
    pod["nodeSelektor"], pod["containers"][0]["args"][1] = {}, 7
    found = errors(deployment, "1.37.0")
    assert len(found) == 2 and "nodeSelektor" in "".join(found)
    (group, *_) = FLAVOURS["lws"](_served("vllm", _request("vllm", "2xl4", shape="granite-4.0-h-small", nodes=2)))
    group["spec"]["leaderWorkerTemplate"]["workerTemplate"]["spec"]["containers"][0]["imagine"] = "x"
    group["spec"]["replica"] = 1
    assert len(errors(group, "1.33.0")) == 2
    with pytest.raises(FileNotFoundError):
        errors({"apiVersion": "apps/v1", "kind": "Deploiment"}, "1.37.0")
    assert "literal" in leaves({"a": ["literal"]})
