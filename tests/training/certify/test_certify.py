"""The certificate on a real small run: no false alarm, and every way to spoil it caught and named by the right link."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import certified
import pytest
import tamper

from pipeline.certify.certificate import Certificate
from pipeline.config import Settings
from pipeline.runs.folder import RunFolder
from pipeline.serve import start as serving
from pipeline.serve.backends import start
from pipeline.serve.start import Options
from training.certify.certify import Scope, certify
from training.certify.offline import certify_offline
from training.export import gguf

pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> RunFolder:
    return certified.make(tmp_path_factory.mktemp("certified") / "run")


@pytest.fixture
def run(made: RunFolder, tmp_path: Path) -> RunFolder:
    return certified.copy(made, tmp_path / "copy")


def _base(run: RunFolder) -> Path:
    return run.output.parent / "base"


def _broken(certificate: Certificate) -> list[str]:
    return [finding.id for finding in certificate.broken]


def test_an_untouched_run_is_certified(made: RunFolder) -> None:
    certificate = certify_offline(made)
    assert (_broken(certificate), certificate.unproven) == ([], ["served"])
    assert {link.key for link in certificate.links} == {"adapter", "merge", "gguf", "tuned", "stops", "custody"}
    written = json.loads((made.certificate / "certificate.json").read_text())
    assert (written["id"], written["passed"], written["schema"]) == (certificate.id, True, 1)
    # a second look comes to the same id
    assert certify_offline(made).id == certificate.id


def _gguf_of_the_base(run: RunFolder) -> None:
    """A real conversion of the base, under the run's name."""
    other = RunFolder("other", run.output)
    shutil.copytree(run.merged, other.merged)
    tamper.base_as_merged(other, _base(run))
    gguf.convert(other.merged, run.gguf, name=run.name)


def _leak(run: RunFolder) -> None:
    with (run.output.parent / "train.jsonl").open("a") as handle:
        handle.write((run.output.parent / "held_out.jsonl").read_text().splitlines(keepends=True)[3])


def _newline_in_modelfile(run: RunFolder) -> None:
    tamper.newline_after_role(run.modelfile)


TAMPERS: dict[str, tuple[Callable[[RunFolder], object], str, str]] = {
    "adapter zeroed": (tamper.zero_adapter, "adapter.moved", "28 zero"),
    "adapter of another run": (tamper.foreign_adapter, "merge.tensors", "another run's adapter"),
    "merge of the base only": (lambda run: tamper.base_as_merged(run, _base(run)), "merge.tensors", "the adapter was not merged"),
    "one merged tensor by 1 %": (tamper.perturb_one_tensor, "merge.tensors", tamper.PERTURBED),
    "two layers swapped": (tamper.swap_layers, "merge.tensors", "in layers 1, 2"),
    "GGUF of the base": (_gguf_of_the_base, "gguf.tensors", "28 tensors differ"),
    "one Q8_0 block flipped": (tamper.flip_block, "gguf.tensors", "1 tensors differ, first blk.1.ffn_up.weight"),
    "GGUF multiplier": (lambda run: tamper.patch_gguf(run, "granite.residual_scale", "<f", 0.3), "gguf.metadata", "residual_scale is 0.3"),
    "GGUF eos": (lambda run: tamper.patch_gguf(run, "tokenizer.ggml.eos_token_id", "<I", 0), "gguf.metadata", "eos_token_id is 0"),
    "config eos": (lambda run: tamper.change_json(run.merged / "generation_config.json", lambda c: c.update(eos_token_id=0)), "stops.files", "eos_token_id 0"),
    "GGUF rope dimension": (lambda run: tamper.patch_gguf(run, "granite.rope.dimension_count", "<I", 16), "gguf.metadata", "rope.dimension_count is 16"),
    "GGUF splitting rule": (lambda run: run.gguf.write_bytes(run.gguf.read_bytes().replace(b"smollm", b"refact", 1)), "gguf.metadata", "tokenizer.ggml.pre is refact"),
    "sampling settings": (lambda run: tamper.change_json(run.merged / "generation_config.json", lambda c: c.update(repetition_penalty=1.3)), "merge.config", "repetition_penalty"),
    "ordinary end token": (lambda run: tamper.change_json(run.merged / "generation_config.json", lambda c: c.update(eos_token_id=[c["eos_token_id"], 500])), "stops.files", "eos_token_id [500]"),
    "Modelfile adapter": (lambda run: run.modelfile.write_text(run.modelfile.read_text() + "ADAPTER ./other.gguf\n"), "stops.modelfile", "ADAPTER ./other.gguf was added"),
    "template newline": (lambda run: tamper.newline_after_role(run.merged / "chat_template.jinja"), "merge.tokenizer", "chat template differs"),
    "Modelfile template newline": (_newline_in_modelfile, "stops.modelfile", "TEMPLATE is not the one derived"),
    "Modelfile stop removed": (tamper.drop_stop, "stops.modelfile", "PARAMETER stop <|end_of_text|> is missing"),
    "two tokenizer merges swapped": (tamper.swap_merges, "merge.tokenizer", "in its merges (2 of 48900)"),
    "held-out row in training": (_leak, "adapter.held_out_unseen", "1 held-out prompts are training rows"),
}  # fmt: skip


