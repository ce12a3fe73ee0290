"""The in-process reference: greedy answers of the base and of the merged model to every held-out prompt."""

import json
import logging
import time
from collections.abc import Sequence
from dataclasses import asdict
from datetime import datetime
from pathlib import Path
from typing import Any

from pipeline.errors import at
from pipeline.prompts.chat import ChatTemplate
from pipeline.runs import interrupt
from pipeline.runs.files import write_atomic
from pipeline.runs.folder import RunFolder
from pipeline.runs.hashes import sha256_file, sha256_json
from pipeline.runs.manifest import Manifest
from pipeline.runs.stages import Force, Partial, StageResult, run_stage
from pipeline.verify.score import Answer, HeldOut, answer_budget, fields_of, read_held_out, score
from training.export.merge import trained_base
from training.memory import evaluate_need, require_memory

log = logging.getLogger(__name__)
_RECIPE = 1
_EVERY_SECONDS = 10.0
# tokens of a batch, prompts and answers padded: fills a CPU's matrix products, and stays small beside the weights on a GPU
_BATCH_TOKENS = 16384


def evaluate(run: RunFolder, *, force: Force = False) -> dict[str, StageResult]:
    """Answer the held-out prompts with the base and with ``merged_fp16``; each half is skipped when unchanged."""
    manifest = Manifest(run.manifest)
    training = manifest.require_training()
    date = training.date
    rows = read_held_out(run.heldout)
    dated = {"date": date} if date and "strftime_now" in ChatTemplate.from_folder(run.merged).source else {}
    # answers in free text were once cut shorter than they are served now
    free = {} if fields_of(rows) else {"budget": "free text"}
    # documents and the marks of calls were once left out, and thoughts cut short
    more = {"rows": "documents and calls"} if any(row.marks or row.documents or row.thinks for row in rows) else {}
    shared = {"recipe": _RECIPE, "heldout": sha256_file(run.heldout), **dated, **free, **more}
    now = datetime.fromisoformat(date) if date else None
    models = {"base": training.base.sha256, "tuned": manifest.sha256(run.merged)}
    results = {}
    for which, sha256 in models.items():
        target = run.reference(which)
        inputs = {**shared, "model": sha256}

        def work(which: str = which, target: Path = target, key: str = sha256_json(inputs)) -> dict[str, Any]:
            folder = trained_base(run) if which == "base" else run.merged
            partial = Partial(target.with_suffix(".part"), key)
            answers = answer_all(folder, rows, partial, now)
            write_atomic(target, "".join(json.dumps(_written(answer), ensure_ascii=False) + "\n" for answer in answers))
            partial.remove()
            return score(rows, answers)

        results[which] = run_stage(run, f"evaluate_{which}", inputs, [target], work, force=force)
    return results


def answer_all(folder: Path, rows: Sequence[HeldOut], partial: Partial, now: datetime | None) -> list[Answer]:
    """Greedy float32 answers of a model folder, in the rows' order; those in ``partial`` are taken, new ones added to it.

    ``now`` is the clock that dated templates see.
    """
    import torch
    from tqdm.auto import tqdm
    from transformers import AutoTokenizer

    model = _model(folder)
    tokenizer = AutoTokenizer.from_pretrained(str(folder), padding_side="left", trust_remote_code=False)
    template = ChatTemplate.from_folder(folder)
    prompts = []
    for number, row in enumerate(rows, 1):
        tools, documents = row.tools, row.documents
        with at(f"held-out row {number}"):
            text = template.render(row.messages, tools=tools, documents=documents, add_generation_prompt=True, now=now)
        prompts.append(text)
    lengths = [len(tokenizer(row.expected, add_special_tokens=False)["input_ids"]) for row in rows]
    budget = answer_budget(rows, lengths)
    # longest first: a batch pads little, and running out of memory shows at once
    order = sorted(range(len(rows)), key=lambda i: -len(prompts[i]))
    answers = {int(row): Answer(**made) for row, made in partial.done.items()}
    if answers:
        log.info("%s: %d of %d answers are there from before", folder.name, len(answers), len(rows))
    longest = max(len(tokenizer(prompts[order[0]], add_special_tokens=False)["input_ids"]), 1)
    size = max(1, _BATCH_TOKENS // (longest + budget))
    said = time.monotonic()
    # where nothing is said of it, tqdm's own variable says whether there is a bar
    quiet: dict[str, Any] = {} if logging.getLogger().isEnabledFor(logging.INFO) else {"disable": True}
    for start in tqdm(range(0, len(order), size), desc=f"answers of {folder.name}", **quiet):
        chosen = order[start : start + size]
        if all(i in answers for i in chosen):
            continue
        interrupt.leave_if_asked(f"{len(answers)} of {len(rows)} answers of {folder.name} are kept")
        batch = tokenizer([prompts[i] for i in chosen], return_tensors="pt", padding=True, add_special_tokens=False)
        with torch.inference_mode():
            out = model.generate(**batch.to(model.device), max_new_tokens=budget, do_sample=False)
        new = out[:, batch["input_ids"].shape[1] :].tolist()
        made = {i: _answer(ids, tokenizer, rows[i].marks) for i, ids in zip(chosen, new, strict=True)}
        answers |= made
        partial.add({str(i): _written(answer) for i, answer in made.items()})
        if time.monotonic() - said > _EVERY_SECONDS:
            said = time.monotonic()
            log.info("%s: %d of %d prompts answered", folder.name, len(answers), len(rows))
    return [answers[i] for i in range(len(rows))]


def _model(folder: Path) -> Any:
    """The model, ready to answer on what this machine has."""
    import torch
    from transformers import AutoModelForCausalLM

    device = "cuda" if torch.cuda.is_available() else "cpu"
    lower = "use a smaller base, free memory, or answer on another machine"
    require_memory("answering the held-out prompts", evaluate_need(folder, device == "cuda"), lower)
    # float32 on a CPU: the reference should not add rounding of its own; a GPU holds what was trained
    dtype = torch.float32 if device == "cpu" else torch.float16
    model = AutoModelForCausalLM.from_pretrained(str(folder), dtype=dtype, trust_remote_code=False, use_safetensors=True)
    return model.to(device).eval()


def _answer(ids: list[int], tokenizer: Any, marks: Sequence[str]) -> Answer:
    """Text up to the end token, without special tokens, except those in ``marks``; with all of them where there are marks of calls
    to be found, as engines then give them too: one in the midst of a call is a fault to be seen.
    """
    ended = tokenizer.eos_token_id in ids
    kept = ids[: ids.index(tokenizer.eos_token_id)] if ended else ids
    return Answer(tokenizer.decode(kept, skip_special_tokens=not marks), "stop" if ended else "length")


def _written(answer: Answer) -> dict[str, Any]:
    """An answer as a line of the reference; in process nothing is told apart from its text."""
    return {key: value for key, value in asdict(answer).items() if value is not None}
