"""Link 4 (and the running halves of 3, 5 and 6): a backend's evidence against the in-process reference, and its bounds.

Every bound that is not a definition, and how it was measured (benchmarks/certify_bounds.py):
Float32 reference on a 2-core AVX2 machine; largest figures of untampered runs: ten seeds of tiny models of random weights, and the
embedded base after 3, 20 (three seeds) and 213 steps.
- Adapter at run time against the merged sum: KL 1e-7, largest difference 7e-5. Float16 cast: KL 5e-7, largest difference 0.025.
- vLLM in float32: KL 6e-10, every answer equal.
- Q8_0 in llama.cpp, held-out prompts: KL 2e-3 after 3 steps, 3e-5 after 213 (sharper distributions), log-probabilities 0.15 apart
  (tiny 0.013), top-1 all equal; control prompts, which are flatter: KL 9e-3, 0.17 apart, top-1 30 of 32. Answers part at near ties:
  all equal for the tiny models, 63 of 64 after 213 steps, 11 of 16 after 40, 8 of 16 after 20, 9 of 16 after 3; for an engine that
  rounds, the distributions are the proof.
Another training instead. The embedded base after 20 steps, 6 pairs of seeds: 1.0 to 1.7 apart, KL 2.5e-2 to 0.14; against 213
steps, other seed or data: 2.4 and 3.3 apart, KL 3e-2 and 4e-2: all beyond Q8_0's bound. 90 pairs of seeds of tiny models: 0.20 to
0.36 apart, KL 9e-4 to 3e-3, no answer equal: as flat as these are, only their answers tell them apart under Q8_0; a float32
engine's bound tells all 90.
Bounds of float16, bfloat16 and quantised (8 or 4 bits, or an FP8 KV cache, made by the engine) are estimates from their precision.
"""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace

from pipeline.certify.certificate import Subject
from pipeline.certify.links import stops, tuned
from pipeline.engines.base import UNNAMED
from pipeline.model.gguf import GgufComparison
from pipeline.model.tokenizer import Tokenizer
from pipeline.report.check import Check, held, skipped
from pipeline.verify.distributions import Distance, Reference, compare_tops, fold
from pipeline.verify.evidence import Evidence
from pipeline.verify.material import Material
from pipeline.verify.score import Answer, HeldOut, same

MEASURED = "measured: benchmarks/certify_bounds.py"
# greedy answers that are the in-process ones word for word, by the engine's number type
_ANSWER_SHARE = {"float32": 0.9, "float16": 0.25, "bfloat16": 0.25, "Q8_0": 0.25}


@dataclass(frozen=True)
class Bound:
    """Largest mean divergence (nats) and log-probability gap, smallest top-1 agreement."""

    kl: float
    gap: float
    top1: float


_DISTANCES = {
    "float32": Bound(1e-4, 0.01, 0.99),
    "float16": Bound(2e-3, 0.05, 0.97),
    "bfloat16": Bound(1e-2, 0.25, 0.9),
    "Q8_0": Bound(2e-2, 0.3, 0.85),
    "quantised": Bound(0.1, 0.5, 0.8),
}
NUMBER_TYPES = tuple(_DISTANCES)
# base with the adapter applied at run time against the merged sum, both float32; and the sum against its float16 cast
MERGE = Bound(1e-6, 1e-2, 0.99)
CAST = Bound(1e-5, 0.5, 0.98)


def judge(evidence: Evidence, subject: Subject, reference: Reference, material: Material) -> list[Check]:
    """Every finding about one backend."""
    name, after = evidence.engine, material.tuned
    found = [_file(evidence, subject), *said(evidence, reference, material)]
    in_process = stops.share_stopped([after[i] for i in evidence.rows])
    share = stops.share_stopped(evidence.answers)
    found.append(stops.check_answers(name, share, len(evidence.answers), in_process, cut_short=subject.training.cut_short))
    return found


def said(evidence: Evidence, reference: Reference, material: Material) -> list[Check]:
    """The findings about what a server said, whatever file it names: prompts, answers, distributions, canaries."""
    rows, base, after = material.rows, material.base, material.tuned
    found = [_prompts(evidence), _answers(evidence, rows, after)]
    found += _distributions(evidence, reference, material.yardstick.tokenizer)
    by_row = [evidence.answer_to(i) for i in range(len(after))]
    return [*found, tuned.check_served_canaries(evidence.engine, rows, base, after, by_row)]


def _file(evidence: Evidence, subject: Subject) -> Check:
    check_id = f"served.{evidence.engine}_file"
    if evidence.base_sha256 is not None:
        return _unmerged(check_id, evidence, subject)
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
        return skipped(
            check_id, f"not compared: {evidence.unread or 'it cannot be read here'}; the server says it loaded {evidence.file}"
        )
    if evidence.copy is not None:
        return _copy(check_id, evidence.copy, evidence.file_sha256)
    same = evidence.file_sha256 == want
    loaded = "this run's export" if same else "another model"
    figure = f"it loaded {loaded}: sha256 {evidence.file_sha256[:12]}"
    return held(check_id, same, figure, f"{str(want)[:12]}", "hash of the file the server names, taken now")


def _unmerged(check_id: str, evidence: Evidence, subject: Subject) -> Check:
    """A server that applies the adapter at run time: the adapter's file and the base's are both the run's."""
    if evidence.file_sha256 is None or not evidence.base_sha256:
        return skipped(check_id, f"not compared: {evidence.unread or 'adapter and base cannot both be read here'}")
    wanted = {"adapter": subject.sha256.get(subject.run.adapter.name, ""), "base": subject.training.base.sha256}
    seen = {"adapter": evidence.file_sha256, "base": evidence.base_sha256}
    wrong = [name for name in seen if seen[name] != wanted[name]]
    figure = f"unmerged: base {seen['base'][:12]} + adapter {seen['adapter'][:12]}"
    if wrong:
        figure = f"{figure}; the {' and the '.join(wrong)} is not this run's"
    elif evidence.file_newer:
        return Check(
            check_id, "failed", f"{figure}; written after the server had started", "older than the server", "the file's time"
        )
    bound = f"base {wanted['base'][:12]} + adapter {wanted['adapter'][:12]}"
    return held(check_id, not wrong, figure, bound, "hashes of what the server names, taken now")