@pytest.mark.parametrize("name", TAMPERS)
def test_a_tamper_is_named_by_its_own_link_even_with_a_resealed_manifest(run: RunFolder, name: str) -> None:
    spoil, link, words = TAMPERS[name]
    spoil(run)
    tamper.reseal(run)
    certificate = certify_offline(run)
    assert _broken(certificate)[0] == link
    assert words in certificate.broken[0].figure
    assert not [one for one in _broken(certificate) if one.startswith("custody.")]


@pytest.mark.parametrize(
    "name",
    [
        pytest.param(name, marks=() if name == "one merged tensor by 1 %" else pytest.mark.wide)
        for name in TAMPERS
        if name not in ("GGUF of the base", "held-out row in training")
    ],
)
def test_a_tamper_without_resealing_also_breaks_the_chain_of_custody(run: RunFolder, name: str) -> None:
    TAMPERS[name][0](run)
    assert "custody.artefacts" in _broken(certify_offline(run))


def test_other_parts_that_also_notice(run: RunFolder) -> None:
    tamper.swap_merges(run)
    tamper.reseal(run)
    assert _broken(certify_offline(run)) == ["merge.tokenizer", "gguf.vocabulary"]


@pytest.mark.parametrize(
    ("edit", "check"),
    [
        (lambda d: d["stages"]["finetune"]["result"]["eval_loss"].update(after=0.0), "custody.records"),
        (lambda d: d["stages"]["finetune"]["inputs"]["parameters"].update(rank=64), "custody.records"),
        (lambda d: d["stages"]["merge"]["artefacts"]["merged_fp16"].update(sha256="0" * 64), "custody.artefacts"),
        (lambda d: d["stages"]["evaluate_tuned"]["result"].update(exact=0.99), "custody.scores"),
        (lambda d: d["stages"]["finetune"]["inputs"]["base"].update(sha256="0" * 64), "custody.base"),
        (lambda d: d["stages"].pop("merge"), "custody.chain"),
        (lambda d: d["stages"].pop("evaluate_tuned"), "custody.chain"),
        (lambda d: d["stages"].pop("modelfile"), "custody.artefacts"),
        (lambda d: d["stages"]["gguf"].pop("inputs"), "custody.records"),
    ],
)
def test_an_edited_manifest_is_seen(run: RunFolder, edit: Callable[[dict[str, Any]], object], check: str) -> None:
    tamper.change_json(run.manifest, edit)  # type: ignore[arg-type]
    assert check in _broken(certify_offline(run))


def test_a_base_that_is_not_here_leaves_its_links_unproven_not_passed(run: RunFolder) -> None:
    shutil.rmtree(_base(run))
    certificate = certify_offline(run)
    assert "merge" in certificate.unproven
    moved = next(f for link in certificate.links for f in link.findings if f.id == "adapter.moved")
    assert (moved.status, "cannot be had here" in moved.figure) == ("skipped", True)


DAMAGE: dict[str, tuple[Callable[[RunFolder], object], str]] = {
    "merged gone": (lambda run: shutil.rmtree(run.merged), "merge.tensors"),
    "config gone": (lambda run: (run.merged / "config.json").unlink(), "merge.config"),
    "config broken": (lambda run: (run.merged / "config.json").write_text("{"), "merge.config"),
    "tokenizer cut": (lambda run: (run.merged / "tokenizer.json").write_text("{"), "merge.tokenizer"),
    "adapter gone": (lambda run: shutil.rmtree(run.adapter), "adapter.moved"),
    "adapter config broken": (lambda run: (run.adapter / "adapter_config.json").write_text("[]"), "adapter.moved"),
    "held-out rows gone": (lambda run: run.heldout.unlink(), "tuned.scores"),
    "Modelfile broken": (lambda run: run.modelfile.write_text('FROM x\nTEMPLATE """a\n'), "stops.modelfile"),
    "bad line of answers": (lambda run: run.reference("tuned").write_text("{\n"), "tuned.scores"),
}


