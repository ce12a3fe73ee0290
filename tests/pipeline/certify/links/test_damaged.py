"""Damaged files and servers that answer nonsense: the link's own failed finding says so, nothing is raised."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
from recorded import edit, failed, judged
from stub_server import serving

from pipeline.certify.certificate import Data, Subject, hashes
from pipeline.certify.links.gguf import check_gguf
from pipeline.certify.links.merged import compare_files
from pipeline.certify.links.stops import check_files
from pipeline.errors import EngineError, InputError, Interrupted
from pipeline.net.client import wait_for
from pipeline.report.check import guarded
from pipeline.runs.folder import RunFolder
from pipeline.runs.manifest import Manifest
from pipeline.serve.start import Endpoint
from pipeline.verify.prober import Prober
from pipeline.verify.score import HeldOut, read_reference


@pytest.mark.parametrize("error", [InputError("gone\nmore"), KeyError("r"), TypeError("x"), ValueError("y"), OSError("z")])
def test_an_error_is_the_link_s_failed_finding_in_one_line(error: Exception) -> None:
    def work() -> list[object]:
        raise error

    (found,) = guarded("merge.tensors", work)  # type: ignore[arg-type]
    assert (found.id, found.status, "\n" in found.figure) == ("merge.tensors", "failed", False)
    assert found.figure.startswith(type(error).__name__)


def test_a_user_s_interruption_is_no_finding() -> None:
    def work() -> list[object]:
        raise Interrupted("stop")

    with pytest.raises(Interrupted):
        guarded("merge.tensors", work)  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("spoil", "check"),
    [
        (lambda run: run.reference("tuned").write_text('{"text": "a", "finish_reason": "stop"}\nnot json\n'), "custody.scores"),
        (lambda run: run.reference("tuned").write_text('{"answer": 1}\n'), "custody.scores"),
        (lambda run: run.heldout.unlink(), "custody.scores"),
        (lambda run: edit(run, lambda data: data["stages"]["gguf"].pop("inputs")), "custody.records"),
        (lambda run: edit(run, lambda data: data.update(served={"vllm": 3})), "custody.launch"),
    ],
)
def test_damage_is_a_failed_finding_of_custody(line: RunFolder, spoil: Callable[[RunFolder], object], check: str) -> None:
    spoil(line)
    assert check in failed(line)


def test_a_bad_line_of_answers_is_named(line: RunFolder) -> None:
    path = line.reference("tuned")
    path.write_text('{"text": "a", "finish_reason": "stop"}\n{\n')
    with pytest.raises(InputError, match=r"tuned\.jsonl:2: not an answer"):
        read_reference(path)
    assert "tuned.jsonl:2" in judged(line)["custody.scores"].figure


def test_a_merged_folder_or_modelfile_that_cannot_be_read_is_named(line: RunFolder, tmp_path: Path) -> None:
    line.modelfile.write_text('FROM x\nTEMPLATE """never closed\n')
    subject = Subject(line, Manifest(line.manifest), None, "b", Data({}), {}, hashes(line))
    assert [(f.id, f.status) for f in check_files(subject)] == [("stops.files", "failed"), ("stops.modelfile", "failed")]
    found = compare_files(tmp_path / "gone", line.merged)
    assert [(f.id, f.status) for f in found] == [("merge.tokenizer", "failed"), ("merge.config", "failed")]
    (found_gguf,) = guarded("gguf.tensors", lambda: check_gguf(line.merged, line.gguf))
    assert found_gguf.status == "failed"


def test_a_training_without_inputs_is_no_training(line: RunFolder) -> None:
    edit(line, lambda data: data["stages"]["finetune"].pop("inputs"))
    with pytest.raises(InputError, match="no finished fine-tune"):
        Manifest(line.manifest).require_training()


def test_a_chat_answer_without_usage_is_the_engine_s_fault() -> None:
    body = {"choices": [{"message": {"content": "hi"}, "finish_reason": "stop"}]}

    async def ask(url: str) -> None:
        async with Prober(Endpoint("openai", url, "m"), 8) as prober:
            await prober.chat(HeldOut(({"role": "user", "content": "hi"},), ""))

    with serving({"/v1/chat/completions": body}) as stub, pytest.raises(EngineError, match="no chat answer with its usage"):
        wait_for(ask(stub.url))
