"""What a sweep's spec may say, and that everything wrong in it is refused before anything starts, by file, line and key."""

from __future__ import annotations

import json
import re
import textwrap
from pathlib import Path

import pytest
from typer.testing import CliRunner

from pipeline.cli import app
from pipeline.commands import run as verb
from pipeline.commands.sweep import _check
from pipeline.errors import InputError
from pipeline.sweep import spec


@pytest.fixture
def load(tmp_path: Path) -> object:
    (tmp_path / "a.jsonl").write_text("{}")
    (tmp_path / "b.jsonl").write_text("{}")

    def loaded(text: str, name: str = "sweep.yaml") -> spec.Sweep:
        path = tmp_path / name
        path.write_text(textwrap.dedent(text))
        return spec.load(path, _check)

    return loaded


def test_named_runs_times_a_grid(load, tmp_path: Path) -> None:
    found = load("""
        data: a.jsonl
        parameters: {EPOCHS: 2}
        runs:
          triage: {RANK: 32}
          phishing: {DATA: b.jsonl, EPOCHS: 3}
        grid: {SEED: [1, 2], LEARNING_RATE: [2e-4]}
        resources: {cpus: 2, gpus: 0.5, memory_gib: 8}
    """)
    names = [run.name for run in found.runs]
    assert names == [f"{run}-SEED{seed}-LEARNING_RATE0.0002" for run in ("triage", "phishing") for seed in (1, 2)]
    assert found.runs[3].parameters == {
        "EPOCHS": 3, "DATA": str(tmp_path / "b.jsonl"), "SEED": 2, "LEARNING_RATE": 0.0002,
    }  # fmt: skip
    assert (found.stages, found.metric) == (("01_finetune", "02_export"), "exact")
    assert found.resources == spec.Resources(2, 0.5, 8)
    assert set(found.varied) == {"RANK", "EPOCHS", "DATA", "SEED"}


def test_a_grid_alone_has_the_specs_name(load) -> None:
    found = load("grid: {METHOD: [lora, full]}\nstages: 01_finetune", "rates.yaml")
    assert [run.name for run in found.runs] == ["rates-METHODlora", "rates-METHODfull"]
    assert found.metric == "eval_loss"


