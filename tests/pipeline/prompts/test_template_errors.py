"""A template that refuses a conversation names which one: file and row, or the conversation's id."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from datetime import datetime
from pathlib import Path

import pytest
from typer.testing import CliRunner

from pipeline.certify.links.stops import check_turns
from pipeline.cli import app
from pipeline.errors import EngineError, ModelError, PipelineError
from pipeline.prompts.chat import EMBEDDED_TEMPLATE, ChatTemplate
from pipeline.prompts.conversation import Conversation, Prompt
from pipeline.prompts.parity import Reference, compare
from pipeline.runs.folder import RunFolder
from pipeline.runs.stages import Partial
from pipeline.verify.material import read_material
from pipeline.verify.score import read_held_out

STRICT = "{% for m in messages %}{% if m.content == 'no' %}{{ raise_exception('no') }}{% endif %}{% endfor %}" + EMBEDDED_TEMPLATE


@pytest.fixture
def refused(run: RunFolder, tokenizer_folder: Path) -> RunFolder:
    """A run whose chat template refuses the second of its three held-out rows."""
    shutil.copytree(tokenizer_folder, run.merged)
    (run.merged / "chat_template.jinja").write_text(STRICT)
    rows = [[{"role": "user", "content": asked}, {"role": "assistant", "content": "yes"}] for asked in ("first", "no", "third")]
    run.heldout.write_text("".join(json.dumps({"messages": row}) + "\n" for row in rows))
    for which in ("base", "tuned"):
        run.reference(which).parent.mkdir(exist_ok=True)
        run.reference(which).write_text('{"text": "yes", "finish_reason": "stop"}\n' * 3)
    return run


def _evaluate(run: RunFolder) -> None:
    from training.export import evaluate

    evaluate.answer_all(run.merged, evaluate.Asked(read_held_out(run.heldout)), Partial(run.path / "x.part", ""))


def _probes(run: RunFolder) -> None:
    from training.certify import probes

    probes._held_out(run)


@pytest.mark.parametrize(
    ("work", "where"),
    [
        (read_material, "{heldout}:2: "),
        (lambda run: check_turns(run, read_held_out(run.heldout)), "{heldout}:2: "),
        (_probes, "{heldout}:2: "),
        (_evaluate, "held-out row 2: "),
    ],
    ids=["verify", "stops", "probes", "evaluate"],
)
def test_the_row_is_named(
    refused: RunFolder, monkeypatch: pytest.MonkeyPatch, work: Callable[[RunFolder], object], where: str
) -> None:
    if work in (_evaluate, _probes):
        pytest.importorskip("torch")
        monkeypatch.setattr("training.export.evaluate._model", lambda *_: None)
    with pytest.raises(ModelError) as caught:
        work(refused)
    assert caught.value.message.startswith(where.format(heldout=refused.heldout))


class Silent:
    """An engine that has gone."""

    name = "vllm"
    paths = ()
    system = ""

    def render(self, conversation: Conversation) -> Prompt:
        raise EngineError("does not answer", remedy="start it again")


def test_the_conversation_is_named_when_an_engine_stops_answering(embedded: ChatTemplate, now: datetime) -> None:
    asked = Conversation("greeting", ({"role": "user", "content": "hello"},))
    with pytest.raises(EngineError) as caught:
        compare(Reference(embedded, now), [Silent()], [asked])
    assert caught.value.message == "conversation greeting with vllm: does not answer"
    assert caught.value.remedy == "start it again"


def test_the_file_is_named_that_could_not_be_rendered(refused: RunFolder, tmp_path: Path) -> None:
    chat = tmp_path / "chat.json"
    chat.write_text('[{"role": "user", "content": "no"}]')
    words = ["render", "--run", refused.name, "--output", str(refused.output), "--messages", str(chat)]
    done = CliRunner().invoke(app, words)
    assert isinstance(done.exception, PipelineError)
    assert done.exception.message.startswith(f"{chat}: ")
