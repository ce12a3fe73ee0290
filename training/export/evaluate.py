"""The in-process reference: greedy answers of the merged model to the held-out prompts, and of the base to a sample of them."""

import json
import logging
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, field
from datetime import datetime
from pathlib import Path
from typing import Any

from pipeline.errors import InputError, at
from pipeline.machine.hardware import Hardware
from pipeline.prompts.chat import ChatTemplate
from pipeline.runs import interrupt
from pipeline.runs.files import write_atomic
from pipeline.runs.folder import RunFolder
from pipeline.runs.hashes import sha256_file, sha256_json
from pipeline.runs.manifest import Manifest
from pipeline.runs.stages import Force, Partial, StageResult, run_stage
from pipeline.verify.score import CUT, Answer, HeldOut, answer_budget, fields_of, may_parse, read_held_out, score, spread, wilson
from training.export.merge import trained_base
from training.memory import FILLED, Need, evaluate_need, require_memory

log = logging.getLogger(__name__)
_RECIPE = 1
_EVERY_SECONDS = 10.0
# tokens of a batch, prompts and answers padded: fills a CPU's matrix products, and stays small beside the weights on a GPU
_BATCH_TOKENS, _BATCH_ROWS = 16384, 256
# rows with the same system prompt and tools that are worth batches of their own
_ALIKE = 16
# held-out rows that the base is asked, and the tuned model at most
BASE_ANSWERS, TUNED_ANSWERS = 64, 1000
# new tokens of a base's answer that are kept for people to read, before it is seen whether it can still be right
_SHOWN = 8
# multiplications from which bfloat16 is tried where the CPU has it: minutes of float32
_LONG = 1e14
# rows whose answers in bfloat16 must be those in float32
_PROOF = 8


def evaluate(
    run: RunFolder, *, force: Force = False, base_answers: int = BASE_ANSWERS, tuned_answers: int = TUNED_ANSWERS
) -> dict[str, StageResult]:
    """Answer held-out prompts with the base and with ``merged_fp16``; each half is skipped when unchanged.

    ``base_answers`` and ``tuned_answers`` are how many evenly spread rows each is asked at most, 0 for all; the base is asked
    rows that the tuned model is asked too. InputError for other numbers.
    """
    for name, number in (("base answers", base_answers), ("tuned answers", tuned_answers)):
        if number < 0 or number == 1:
            raise InputError(
                f"{name} is {number}", remedy="0 for all rows, or at least 2: the first and the last are in every sample"
            )
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
    asked = {"tuned": spread(len(rows), tuned_answers or len(rows))}
    asked["base"] = [asked["tuned"][i] for i in spread(len(asked["tuned"]), base_answers or len(rows))]
    results = {}
    for which, sha256 in models.items():
        target, numbers = run.reference(which), asked[which]
        # an earlier version asked all rows, and said nothing of it
        inputs = {**shared, "model": sha256, **({} if len(numbers) == len(rows) else {"asked": len(numbers)})}

        def work(
            which: str = which, target: Path = target, numbers: list[int] = numbers, key: str = sha256_json(inputs)
        ) -> dict[str, Any]:
            folder = trained_base(run) if which == "base" else run.merged
            partial = Partial(target.with_suffix(".part"), key)
            # the whole set has one budget, which served answers have too
            chosen = Asked(rows, numbers, now, cut=which == "base")
            answers, how = answer_all(folder, chosen, partial)
            lines = [
                _written(answer, None if len(numbers) == len(rows) else i) for i, answer in zip(numbers, answers, strict=True)
            ]
            write_atomic(target, "".join(json.dumps(line, ensure_ascii=False) + "\n" for line in lines))
            partial.remove()
            scores = score([rows[i] for i in numbers], answers, rows)
            return {**scores, "of": len(rows), "exact_interval": wilson(scores["exact"], len(answers)), "reference": how}

        results[which] = run_stage(run, f"evaluate_{which}", inputs, [target], work, force=force)
    return results


