"""Link 6: every file names the token that ends a turn, a turn has exactly one, and answers end by themselves."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from pipeline.certify.bounds import FINISH_SHARE, FINISH_SLACK
from pipeline.certify.finding import Finding, guarded, held, skipped
from pipeline.certify.subject import Subject
from pipeline.chat import ChatTemplate
from pipeline.errors import ModelError
from pipeline.files import read_json
from pipeline.gguf_header import read_gguf_header
from pipeline.modelfile import parse_modelfile
from pipeline.ollama_template import derive
from pipeline.runs import RunFolder
from pipeline.score import Answer, HeldOut
from pipeline.stops import StopFiles, Token, gguf_problems, repair_stops, special_ids, turn_end
from pipeline.tokenizer import Tokenizer

_TEMPLATE = "the token the chat template writes after an answer"


def check_files(subject: Subject) -> list[Finding]:
    """config, generation and tokenizer config, GGUF and Modelfile stop where the chat template ends a turn."""
    run = subject.run
    return [*guarded("stops.files", lambda: [_files(run)]), *guarded("stops.modelfile", lambda: [_modelfile(run)])]


def _end(run: RunFolder) -> tuple[ChatTemplate, Mapping[str, int], Token]:
    template, vocabulary = ChatTemplate.from_folder(run.merged), special_ids(run.merged)
    return template, vocabulary, turn_end(template, vocabulary)


def _files(run: RunFolder) -> Finding:
    _, vocabulary, end = _end(run)
    parts = [run.merged / f"{name}.json" for name in ("config", "generation_config", "tokenizer_config")]
    files = StopFiles(*(read_json(path) if path.is_file() else {} for path in parts))
    problems = repair_stops(files, end, vocabulary)[1]
    problems += gguf_problems(read_gguf_header(run.gguf).metadata, end) if run.gguf.is_file() else []
    figure = "; ".join(problems) or f"{end.text} ({end.id}) in config, generation config, tokenizer config and GGUF"
    return held("stops.files", not problems, figure, f"one end token: {_TEMPLATE}", "definition")


def _modelfile(run: RunFolder) -> Finding:
    if not run.modelfile.is_file():
        return skipped("stops.modelfile", "the run has no Modelfile")
    template, _, end = _end(run)
    made = parse_modelfile(run.modelfile.read_text(encoding="utf-8"))
    stops = list(made.parameters.get("stop", ()))
    problems = [] if end.text in stops else [f"PARAMETER stop {end.text} is missing (it has {', '.join(stops) or 'none'})"]
    if not made.source.endswith(run.gguf.name):
        problems.append(f"FROM names {made.source}, not {run.gguf.name}")
    try:
        if (made.template or "").strip() not in {derive(template, system).text.strip() for system in (None, made.system)}:
            problems.append("TEMPLATE is not the one derived from the chat template")
    except ModelError as error:
        problems.append(f"no TEMPLATE can be derived from the chat template: {error.message}")
    figure = "; ".join(problems) or f"stop {end.text}, TEMPLATE as derived, FROM {run.gguf.name}"
    return held("stops.modelfile", not problems, figure, "stop, TEMPLATE and FROM as exported", "derived again now")


def check_turns(run: RunFolder, rows: Sequence[HeldOut]) -> Finding:
    """Rendered with their expected answers, held-out conversations have exactly one end token after each answer."""
    wrong, end = _wrong_turns(run, rows)
    figure = "; ".join(wrong[:3]) or f"exactly one {end} after each of {len(rows)} answers"
    return held("stops.turns", not wrong, figure, "1 a turn", "definition")


def _wrong_turns(run: RunFolder, rows: Sequence[HeldOut]) -> tuple[list[str], str]:
    template, tokenizer = ChatTemplate.from_folder(run.merged), Tokenizer(run.merged)
    end = turn_end(template, special_ids(run.merged))
    wrong = []
    for number, row in enumerate(rows, 1):
        asked = template.render(row.messages, tools=row.tools, add_generation_prompt=True)
        answer = [*row.messages, {"role": "assistant", "content": row.expected}]
        whole = template.render(answer, tools=row.tools)
        tail = whole.removeprefix(asked) if whole.startswith(asked) else whole[whole.rfind(row.expected) :]
        count = tokenizer.encode(tail).count(end.id)
        wrong += [f"row {number} has {count}"] if count != 1 else []
    return wrong, end.text


def share_stopped(answers: Sequence[Answer]) -> float:
    """Share of answers that ended by themselves."""
    return sum(answer.finish_reason == "stop" for answer in answers) / len(answers) if answers else 0.0


def check_answers(who: str, share: float, count: int, reference: float | None = None, *, cut_short: bool = False) -> Finding:
    """Answers end by themselves: on at least FINISH_SHARE of the prompts, or (served) as often as in process."""
    bound = FINISH_SHARE if reference is None else min(FINISH_SHARE, reference - FINISH_SLACK)
    source = (
        "a fine-tuned model must learn to stop" if reference is None else f"in process {reference:.1%}, less {FINISH_SLACK:.0%}"
    )
    found = held(
        f"stops.{who}",
        share >= bound - 1e-9,
        f"{share:.1%} of {count} answers ended by themselves",
        f"at least {bound:.1%}",
        source,
    )
    if found.status == "failed" and cut_short:  # a training limited on purpose is told so, not failed
        return Finding(found.id, "warning", f"{found.figure} (the training was cut short)", found.bound, found.source)
    return found
