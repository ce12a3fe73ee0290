"""Link 6: every file names the token that ends a turn, a turn has exactly one, and answers end by themselves."""

from collections import Counter
from collections.abc import Sequence
from dataclasses import replace

from pipeline.certify.certificate import Subject
from pipeline.errors import InputError, ModelError, at
from pipeline.model.gguf import read_gguf_header
from pipeline.model.tokenizer import Tokenizer
from pipeline.modelfile.grammar import Modelfile, parse_modelfile
from pipeline.modelfile.modelfile import base_license, for_run
from pipeline.prompts.chat import ChatTemplate
from pipeline.prompts.stops import StopFiles, extra_ends, gguf_problems, repair_stops, special_ids, turn_end
from pipeline.report.check import Check, guarded, held, skipped
from pipeline.runs.files import read_json, read_utf8
from pipeline.runs.folder import RunFolder
from pipeline.verify.assemble import allowed
from pipeline.verify.score import Answer, HeldOut

# answers that end by themselves
_FINISH_SHARE = 0.99
_FINISH_SLACK = 0.02
_TEMPLATE = "the token the chat template writes after an answer"


def check_files(subject: Subject) -> list[Check]:
    """config, generation and tokenizer config, GGUF and Modelfile stop where the chat template ends a turn."""
    return [*guarded("stops.files", lambda: [_files(subject)]), *guarded("stops.modelfile", lambda: [_modelfile(subject)])]


def _files(subject: Subject) -> Check:
    run = subject.run
    template, vocabulary = ChatTemplate.from_folder(run.merged), special_ids(run.merged)
    end = turn_end(template, vocabulary)
    parts = [run.merged / f"{name}.json" for name in ("config", "generation_config", "tokenizer_config")]
    files = StopFiles(*(read_json(path) if path.is_file() else {} for path in parts))
    problems = [*repair_stops(files, end, vocabulary)[1], *extra_ends(run.merged, subject.base, end, vocabulary)]
    problems += gguf_problems(read_gguf_header(run.gguf).metadata, end) if run.gguf.is_file() else []
    figure = "; ".join(problems) or f"{end.text} ({end.id}) in config, generation config, tokenizer config and GGUF"
    return held("stops.files", not problems, figure, f"one end token: {_TEMPLATE}", "definition")


def _modelfile(subject: Subject) -> Check:
    run = subject.run
    if not run.modelfile.is_file():
        return skipped("stops.modelfile", "the run has no Modelfile")
    try:
        training = subject.training
        made = parse_modelfile(read_utf8(run.modelfile))
        wanted = for_run(run, training.system, license=base_license(training.base), proof=False)
        problems = modelfile_problems(made, parse_modelfile(wanted.text), licences=subject.base is not None)
    except (InputError, ModelError) as error:
        problems = [f"no Modelfile can be made again to compare with: {error.message}"]
    figure = "; ".join(problems) or "every command as export writes it: FROM, TEMPLATE, PARAMETER, SYSTEM"
    return held("stops.modelfile", not problems, figure, "the Modelfile as exported", "made again now")


def modelfile_problems(made: Modelfile, wanted: Modelfile, *, licences: bool = True) -> list[str]:
    """How the commands of a Modelfile differ from those that it should have; one left out, added or changed is named."""
    have, want = ([pair for pair in one.commands if licences or pair[0] != "license"] for one in (made, wanted))
    missing, extra = (list((Counter(a) - Counter(b)).elements()) for a, b in ((want, have), (have, want)))
    problems = []
    for command, value in missing:
        written, _, name = command.partition(" ")
        other = ", ".join(theirs for known, theirs in extra if known == command)
        if command == "template":
            problems.append("TEMPLATE is not the one derived from the chat template")
        else:
            shown = f"{written.upper()} {name} {value}".replace("  ", " ")
            problems.append(f"{shown[:80]} is missing (it has {other[:80] or 'none'})")
    named = {command for command, _ in missing}
    return problems + [f"{command.upper()} {value[:80]} was added" for command, value in extra if command not in named]


def check_turns(run: RunFolder, rows: Sequence[HeldOut]) -> Check:
    """Rendered with their expected answers, held-out conversations have exactly one end token after each answer."""
    template, tokenizer = ChatTemplate.from_folder(run.merged), Tokenizer(run.merged)
    end = turn_end(template, special_ids(run.merged))
    wrong = []
    for number, row in enumerate(rows, 1):
        tools, documents = row.tools, row.documents
        last = row.last or {"role": "assistant", "content": row.expected}
        with at(f"{run.heldout}:{number}"):
            asked = template.render(row.messages, tools=tools, documents=documents, add_generation_prompt=True)
            whole = template.render([*row.messages, last], tools=tools, documents=documents)
        tail = whole.removeprefix(asked) if whole.startswith(asked) else whole[whole.rfind(row.expected) :]
        count = tokenizer.encode(tail).count(end.id)
        wrong += [f"row {number} has {count}"] if count != 1 else []
    figure = "; ".join(wrong[:3]) or f"exactly one {end.text} after each of {len(rows)} answers"
    return held("stops.turns", not wrong, figure, "1 a turn", "definition")


def share_stopped(answers: Sequence[Answer]) -> float:
    """Share of answers that ended by themselves."""
    return sum(answer.finish_reason == "stop" for answer in answers) / len(answers) if answers else 0.0


def check_answers(who: str, share: float, count: int, reference: float | None = None, *, cut_short: bool = False) -> Check:
    """Answers end by themselves: on at least 99 % of the prompts, or (served) as often as in process."""
    slack = allowed(_FINISH_SLACK, count)  # one near-tie may tip
    bound = _FINISH_SHARE if reference is None else min(_FINISH_SHARE, reference - slack)
    source = "a fine-tuned model must learn to stop" if reference is None else f"in process {reference:.1%}, less {slack:.0%}"
    figure = f"{share:.1%} of {count} answers ended by themselves"
    found = held(f"stops.{who}", share >= bound - 1e-9, figure, f"at least {bound:.1%}", source)
    if found.status == "failed" and cut_short:  # a training limited on purpose is told so, not failed
        return replace(found, status="warning", figure=f"{figure} (the training was cut short)")
    return found