def largest_need(folder: Path) -> Need:
    """What answering takes with the largest batch that there is, on a CPU: for those who want memory beside it."""
    return evaluate_need(folder, False, _BATCH_TOKENS, _BATCH_ROWS)


@dataclass(frozen=True)
class Asked:
    """Held-out rows, the numbers of those to be asked (None: all), and the clock that dated templates see.

    ``cut``: an answer that can no longer be right may end early: for answers that nothing but their score is taken from.
    """

    rows: Sequence[HeldOut]
    numbers: Sequence[int] | None = None
    now: datetime | None = None
    cut: bool = False
    chosen: list[HeldOut] = field(init=False)

    def __post_init__(self) -> None:
        object.__setattr__(self, "chosen", [self.rows[i] for i in self.numbers] if self.numbers is not None else list(self.rows))


def answer_all(folder: Path, asked: Asked, partial: Partial) -> tuple[list[Answer], dict[str, Any]]:
    """Greedy answers of a model folder in the rows' order, and how they were made; those in ``partial`` are taken, new ones added.

    Products are float32 on a CPU. Where that would take long and the CPU has bfloat16, it answers a sample in both: bfloat16
    answers the rest if it says the same, word for word.
    """
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(str(folder), padding_side="left", trust_remote_code=False)
    template, rows = ChatTemplate.from_folder(folder), asked.chosen
    numbers = asked.numbers if asked.numbers is not None else range(len(rows))
    prompts = []
    for number, row in zip(numbers, rows, strict=True):
        with at(f"held-out row {number + 1}"):
            text = template.render(
                row.messages, tools=row.tools, documents=row.documents, add_generation_prompt=True, now=asked.now
            )
        prompts.append(tokenizer(text, add_special_tokens=False)["input_ids"])
    lengths = [len(tokenizer(row.expected, add_special_tokens=False)["input_ids"]) for row in asked.rows]
    line = _Line(folder, asked, tokenizer, prompts, answer_budget(asked.rows, lengths), partial)
    return line.answers()