def _copy(check_id: str, found: GgufComparison, sha256: str) -> Check:
    """A server that writes the model file anew: every tensor and every value of it are the run's."""
    (tensors, every), (values, keys) = found.tensors, found.values
    figure = f"its own copy (sha256 {sha256[:12]}) holds {tensors} of {every} tensors and {values} of {keys} metadata values of the GGUF"
    source = "bytes of each tensor and value of each key, read now from the file the server names"
    return held(check_id, not found.problems, "; ".join([figure, *found.problems]), "all, and no others", source)


def _prompts(evidence: Evidence) -> Check:
    check_id, source = f"served.{evidence.engine}_prompts", "the tokenizer's own rendering"
    if evidence.parity is None or evidence.parity.status == "skipped":
        return skipped(check_id, evidence.parity.figure if evidence.parity else "not asked")
    return held(check_id, evidence.parity.status == "passed", evidence.parity.figure, "every token ID equal", source)


def _answers(evidence: Evidence, rows: Sequence[HeldOut], after: Sequence[Answer]) -> Check:
    alike = sum(same(rows[i], a, after[i]) for i, a in zip(evidence.rows, evidence.answers, strict=True))
    figure = f"{alike} of {len(evidence.rows)} greedy answers are the in-process model's, word for word"
    least = _ANSWER_SHARE.get(evidence.dtype, min(_ANSWER_SHARE.values()))
    data = {"same": alike, "n": len(evidence.rows), "dtype": evidence.dtype}
    ok = alike >= max(1, math.floor(least * len(evidence.rows)))
    return held(f"served.{evidence.engine}_answers", ok, figure, f"at least {least:.0%} ({evidence.dtype})", MEASURED, **data)


def _distributions(evidence: Evidence, reference: Reference, tokenizer: Tokenizer) -> list[Check]:
    check_id = f"served.{evidence.engine}_logprobs"
    if not evidence.probes:
        return [skipped(check_id, evidence.problems.get("logprobs", "not asked"))]
    numbers = sorted(evidence.probes)
    ours = [_as_told(evidence, reference.held_out[i].top, tokenizer) for i in numbers]
    distance, divergences = compare_tops(ours, [evidence.probes[i] for i in numbers])
    found = [_with_texts(_distance(check_id, distance, divergences, evidence.dtype), evidence)]
    if evidence.tokenised is not None:
        found.append(_distance("gguf.logits", distance, divergences, evidence.dtype))
        same, every = evidence.tokenised
        figure = f"{same} of {every} texts (conversation suite and held-out prompts) give the tokenizer's IDs in llama.cpp"
        found.append(held("gguf.tokenizer", same == every > 0, figure, "all", "tokenizer.json"))
    return [*found, *_drift(evidence, reference, tokenizer)]


def _as_told(evidence: Evidence, top: Mapping[int, float], tokenizer: Tokenizer) -> Mapping[int, float]:
    """The reference as the engine could have told it: where it tells texts, tokens that print alike are one."""
    return fold(top.items(), tokenizer.alike) if evidence.as_text else top


def _with_texts(check: Check, evidence: Evidence) -> Check:
    """The check of distributions, with what telling them by text leaves out."""
    if not evidence.as_text:
        return check
    strange = sum(UNNAMED in top for top in evidence.probes.values())
    told = "told as text: special tokens, and parts of characters, count as one"
    left = f"{evidence.unsaid} positions that a text cannot say are left out, {strange} hold a text that is no token's"
    data = {**check.data, "positions_left_out": evidence.unsaid, "texts_unknown": strange}
    return replace(check, figure=f"{check.figure}; {told}; {left}", data=data)


def _distance(check_id: str, distance: Distance, divergences: list[float], dtype: str) -> Check:
    bound = _DISTANCES.get(dtype, _DISTANCES["bfloat16"])
    ok = distance.kl <= bound.kl and distance.gap <= bound.gap and distance.top1 >= bound.top1
    stated = f"KL {bound.kl:.0e}, log-probabilities {bound.gap:g}, top-1 {bound.top1:.0%} ({dtype})"
    data = {"kl": distance.kl, "gap": distance.gap, "top1": distance.top1, "n": distance.n, "divergences": divergences}
    return held(check_id, ok, str(distance), stated, MEASURED, **data)


def _drift(evidence: Evidence, reference: Reference, tokenizer: Tokenizer) -> list[Check]:
    """On control prompts, outside the data, the served model is the trained one too; its distance from the base is stated."""
    if not evidence.controls:
        return []
    numbers = sorted(evidence.controls)
    ours = [_as_told(evidence, reference.controls[i].top, tokenizer) for i in numbers]
    theirs = [evidence.controls[i] for i in numbers]
    distance, divergences = compare_tops(ours, theirs)
    found = _distance(f"tuned.{evidence.engine}_controls", distance, divergences, evidence.dtype)
    base = [_as_told(evidence, reference.controls_base[i], tokenizer) for i in numbers]
    away = [compare_tops(base, side)[0].kl for side in (theirs, ours)]
    figure = f"control prompts: {found.figure}; KL from the base {away[0]:.3f} served, {away[1]:.3f} in process"
    return [replace(found, figure=figure, data={**found.data, "served": away[0], "trained": away[1]})]
