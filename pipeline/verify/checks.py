"""One served model against its reference: each check has an id, a status and the figures behind it."""

from collections.abc import Sequence
from typing import Any

from pipeline import engines
from pipeline.errors import PipelineError
from pipeline.net.chat import Streamed
from pipeline.prompts.conversation import Conversation
from pipeline.report.check import Check, held
from pipeline.verify.prober import Prober
from pipeline.verify.score import HeldOut

# served answers may differ from the reference by rounding (Q8_0, another kernel); this much of ``exact`` is allowed
EXACT_TOLERANCE = 0.05
FINISH_TOLERANCE = 0.05


def chat(engine: str, answer: str, reference: str) -> Check:
    """The engine answers at all, where the model in this process does."""
    silent = "; the trained model itself answers nothing here" if not reference.strip() else ""
    return held(f"{engine}.chat", bool(answer.strip() or silent), f"answered {len(answer)} characters{silent}")


def listed(engine: str, model: str, names: Sequence[str]) -> Check:
    """The model is among those the server lists."""
    known = model in names or f"{model}:latest" in names
    return held(f"{engine}.model_listed", known, f"{model} among {', '.join(names) or 'no models'}")


def streamed(engine: str, answers: Sequence[Streamed], whole: Sequence[str]) -> Check:
    """Streaming delivers in pieces the same text as the unstreamed answer."""
    same = sum(a.text.strip() == text.strip() for a, text in zip(answers, whole, strict=True))
    pieces = all(a.chunks > 1 for a in answers if len(a.text) > 20)
    ok = bool(answers) and pieces and same >= len(answers) - 1  # batches of another size may tip one near-tie
    return held(f"{engine}.streaming", ok, f"{same} of {len(answers)} streamed answers equal the unstreamed ones")


def allowed(tolerance: float, count: int) -> float:
    """A tolerance for a share of ``count`` answers, and room for one near-tie that tipped."""
    return max(tolerance, 1 / max(count, 1))


def exact(engine: str, served: float, reference: float, count: int) -> Check:
    """The served model scores what the trained one scores, within EXACT_TOLERANCE or one of ``count`` answers."""
    most = allowed(EXACT_TOLERANCE, count)
    detail = f"exact {served:.3f} served, {reference:.3f} in process (allowed difference {most:.2g})"
    # scores are rounded to four digits
    return held(f"{engine}.exact", abs(served - reference) <= most + 1e-4, detail)


def finish(engine: str, served: float, reference: float, count: int) -> Check:
    """Answers end by themselves as often as they do in process, within FINISH_TOLERANCE or one of ``count`` answers."""
    detail = f"{served:.1%} of answers ended with stop, {reference:.1%} in process"
    return held(f"{engine}.finish_stop", served >= reference - allowed(FINISH_TOLERANCE, count) - 1e-4, detail)


async def parity(prober: Prober, rows: Sequence[HeldOut], expected: Sequence[tuple[str, list[int]]]) -> Check:
    """The prompt the engine feeds the model equals the tokenizer's, as token IDs or (where it tells none) as text."""
    check_id = f"{prober.endpoint.engine}.prompt_parity"
    for number, (row, (text, ids)) in enumerate(zip(rows, expected, strict=True), 1):
        try:
            prompt = await prober.prompt(Conversation(f"row {number}", row.messages, row.tools))
        except (LookupError, TypeError, ValueError) as error:
            return Check(check_id, "failed", f"its answer about the prompt is not understood: {error!r}")
        except PipelineError as error:
            return Check(check_id, "failed" if engines.get(prober.endpoint.engine).tells_prompt else "skipped", str(error))
        fed = prompt.text or "" if prompt.ids is None else list(prompt.ids)
        if fed != (text if isinstance(fed, str) else ids):
            return Check(check_id, "failed", f"prompt {number} differs: {difference(fed, text, ids)}")
    kind = "texts" if rows and isinstance(fed, str) else "token IDs"
    return Check(check_id, "passed", f"{len(rows)} prompts, {kind} equal to the tokenizer's")


def difference(fed: list[int] | str, text: str, ids: list[int]) -> str:
    """Where two prompts part, in words."""
    want: Sequence[Any] = text if isinstance(fed, str) else ids
    at = next((i for i, (a, b) in enumerate(zip(fed, want, strict=False)) if a != b), min(len(fed), len(want)))
    near = slice(max(0, at - 20), at + 20) if isinstance(fed, str) else slice(max(0, at - 3), at + 5)
    return f"at position {at} of {len(want)}: engine {fed[near]!r}, tokenizer {want[near]!r}"