class _Line:
    """The answers of one model, batch by batch."""

    def __init__(
        self, folder: Path, asked: Asked, tokenizer: Any, prompts: list[list[int]], budget: int, partial: Partial
    ) -> None:
        self.folder, self.asked, self.tokenizer = folder, asked, tokenizer
        self.prompts, self.budget, self.partial = prompts, budget, partial
        self.rows, self.fields = asked.chosen, fields_of(asked.rows)
        self.made = {int(row): Answer(**made) for row, made in partial.done.items() if row.isdigit()}
        self.how: dict[str, Any] = {"engine": "transformers", **partial.done.get("how", {})}
        self.batch_tokens, self.mapped, self.device = _BATCH_TOKENS, False, "cpu"

    def answers(self) -> tuple[list[Answer], dict[str, Any]]:
        """Every row's answer, and how they were made."""
        if self.made:
            log.info("%s: %d of %d answers are there from before", self.folder.name, len(self.made), len(self.rows))
        if len(self.made) < len(self.rows):
            proved = self.how.get("dtype") == "bfloat16"
            model = self._loaded("bfloat16" if proved else None)
            if not proved and self._long(model):
                model = self._proved(model)
            self._answer(model, [i for i in range(len(self.rows)) if i not in self.made])
        return [self.made[i] for i in range(len(self.rows))], self.how

    def _loaded(self, dtype: str | None = None) -> Any:
        """The model, ready to answer on what this machine has; OutOfMemory when it cannot."""
        model, self.device, self.mapped, self.batch_tokens = _model(self.folder, self._most_tokens(), dtype)
        self.how |= {"dtype": dtype or ("float16" if self.device == "cuda" else "float32")}
        return model

    def _most_tokens(self) -> tuple[int, int]:
        """Tokens and rows of the largest batch, where memory allows it."""
        batches = self._batches(range(len(self.rows)))
        sizes = [(len(rows) * (max(len(self.prompts[i]) for i in rows) + self.budget), len(rows)) for rows in batches]
        return max(sizes)

    def _long(self, model: Any) -> bool:
        """Whether float32 would take minutes that bfloat16 may save."""
        from training.export import answering

        machine = Hardware.detect()
        tokens = sum(map(len, self.prompts)) + self.budget * len(self.rows)
        work = 2 * tokens * sum(parameter.numel() for parameter in model.parameters()) if hasattr(model, "parameters") else 0
        fast = self.device == "cpu" and machine.cpu.fast_bfloat16
        return fast and work > _LONG and len(self.rows) > 2 * _PROOF and not answering.obstacle(model)

    def _proved(self, model: Any) -> Any:
        """A model in bfloat16 if it answers a sample as float32 did, else one in float32 again."""
        sample = spread(len(self.rows), _PROOF)
        self._answer(model, sample)
        del model
        model, want = self._loaded("bfloat16"), [self.made[i] for i in sample]
        if self._decoded(model, sample) == want:
            self.how |= {"proved_on": len(sample)}
            self.partial.add({"how": {key: self.how[key] for key in ("dtype", "proved_on")}})
            log.info(
                "%s: bfloat16 answers %d rows as float32 does, word for word, and answers the rest", self.folder.name, len(sample)
            )
            return model
        log.info("%s: bfloat16 answers %d rows otherwise than float32, which answers the rest", self.folder.name, len(sample))
        del model
        return self._loaded()

    def _answer(self, model: Any, wanted: Sequence[int]) -> None:
        """Answer rows, batch by batch; each batch is kept when it is done."""
        from tqdm.auto import tqdm

        from training.export import answering

        slow = answering.obstacle(model)
        if slow and "decoder" not in self.how:
            self.how |= {"decoder": "generate"}
            log.info("%s: answered by transformers' generate: %s", self.folder.name, slow)
        said = time.monotonic()
        # where nothing is said of it, tqdm's own variable says whether there is a bar
        quiet: dict[str, Any] = {} if logging.getLogger().isEnabledFor(logging.INFO) else {"disable": True}
        for chosen in tqdm(self._batches(wanted), desc=f"answers of {self.folder.name}", **quiet):
            interrupt.leave_if_asked(f"{len(self.made)} of {len(self.rows)} answers of {self.folder.name} are kept")
            found = self._generated(model, chosen) if slow else self._decoded(model, chosen)
            new = dict(zip(chosen, found, strict=True))
            self.made |= new
            self.partial.add({str(i): _written(answer) for i, answer in new.items()})
            if time.monotonic() - said > _EVERY_SECONDS:
                said = time.monotonic()
                log.info("%s: %d of %d prompts answered", self.folder.name, len(self.made), len(self.rows))

    def _batches(self, wanted: Sequence[int]) -> list[list[int]]:
        """Rows of like beginning and length together, longest first: running out of memory shows at once."""
        groups: dict[str, list[int]] = {}
        for i in wanted:
            row = self.rows[i]
            system = [message for message in row.messages[:1] if message["role"] == "system"]
            groups.setdefault(json.dumps([system, row.tools, row.documents], sort_keys=True, default=str), []).append(i)
        alike = [group for group in groups.values() if len(group) >= _ALIKE]
        others = [i for group in groups.values() if len(group) < _ALIKE for i in group]
        found: list[list[int]] = []
        for group in [*alike, *([others] if others else [])]:
            order = sorted(group, key=lambda i: -len(self.prompts[i]))
            while order:
                longest = len(self.prompts[order[0]]) + self.budget
                # of equal size, so that the last is not a small one: a small batch takes nearly as long as a large one
                most = max(1, min(_BATCH_ROWS, self.batch_tokens // longest))
                size = -(-len(order) // -(-len(order) // most))
                found.append(order[:size])
                order = order[size:]
        return found

    def _decoded(self, model: Any, chosen: Sequence[int]) -> list[Answer]:
        from training.export import answering

        def hopeless(place: int, ids: list[int]) -> bool:
            row = self.rows[chosen[place]]
            if len(ids) < _SHOWN or not self.fields or row.marks or row.thinks or row.opened:
                return False
            return not may_parse(self.tokenizer.decode(ids, skip_special_tokens=True))

        more: dict[str, Callable[[int, list[int]], bool]] = {"hopeless": hopeless} if self.asked.cut else {}
        ends = answering.end_tokens(model, self.tokenizer)
        made = answering.decode(model, [self.prompts[i] for i in chosen], self.budget, ends, **more)
        return [
            Answer(self.tokenizer.decode(one.ids, skip_special_tokens=True), CUT)
            if one.reason == "cut"
            else _answer(one.ids, self.tokenizer, self.rows[i].marks)
            for i, one in zip(chosen, made, strict=True)
        ]

    def _generated(self, model: Any, chosen: Sequence[int]) -> list[Answer]:
        import torch

        given = {"input_ids": [self.prompts[i] for i in chosen]}
        batch = self.tokenizer.pad(given, padding=True, return_tensors="pt")
        with torch.inference_mode():
            out = model.generate(**batch.to(model.device), max_new_tokens=self.budget, do_sample=False)
        new = out[:, batch["input_ids"].shape[1] :].tolist()
        return [_answer(ids, self.tokenizer, self.rows[i].marks) for i, ids in zip(chosen, new, strict=True)]


def _model(folder: Path, most: tuple[int, int], dtype: str | None) -> tuple[Any, str, bool, int]:
    """The model, where it is, whether its weights stay as stored, and the tokens of a batch that there is memory for.

    float32 on a CPU: the reference should not add rounding of its own; a GPU holds what was trained. Weights in float32 that
    would fill the memory stay as they are stored, and are made float32 when they are used, with the same answers.
    """
    import torch

    from training.export import answering

    device, (tokens, rows), machine = "cuda" if torch.cuda.is_available() else "cpu", most, Hardware.detect()
    gpu = device == "cuda"
    free = max((one.free_gib for one in machine.gpus), default=0.0) if gpu else machine.ram_free_gib
    mapped = not gpu and dtype is None and evaluate_need(folder, gpu, tokens, rows).gib > FILLED * free
    # of a batch as large as there is room for; one row's at least
    least = tokens // rows
    while rows > 1 and evaluate_need(folder, gpu, rows * least, rows, mapped=mapped or dtype is not None).gib > FILLED * free:
        rows = rows // 2
    need = evaluate_need(folder, gpu, rows * least, rows, mapped=mapped or dtype is not None)
    lower = "use a smaller base, free memory, or answer on another machine"
    require_memory("answering the held-out prompts", need, lower)
    if mapped:
        log.info("%s: float32 weights would fill the memory: they stay as stored, and are converted in use", folder.name)
    made = torch.float16 if gpu else getattr(torch, dtype or "float32")
    return answering.load(folder, device, made, mapped=mapped), device, mapped, rows * least


def _answer(ids: list[int], tokenizer: Any, marks: Sequence[str]) -> Answer:
    """Text up to the end token, without special tokens, except those in ``marks``; with all of them where there are marks of calls
    to be found, as engines then give them too: one in the midst of a call is a fault to be seen.
    """
    ended = tokenizer.eos_token_id in ids
    kept = ids[: ids.index(tokenizer.eos_token_id)] if ended else ids
    return Answer(tokenizer.decode(kept, skip_special_tokens=not marks), "stop" if ended else "length")


def _written(answer: Answer, row: int | None = None) -> dict[str, Any]:
    """An answer as a line of the reference, with the number of its held-out row, from 1, where not all were asked; in process
    nothing is told apart from its text.
    """
    told = {} if row is None else {"row": row + 1}
    return told | {key: value for key, value in asdict(answer).items() if value is not None}
