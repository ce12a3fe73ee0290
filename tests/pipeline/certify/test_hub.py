"""The model card and the list of files to publish."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import yaml
from typer.testing import CliRunner

from pipeline.certify import certificate as made
from pipeline.certify.hub import plan, redacted, require_current_certificate
from pipeline.certify.publish import plain, write_card
from pipeline.cli import app
from pipeline.errors import InputError
from pipeline.report import certificate
from pipeline.report.check import held
from pipeline.runs.folder import RunFolder
from pipeline.runs.manifest import Manifest

LINKS = ("adapter", "gguf", "served", "tuned", "stops", "custody")


@pytest.fixture
def exported(run: RunFolder) -> RunFolder:
    """A run folder with every file there, small, and a manifest about them."""
    for path in (run.adapter / "adapter_model.safetensors", run.adapter / "README.md", run.merged / "config.json", run.gguf, run.modelfile, run.heldout):  # fmt: skip
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(path.name)
    parameters = {"method": "lora", "rank": 16, "base": "/home/someone/models/base", "data": "soc"}
    inputs: dict[str, Any] = {
        "parameters": parameters,
        "base": {"id": "/home/someone/models/base", "revision": None, "sha256": "b" * 64},
        "data": {"train": "d" * 64},
    }
    manifest = Manifest(run.manifest)
    manifest.record("finetune", inputs, [run.adapter, run.heldout], {"rows": {"train": 40}}, 1.0)
    manifest.record("merge", {}, [run.merged], {}, 1.0)
    manifest.record("evaluate_tuned", {}, [], {"n": 12, "exact": 0.9, "json_valid": 1.0, "finish_stop": 1.0}, 1.0)
    return run


def _certify(run: RunFolder, ok: bool = True, *, offline: bool = False, links: tuple[str, ...] = LINKS) -> None:
    from pipeline.certify.certificate import hashes

    finding = held("merge.tensors", ok, "a | b <script>", "1", "IEEE 754")
    others = [held(f"{key}.x", True, "", "", "") for key in links]
    made.save(made.make(run, [finding, *others], {"artefacts": hashes(run)}, offline=offline), run.certificate)


def _export_again(run: RunFolder) -> None:
    _certify(run)
    run.gguf.write_text("other")


def _forge(run: RunFolder) -> None:
    """A failed certificate made to say that it passed."""
    _certify(run, ok=False)
    path = run.certificate / "certificate.json"
    path.write_text(path.read_text().replace('"failed"', '"passed"'))


def test_the_card_has_front_matter_for_the_hub_and_no_path_of_this_machine(exported: RunFolder) -> None:
    _certify(exported)
    text = write_card(exported).read_text()
    front = yaml.safe_load(text.split("---\n")[1])
    assert front["model-index"][0]["results"][0]["metrics"] == [
        {"type": "exact", "value": 0.9}, {"type": "json_valid", "value": 1.0}, {"type": "finish_stop", "value": 1.0},
    ]  # fmt: skip
    assert "base_model" not in front
    assert "/home/someone" not in text
    assert "base fine-tuned with lora on 40 rows" in text
    assert r"| 2 merge.tensors | proven | a \| b \<script\> | 1 |" in text


def test_after_a_file_changed_card_and_summary_say_that_the_certificate_is_about_others(exported: RunFolder) -> None:
    _certify(exported)
    seen = certificate.summary(exported)
    assert seen and seen["current"]
    assert "Every link holds. Made" in write_card(exported).read_text()
    exported.gguf.write_text("other")
    seen = certificate.summary(exported)
    assert seen and not seen["current"]
    assert r"**No longer about these files**: unsloth.Q8\_0.gguf changed" in write_card(exported).read_text()


def test_an_offline_certificate_stands_beside_a_fuller_one(exported: RunFolder) -> None:
    _certify(exported)
    before = (exported.certificate / "certificate.json").read_bytes()
    offline = made.make(exported, [held("merge.tensors", True, "", "1", "")], {}, offline=True)
    assert made.save(offline, exported.certificate).name == "offline.json"
    assert (exported.certificate / "certificate.json").read_bytes() == before
    (exported.certificate / "certificate.json").unlink()
    assert made.save(offline, exported.certificate).name == "certificate.json"


def test_a_public_key_without_offline_is_refused(exported: RunFolder, tmp_path: Path) -> None:
    words = ["certify", "--run", exported.name, "--output", str(exported.output), "--public-key", str(tmp_path / "k.pem")]
    done = CliRunner().invoke(app, words)
    assert isinstance(done.exception, InputError)
    assert "--offline" in str(done.exception)


def test_without_a_certificate_the_card_says_so(exported: RunFolder) -> None:
    assert "None yet" in write_card(exported).read_text()


def test_text_in_a_card_is_text() -> None:
    assert plain("*a*\n[x](y)\u202e") == r"\*a\* \[x\](y)‹U+202E›"


def test_the_plan_lists_weights_card_certificate_and_adapter(exported: RunFolder) -> None:
    _certify(exported)
    assert [upload.path for upload in plan(exported)] == [
        "README.md", "manifest.json", "certificate.json", "config.json", "unsloth.Q8_0.gguf", "Modelfile", "adapter/adapter_model.safetensors",
    ]  # fmt: skip
    with pytest.raises(InputError, match="no part 'weights'"):
        plan(exported, ("weights",))


def test_what_is_uploaded_says_nothing_of_this_machine_nor_of_the_user_s_own_prompts(exported: RunFolder) -> None:
    with Manifest(exported.manifest).changing() as data:
        data["served"] = {"llamacpp": {"argv": ["/home/someone/llama-server"], "env": {"MINE": "private"}}}
        data["starts"] = [{"attempts": [{"log": "/home/someone/logs/one.log", "failed": "private"}]}]
    case = {"name": "private prompt", "passed": False, "answer": "private answer"}
    own = held("own.llamacpp_mine", True, "first that is not: 'private prompt'", "", "/home/someone/mine.yaml", cases=[case])
    subject = {"parameters": {"base": "/home/someone/models/base", "data": "hub:me/set"}}
    whole = made.make(exported, [own, held("served.x", True, "it loaded /home/someone/a b", "", "")], subject, offline=False)
    made.save(whole, exported.certificate)
    sent = {
        upload.path: upload.file.read_text()
        for upload in plan(exported)
        if upload.path.endswith("te.json") or upload.path == "manifest.json"
    }
    assert set(sent) == {"manifest.json", "certificate.json"}
    for text in sent.values():
        assert "/home" not in text
        assert "private" not in text
    assert f'"id": "{whole.id}"' in sent["certificate.json"]
    assert "hub:me/set" in sent["certificate.json"]
    # the run's own files stay whole
    assert "private prompt" in (exported.certificate / "certificate.json").read_text()
    assert redacted("see https://a.b/c/d or ./x/y, 1/2") == "see https://a.b/c/d or ./x/y, 1/2"
    assert redacted("~/models/base and /srv/data.jsonl:3") == "base and data.jsonl:3"


@pytest.mark.parametrize(
    ("prepare", "words"),
    [
        (lambda run: None, "has no certificate"),
        (lambda run: _certify(run, ok=False), r"not certified: merge\.tensors"),
        (_forge, "its id is not that of its content"),
        (lambda run: _certify(run, offline=True), "from files alone"),
        (lambda run: _certify(run, links=LINKS[:-1]), "nothing is proven for link 7, chain of custody"),
        (lambda run: (run.certificate.mkdir(), (run.certificate / "certificate.json").write_text("[]")), "is not a certificate"),
        (_export_again, r"unsloth\.Q8_0\.gguf has changed"),
    ],
)
def test_only_what_is_certified_is_pushed(exported: RunFolder, prepare: Any, words: str) -> None:
    prepare(exported)
    with pytest.raises(InputError, match=words):
        require_current_certificate(exported)


def test_a_dry_run_uploads_nothing(exported: RunFolder, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    import huggingface_hub

    _certify(exported)
    monkeypatch.setattr(huggingface_hub.HfApi, "create_repo", lambda *_, **__: pytest.fail("asked the hub"))
    words = ["push", "me/granite", "--run", exported.name, "--output", str(exported.output), "--dry-run", "--json"]
    done = CliRunner().invoke(app, words)
    assert done.exit_code == 0, done.output
    assert '"dry_run": true' in done.output
    assert "certificate.json" in done.output