def test_the_verb_reads_back_what_a_run_is_given(load, tmp_path: Path) -> None:
    """What is written as words is what ``run`` makes of them: text that looks like a number stays text."""
    found = load("""
        runs:
          one: {COLUMNS: "prompt=q,completion=a", IGNORE: [x, "y,z"], REVISION: "1.0", SKIP_BAD: true, EVAL_DATA: null, RANK: 8}
        stages: [01_finetune]
    """)
    words = found.runs[0].argv(found.stages, tmp_path)
    given = dict(verb._assignment(words[i + 1]) for i, word in enumerate(words) if word == "-p")
    assert given == dict(found.runs[0].parameters)
    assert words[:7] == ["run", "--name", "one", "--output", str(tmp_path), "--stages", "01_finetune"]


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("", "holds no sweep"),
        ("- a", "is not a mapping"),
        ("runs: {a: {}}\nrun: {}", ":2: run: no such key.*did you mean runs"),
        ("parameters: {EPOCHS: 1}", "names no run"),
        ("runs:\n  a: {EPOCH: 2}", ":2: runs.a.EPOCH: no notebook has a parameter 'EPOCH'.*did you mean EPOCHS"),
        ("runs: {a: {}}\nparameters: {BACKENDS: [vllm]}", ":2: parameters.BACKENDS: no notebook has a parameter"),
        ("runs: {a: {BACKENDS: [vlm]}}\nstages: [04_verify]", "runs.a.BACKENDS: no engine 'vlm'"),
        ("runs: {a: {BACKENDS: vllm}}\nstages: [04_verify]", "runs.a.BACKENDS: 'vllm' is not a list"),
        ("runs:\n  a: {}\n  b: {RANK: 0}", ":3: runs.b.RANK: rank=0 must be a whole number"),
        ("runs: {a: {RANK: true}}", "runs.a.RANK: True is not a number"),
        ("runs: {a: {SKIP_BAD: 1}}", "runs.a.SKIP_BAD: 1 is not true or false"),
        ("runs: {a: {METHOD: loar}}", "runs.a.METHOD: method='loar' is not known"),
        ("grid:\n  SEED: [1, -2]", r":2: grid.SEED\[1\]: seed=-2 must be"),
        ("grid:\n  SEED: 7", ":2: grid.SEED: 7 is not a list"),
        ("grid:\n  SEED: []", "grid.SEED: .* is not a list of values"),
        ("grid: {SEED: [1, 2, 1]}", r"grid.SEED\[2\]: 1 is there twice"),
        ("grid: [SEED]", "grid: .* is not a mapping"),
        ("runs: {a: {SEED: 1}}\ngrid: {SEED: [1, 2]}", ":2: grid.SEED: runs.a gives SEED too"),
        ("parameters: {SEED: 1}\ngrid: {SEED: [1, 2]}", "grid.SEED: parameters gives SEED too"),
        ("data: a.jsonl\nparameters: {DATA: b.jsonl}\nruns: {a: }", ":2: parameters.DATA: data says it already"),
        ("runs:\n  a: {RANK: 4}\n  b: {}\n  a: {RANK: 8}", ":4: runs.a: a is there twice"),
        ("runs: {a: {RANK: 4, RANK: 8}}", "runs.a.RANK: RANK is there twice"),
        ("grid: {REVISION: ['x y', 'x-y']}", "its run sweep-REVISIONx-y has the name of grid REVISION="),
        ("runs: {a-SEED1: {}, a: {}}\ngrid: {RANK: [1]}\nparameters: {NAME: x}", "parameters.NAME: NAME is not a sweep's to give"),
        ("runs: {a: {FORCE: true}}", "runs.a.FORCE: FORCE is not a sweep's to give.*--force"),
        ("runs: {../a: {}}", "runs.../a: run name '../a' is not usable"),
        (f"runs: {{{'a' * 60}: {{}}}}\ngrid: {{SEED: [1234]}}", "run name 'a+-SEED1234' is not usable"),
        ("runs: {sweep.json: {}}", "runs.sweep.json: a run cannot be called sweep.json"),
        ("runs: {on: {}}", ":1: runs.True: the name 'on' is read as True, not as text.*quote it"),
        ("runs: {a: {REVISION: 2026-01-01}}", "runs.a.REVISION: '2026-01-01' is read as a date.*quote it"),
        ("runs: {a: 5}", "runs.a: 5 is not a mapping"),
        ("runs: {a: {DATA: nowhere.jsonl}}", "runs.a.DATA: there is no /.*nowhere.jsonl"),
        ("runs: {a: {}}\nbase: ./nowhere", ":2: base: there is no /"),
        ("runs: {a: {}}\nstages: [01_finetune, 02_exprot]", ":2: stages: no notebook '02_exprot'"),
        ("runs: {a: {}}\nstages: {}", "stages: {} is not a list"),
        ("runs: {a: {}}\nresources: {gpu: 1}", "resources.gpu: no such key.*did you mean gpus"),
        ("runs: {a: {}}\nresources: {cpus: 0}", "resources.cpus: 0 is not a number greater than 0"),
        ("runs: {a: {}}\nresources: {gpus: 1.5}", "resources.gpus: 1.5 is not a number"),
        ("runs: {a: {}}\nmetric: exact\nstages: [01_finetune]", ":2: metric: 'exact' is measured by 02_export"),
        ("runs: {a: {}}\nmetric: [1]", "metric: .* is not the name of a score"),
        ("runs: {a: {<<: {RANK: 2}}}", "runs.a.<<: merge keys are not read"),
        ("runs: {a: {RANK: [}}", ":1: not valid YAML"),
        ("a: &a [*a]", "too large or too deep|not valid YAML"),
        ("a: &a [1, 1, 1, 1, 1, 1, 1, 1]\n" + "".join(f"{n}: &{n} [{', '.join([f'*{p}'] * 9)}]\n" for p, n in zip("abcdefg", "bcdefgh", strict=True)), "too large"),
        ("grid:\n" + "".join(f"  {name}: {list(range(1, 101))}\n" for name in ("SEED", "RANK", "ALPHA")), "1,000,000 runs are more than"),
        ("runs: {a: {}}\n# \xff", "UTF-8"),
    ],
)  # fmt: skip
def test_what_is_wrong_is_refused_by_file_and_key(text: str, said: str, tmp_path: Path) -> None:
    path = tmp_path / "sweep.yaml"
    path.write_bytes(text.encode("latin-1"))
    (tmp_path / "a.jsonl").touch()
    (tmp_path / "b.jsonl").touch()
    with pytest.raises(InputError, match=re.escape(str(path))) as refused:
        spec.load(path, _check)
    assert re.search(said, str(refused.value), re.S), refused.value
    assert refused.value.exit_code == 2


def test_a_spec_that_is_not_there(tmp_path: Path) -> None:
    with pytest.raises(InputError, match="nowhere"):
        spec.load(tmp_path / "nowhere.yaml", _check)


def test_nothing_is_started_or_made_by_a_wrong_spec_and_by_a_dry_run(load, tmp_path: Path) -> None:
    load("runs: {a: {DATA: a.jsonl}, b: {DATA: b.jsonl, RANK: 4}}")
    words = ["sweep", str(tmp_path / "sweep.yaml"), "--output", str(tmp_path / "out")]
    shown = CliRunner().invoke(app, [*words, "--dry-run", "--json"])
    assert [run["name"] for run in json.loads(shown.stdout)["runs"]] == ["a", "b"]
    shown = CliRunner().invoke(app, [*words, "--dry-run"])
    assert "│ 1     │ b" in shown.stdout
    for more in (["--index", "2"], ["--index", "-1"], ["--on", "slurm"], ["--export", "worst"]):
        refused = CliRunner().invoke(app, [*words, *more])
        assert isinstance(refused.exception, InputError), more
    assert not (tmp_path / "out").exists()


def test_every_example_in_the_docs_is_a_spec(tmp_path: Path) -> None:
    root = Path(__file__).parents[3]
    for name in ("triage.jsonl", "phishing.jsonl", "heldout.jsonl"):
        (tmp_path / name).touch()
    for example in sorted((root / "docs" / "examples").glob("sweep*.yaml")):
        (tmp_path / example.name).write_text(example.read_text())
        assert spec.load(tmp_path / example.name, _check).runs
