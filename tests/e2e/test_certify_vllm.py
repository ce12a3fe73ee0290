"""The certificate against a real vLLM: the run itself, and a vLLM that serves something else under the right name.

Long: three starts of vLLM. Run with ``pytest -m long tests/e2e/test_certify_vllm.py``.
"""

from __future__ import annotations

import os
import shutil
from collections.abc import Callable
from pathlib import Path

import certified
import pytest
import tamper

from pipeline.certify.certificate import Certificate
from pipeline.config import Settings
from pipeline.engines.vllm.engine import Vllm
from pipeline.engines.vllm.lora import read
from pipeline.runs.folder import RunFolder
from pipeline.serve import start as serving
from pipeline.serve.backends import start
from pipeline.serve.start import Options, Target
from training.certify.certify import Scope, certify

pytestmark = [pytest.mark.long, pytest.mark.slow, pytest.mark.e2e]
SCOPE = Scope(("vllm",), prompts=12, positions=2, keep=False)


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> RunFolder:
    if not Vllm().available().usable:
        pytest.skip("vLLM is not installed")
    return certified.make(tmp_path_factory.mktemp("certified") / "run")


def _broken(certificate: Certificate) -> set[str]:
    return {finding.id for finding in certificate.broken}


def test_an_untouched_run_is_certified_on_vllm(made: RunFolder) -> None:
    certificate = certify(made, Settings(), SCOPE)
    assert (_broken(certificate), certificate.unproven) == (set(), [])


@pytest.mark.parametrize(
    ("spoil", "expected"),
    [
        (lambda run: tamper.base_as_merged(run, run.output.parent / "base"), {"served.vllm_logprobs", "tuned.vllm"}),
        (tamper.other_weights, {"served.vllm_logprobs"}),
    ],
    ids=["the base", "another run"],
)
def test_vllm_serving_something_else_under_the_right_name_is_caught(
    made: RunFolder, tmp_path: Path, spoil: Callable[[RunFolder], object], expected: set[str]
) -> None:
    run = certified.copy(made, tmp_path / "copy")
    kept = tmp_path / "kept"
    shutil.copytree(run.merged, kept)
    spoil(run)
    try:
        started = start(run, "vllm", Settings(), Options(purpose="verify"))
        assert started.endpoint, started.reason
        # the run's files are its own again; only the running server differs
        shutil.rmtree(run.merged)
        shutil.copytree(kept, run.merged)
        certificate = certify(run, Settings(), SCOPE)
    finally:
        serving.stop(run.path, "vllm")
    assert expected <= _broken(certificate)
    assert all(one.startswith(("served.vllm", "tuned.vllm", "stops.vllm")) for one in _broken(certificate))


UNMERGED = Scope(("vllm",), prompts=12, positions=2, unmerged=True)


def test_the_adapter_on_its_base_is_certified_unmerged(made: RunFolder, tmp_path: Path) -> None:
    run = certified.copy(made, tmp_path / "copy")
    certificate = certify(run, Settings(), UNMERGED)
    assert (_broken(certificate), certificate.unproven) == (set(), [])
    assert certificate.subject["served"] == "base + adapter, unmerged"
    file = next(check for check in certificate.checks if check.id == "served.vllm_file")
    assert (file.status, file.figure.startswith("unmerged: base ")) == ("passed", True)
    assert serving.records.running(run.servers) == []


def test_a_server_with_another_adapter_under_the_run_s_name_is_caught(
    made: RunFolder, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    run = certified.copy(made, tmp_path / "copy")
    kept, base = tmp_path / "kept", run.output.parent / "base"
    shutil.copytree(run.adapter, kept)
    tamper.foreign_adapter(run)
    target = Target(base, "base", tmp_path / "shared")
    options = Options("verify", owner=os.getpid(), adapters=(read(run.name, run.adapter),))
    endpoint = serving.serve("vllm", target, options, lambda _: None)
    try:
        shutil.rmtree(run.adapter)
        shutil.copytree(kept, run.adapter)
        monkeypatch.setenv("VLLM_BASE_URL", f"{endpoint.url}/v1")
        certificate = certify(run, Settings(), UNMERGED)
    finally:
        serving.stop(target.folder, "vllm")
    assert "served.vllm_logprobs" in _broken(certificate)
    assert all(one.startswith(("served.vllm", "tuned.vllm", "stops.vllm")) for one in _broken(certificate))
