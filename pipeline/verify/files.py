"""A run's files against what it was trained with: the chat template in each artefact, and the tokens that end a turn.

The truth is the template whose hash the manifest recorded when the model was merged; without a record, the merged folder's.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from datetime import datetime
from typing import Any

from pipeline.errors import ModelError
from pipeline.model.gguf import read_gguf_header
from pipeline.model.tokenizer import Tokenizer
from pipeline.modelfile.grammar import parse_modelfile
from pipeline.prompts.chat import ChatTemplate
from pipeline.prompts.conversation import load_suite
from pipeline.prompts.parity import Reference, compare
from pipeline.prompts.renderers import JinjaRenderer
from pipeline.prompts.stops import Token, folder_problems, gguf_problems, special_ids, turn_end
from pipeline.report.check import Check, held
from pipeline.runs.folder import RunFolder
from pipeline.runs.manifest import Manifest


@dataclass(frozen=True)
class Trained:
    """The chat template a run was trained with, and whether its hash is the recorded one (None: nothing is recorded)."""

    template: ChatTemplate
    recorded: bool | None


def trained_template(run: RunFolder) -> Trained:
    """The template of the merged folder, or the GGUF's when only that one is still what the manifest recorded."""
    merged = ChatTemplate.from_folder(run.merged)
    recorded = _recorded(run).get("chat_template_sha256")
    if recorded is None:
        return Trained(merged, None)
    carried = [ChatTemplate.from_gguf(run.gguf, merged.variables)] if run.gguf.is_file() else []
    for template in (merged, *carried):
        # the converter may drop the file's last line end
        for source in (template.source, template.source + "\n", template.source.rstrip("\n")):
            same = ChatTemplate(source, merged.variables)
            if same.sha256 == recorded:
                return Trained(same, True)
    return Trained(merged, False)


def stop_problems(run: RunFolder, template: ChatTemplate) -> list[str]:
    """What the merged folder and the GGUF say about end and pad tokens that is wrong."""
    vocabulary = special_ids(run.merged)
    try:
        end = turn_end(template, vocabulary)
    except ModelError as error:
        return [str(error)]
    found = folder_problems(run.merged, end, vocabulary)
    recorded = _recorded(run)
    if recorded and Token(str(recorded["end_token"]), int(recorded["end_token_id"])) != end:
        found.append(f"turns end with {end.text} ({end.id}); training ended them with {recorded['end_token']}")
    if run.gguf.is_file():
        found += gguf_problems(read_gguf_header(run.gguf).metadata, end)
    return found


def system_problems(run: RunFolder) -> list[str]:
    """A Modelfile whose SYSTEM is only the beginning of the system message that all training rows share."""
    training = Manifest(run.manifest).training
    trained = training and training.system
    if not trained or not run.modelfile.is_file():
        return []
    written = parse_modelfile(run.modelfile.read_text(encoding="utf-8")).system
    if written and written != trained and trained.startswith(written):
        return [f"the Modelfile's SYSTEM is cut: {written!r}, trained with {trained!r}"]
    return []


def prompt_problems(run: RunFolder) -> list[str]:
    """Everything about stops, system message and recorded template that is wrong in the run's files, causes first."""
    trained = trained_template(run)
    changed = "no file of the run holds the chat template it was trained with: the merged folder's was changed"
    first = [changed] if trained.recorded is False else []
    return first + stop_problems(run, trained.template) + system_problems(run)


def run_checks(run: RunFolder) -> list[Check]:
    """``export.chat_template`` and ``export.stops``: the files still say what training said."""
    trained = trained_template(run)
    problems = stop_problems(run, trained.template) + system_problems(run)
    return [
        held("export.chat_template", *_template_verdict(run, trained)),
        held("export.stops", not problems, "; ".join(problems) or "end and pad tokens agree in every file"),
    ]


def _template_verdict(run: RunFolder, trained: Trained) -> tuple[bool, str]:
    if trained.recorded is False:
        return False, "the merged folder's chat template is not the one recorded when the model was trained"
    now, renderers = datetime.now(), []
    merged = ChatTemplate.from_folder(run.merged)
    if merged.source != trained.template.source:
        renderers.append(JinjaRenderer(merged, now, "merged_fp16"))
    if run.gguf.is_file():
        renderers.append(JinjaRenderer(ChatTemplate.from_gguf(run.gguf, merged.variables), now, "GGUF"))
    differences = compare(Reference(trained.template, now, Tokenizer(run.merged)), renderers, load_suite()).differences
    if differences:
        first = differences[0]
        return False, f"{len(differences)} prompts of the suite differ; {first.renderer}, {first.conversation}: {first.detail}"
    return True, "merged folder and GGUF carry the chat template the model was trained with"


def _recorded(run: RunFolder) -> Mapping[str, Any]:
    merge = Manifest(run.manifest).stage("merge")
    return merge.result.get("tokenizer", {}) if merge else {}