@pytest.mark.parametrize("name", DAMAGE)
def test_damage_is_named_by_its_link_and_raises_nothing(run: RunFolder, name: str) -> None:
    spoil, link = DAMAGE[name]
    spoil(run)
    assert link in _broken(certify_offline(run))


@pytest.mark.wide
def test_a_dataset_on_a_hub_that_does_not_answer_is_skipped(run: RunFolder, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")

    def on_a_hub(data: dict[str, Any]) -> None:
        data["stages"]["finetune"]["inputs"]["parameters"].update(data="hub:nobody/nothing")
        data["stages"]["finetune"]["inputs"].get("beside", {}).pop("data", None)

    tamper.change_json(run.manifest, on_a_hub)
    found = {finding.id: finding.status for link in certify_offline(run).links for finding in link.findings}
    assert found["custody.dataset"] == found["adapter.held_out_unseen"] == "skipped"


SETTINGS = Settings()
LLAMACPP = Scope(("llamacpp",), prompts=12, positions=2, keep=False)


def test_a_run_is_certified_on_a_real_llama_cpp(made: RunFolder) -> None:
    certificate = certify(made, SETTINGS, LLAMACPP)
    assert (_broken(certificate), certificate.unproven) == ([], [])
    measured = {finding.id for link in certificate.links for finding in link.findings if finding.status == "passed"}
    assert {
        "merge.logits", "merge.cast_logits", "gguf.tokenizer", "gguf.logits", "served.llamacpp_file", "served.llamacpp_prompts",
        "served.llamacpp_answers", "served.llamacpp_logprobs", "tuned.llamacpp", "tuned.llamacpp_controls", "stops.llamacpp",
    } <= measured  # fmt: skip


def test_online_without_its_base_a_run_is_not_certified(run: RunFolder) -> None:
    shutil.rmtree(_base(run))
    certificate = certify(run, SETTINGS, LLAMACPP)
    assert (certificate.passed, certificate.state) == (False, "incomplete")
    assert {"merge", "served"} <= set(certificate.unproven)


@contextmanager
def _served_instead(run: RunFolder, swap: Callable[[Path], None]) -> Iterator[None]:
    """A server of this run, under its name, that loaded another file; the run's own file is back in its place by then."""
    kept = run.gguf.with_suffix(".kept")
    run.gguf.rename(kept)
    swap(run.gguf)
    try:
        started = start(run, "llamacpp", SETTINGS, Options(purpose="verify"))
        assert started.endpoint, started.reason
        kept.replace(run.gguf)
        yield
    finally:
        serving.stop(run.path, "llamacpp")


def _convert(run: RunFolder, change: Callable[[RunFolder], object]) -> Callable[[Path], None]:
    """A real conversion of what a change makes of the merged folder."""

    def swap(target: Path) -> None:
        other = RunFolder("other", run.output)
        shutil.copytree(run.merged, other.merged)
        change(other)
        gguf.convert(other.merged, target, name=run.name)

    return swap


SERVED: dict[str, tuple[Callable[[RunFolder], Callable[[RunFolder], object]], set[str]]] = {
    "the base": (lambda run: lambda other: tamper.base_as_merged(other, _base(run)), {"gguf.logits", "served.llamacpp_logprobs", "tuned.llamacpp"}),
    # two tiny models of random weights are too flat to be told apart by their distributions; their answers tell
    "another run": (lambda _: tamper.other_weights, {"tuned.llamacpp"}),
    "a template with a newline": (lambda _: lambda other: tamper.newline_after_role(other.merged / "chat_template.jinja"), {"served.llamacpp_prompts"}),
}  # fmt: skip


@pytest.mark.parametrize("name", [pytest.param(name, marks=() if name == "the base" else pytest.mark.wide) for name in SERVED])
def test_a_server_that_loaded_something_else_under_the_right_name_is_caught(run: RunFolder, name: str) -> None:
    change, expected = SERVED[name]
    with _served_instead(run, _convert(run, change(run))):
        certificate = certify(run, SETTINGS, LLAMACPP)
    assert expected <= set(_broken(certificate))
    assert any(one.startswith("served.") for one in _broken(certificate))
    assert all(one.partition(".")[0] in ("gguf", "served", "tuned", "stops") for one in _broken(certificate))
