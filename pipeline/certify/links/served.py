"""Link 4 (and the running halves of 3, 5 and 6): a backend's evidence against the in-process reference."""

import math
from collections.abc import Sequence
from dataclasses import replace

from pipeline.certify.bounds import ANSWER_SHARE, MEASURED, distance_bound
from pipeline.certify.certificate import Subject
from pipeline.certify.links import stops, tuned
from pipeline.report.check import Check, held, skipped
from pipeline.verify.distributions import Distance, Reference, compare_tops
from pipeline.verify.evidence import Evidence
from pipeline.verify.score import Answer


def judge(
    evidence: Evidence, subject: Subject, reference: Reference, base: Sequence[Answer], after: Sequence[Answer]
) -> list[Check]:
    """Every finding about one backend."""
    name = evidence.engine
    found = [_file(evidence, subject), _prompts(evidence), _answers(evidence, after), *_distributions(evidence, reference)]
    chosen = [i for i in tuned.canaries(base, after) if i in evidence.rows]
    by_row = [evidence.answer_to(i) for i in range(len(after))]
    found.append(tuned.check_served_canaries(name, chosen, base, after, by_row))
    in_process = stops.share_stopped([after[i] for i in evidence.rows])
    share = stops.share_stopped(evidence.answers)
    found.append(stops.check_answers(name, share, len(evidence.answers), in_process, cut_short=subject.training.cut_short))
    return found


def _file(evidence: Evidence, subject: Subject) -> Check:
    check_id = f"served.{evidence.engine}_file"
    want = subject.sha256.get(subject.run.gguf.name if evidence.dtype == "Q8_0" else subject.run.merged.name)
    if evidence.loaded_sha256 not in (None, want):
        figure = f"when it started, the file was another one: sha256 {str(evidence.loaded_sha256)[:12]}"
        return Check(check_id, "failed", figure, f"{str(want)[:12]}", "hash of the file, taken when the server had started")
    if evidence.file_newer:
        figure = f"{evidence.file} was written after the server had started, which serves what was there before"
        return Check(check_id, "failed", figure, "older than the server", "the file's time")
    if evidence.file is None:
        return skipped(check_id, "the engine does not tell which file it loaded")
    if evidence.file_sha256 is None:
        return skipped(check_id, f"it loaded {evidence.file}, which cannot be read here")
    same = evidence.file_sha256 == want
    loaded = "this run's export" if same else "another model"
    figure = f"it loaded {loaded}: sha256 {evidence.file_sha256[:12]}"
    return held(check_id, same, figure, f"{str(want)[:12]}", "hash of the file the server names, taken now")


def _prompts(evidence: Evidence) -> Check:
    check_id, source = f"served.{evidence.engine}_prompts", "the tokenizer's own rendering"
    if evidence.parity is None or evidence.parity.status == "skipped":
        return skipped(check_id, evidence.parity.figure if evidence.parity else "not asked")
    return held(check_id, evidence.parity.status == "passed", evidence.parity.figure, "every token ID equal", source)


def _answers(evidence: Evidence, after: Sequence[Answer]) -> Check:
    same = sum(a.text.strip() == after[i].text.strip() for i, a in zip(evidence.rows, evidence.answers, strict=True))
    figure = f"{same} of {len(evidence.rows)} greedy answers are the in-process model's, word for word"
    least = ANSWER_SHARE.get(evidence.dtype, min(ANSWER_SHARE.values()))
    data = {"same": same, "n": len(evidence.rows), "dtype": evidence.dtype}
    ok = same >= max(1, math.floor(least * len(evidence.rows)))
    return held(f"served.{evidence.engine}_answers", ok, figure, f"at least {least:.0%} ({evidence.dtype})", MEASURED, **data)


def _distributions(evidence: Evidence, reference: Reference) -> list[Check]:
    check_id = f"served.{evidence.engine}_logprobs"
    if not evidence.probes:
        return [skipped(check_id, evidence.problems.get("logprobs", "not asked"))]
    numbers = sorted(evidence.probes)
    distance, divergences = compare_tops([reference.held_out[i].top for i in numbers], [evidence.probes[i] for i in numbers])
    found = [_distance(check_id, distance, divergences, evidence.dtype)]
    if evidence.tokenised is not None:
        found.append(_distance("gguf.logits", distance, divergences, evidence.dtype))
        same, every = evidence.tokenised
        figure = f"{same} of {every} texts (conversation suite and held-out prompts) give the tokenizer's IDs in llama.cpp"
        found.append(held("gguf.tokenizer", same == every > 0, figure, "all", "tokenizer.json"))
    return [*found, *_drift(evidence, reference)]


def _distance(check_id: str, distance: Distance, divergences: list[float], dtype: str) -> Check:
    bound = distance_bound(dtype)
    ok = distance.kl <= bound.kl and distance.gap <= bound.gap and distance.top1 >= bound.top1
    stated = f"KL {bound.kl:.0e}, log-probabilities {bound.gap:g}, top-1 {bound.top1:.0%} ({dtype})"
    data = {"kl": distance.kl, "gap": distance.gap, "top1": distance.top1, "n": distance.n, "divergences": divergences}
    return held(check_id, ok, str(distance), stated, MEASURED, **data)


def _drift(evidence: Evidence, reference: Reference) -> list[Check]:
    """On control prompts, outside the data, the served model is the trained one too; its distance from the base is stated."""
    if not evidence.controls:
        return []
    numbers = sorted(evidence.controls)
    ours, theirs = [reference.controls[i].top for i in numbers], [evidence.controls[i] for i in numbers]
    distance, divergences = compare_tops(ours, theirs)
    found = _distance(f"tuned.{evidence.engine}_controls", distance, divergences, evidence.dtype)
    base = [reference.controls_base[i] for i in numbers]
    away = [compare_tops(base, side)[0].kl for side in (theirs, ours)]
    figure = f"control prompts: {found.figure}; KL from the base {away[0]:.3f} served, {away[1]:.3f} in process"
    return [replace(found, figure=figure, data={**found.data, "served": away[0], "trained": away[1]})]
