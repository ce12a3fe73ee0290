"""The in-process reference of the certificate: next-token distributions of base, base + adapter, merged in float32, merged.

Four passes over the same token IDs; one model in memory at a time. On a CPU all are float32, so that what is compared is the
weights and not a kernel's rounding.
"""

import logging
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pipeline.certify
from pipeline.engines.base import ASKED
from pipeline.errors import at
from pipeline.model.tokenizer import Tokenizer
from pipeline.prompts.chat import ChatTemplate
from pipeline.prompts.stops import special_ids, turn_end
from pipeline.runs.files import read_json, write_json
from pipeline.runs.folder import RunFolder
from pipeline.runs.hashes import sha256_file
from pipeline.runs.manifest import Manifest
from pipeline.runs.stages import StageResult, run_stage
from pipeline.verify.distributions import ROWS, Probe, Reference
from pipeline.verify.material import Yardstick
from pipeline.verify.score import read_held_out, read_reference, rows_asked, spread
from training.base import BaseModel
from training.export.weights import Adapter, merged_weights, read_adapter
from training.memory import evaluate_need, require_memory

log = logging.getLogger(__name__)
STAGE = "probes"
_RECIPE = 2
_POSITIONS = 4
_CONTROL_TOKENS = 12
_BATCH = 8


@dataclass(frozen=True)
class Passage:
    """Token IDs, and the positions in them whose next token is asked for."""

    row: int
    ids: list[int]
    positions: list[int]


def probe(run: RunFolder, *, force: bool = False) -> StageResult:
    """Leave ``reference/probes.json``; skipped when base, adapter, merged folder and held-out rows are unchanged."""
    manifest = Manifest(run.manifest)
    base = BaseModel.of_run(run)
    inputs = {
        "recipe": _RECIPE,
        "heldout": sha256_file(run.heldout),
        "answers": sha256_file(run.reference("tuned")),
        "base": base.sha256,
        "adapter": manifest.sha256(run.adapter),
        "merged": manifest.sha256(run.merged),
    }

    def work() -> dict[str, Any]:
        found = reference(run, base.folder, full=manifest.require_training().full)
        write_json(run.probes, found.to_json())
        return {name: {key: value for key, value in one.items() if key != "divergences"} for name, one in found.figures.items()}

    return run_stage(run, STAGE, inputs, [run.probes], work, force=force)


def reference(run: RunFolder, base: Path, *, full: bool = False) -> Reference:
    """Distributions at some positions of held-out conversations and of control prompts, in process."""
    import torch

    chosen = _held_out(run)
    figures: dict[str, Any] = {}
    with torch.inference_mode():
        controls, base_controls, adapted = _of_base(run, base, chosen, full=full)
        merged = _loaded(run.merged)
        tuned, tuned_controls = merged.log_probabilities(chosen), merged.log_probabilities(controls)
        if not full:
            merged.load(base, read_adapter(run.adapter))
            summed = merged.log_probabilities(chosen)
            figures |= {"merge": _difference(adapted, summed), "cast": _difference(summed, tuned)}
    figures["drift"] = _difference(base_controls, tuned_controls)
    as_base = tuple(probe.top for probe in _probes(controls, base_controls))
    return Reference(_probes(chosen, tuned), _probes(controls, tuned_controls), as_base, figures)


def _of_base(run: RunFolder, base: Path, chosen: Sequence[Passage], *, full: bool) -> tuple[list[Passage], Any, Any]:
    """The control prompts as the base goes on, its distributions there, and those of base + adapter (None when ``full``).

    A function of its own, so that the base is out of memory before the merged model is loaded.
    """
    model = _loaded(base, None if full else run.adapter)
    adapted = None if full else model.log_probabilities(chosen)
    with model.without_adapter():
        controls = model.continued(_controls(run), _CONTROL_TOKENS)
        return controls, model.log_probabilities(controls), adapted


def _loaded(folder: Path, adapter: Path | None = None) -> "_Model":
    """A model in float32, once it is known to fit."""
    lower = "free memory, use a smaller base, or certify on another machine (certify --offline loads no model)"
    require_memory(f"comparing distributions of {folder.name}", evaluate_need(folder, on_gpu=False), lower)
    return _Model(folder, adapter)


def seen_by(run: RunFolder, folder: Path) -> tuple[Probe, ...]:
    """The run's held-out positions as the model in another folder sees them: how far another training is from this one."""
    chosen = _held_out(run)
    return _probes(chosen, _loaded(folder).log_probabilities(chosen))


def _held_out(run: RunFolder) -> list[Passage]:
    """Evenly spread held-out rows, each followed by the tuned model's own answer."""
    every, given = read_held_out(run.heldout), read_reference(run.reference("tuned"))
    rows, answers = rows_asked(every, given)
    numbers = sorted(given)
    yardstick = Yardstick.of_folder(run.merged)
    end = turn_end(yardstick.template, special_ids(run.merged)).id
    found = []
    for i in spread(len(rows), ROWS):
        with at(f"{run.heldout}:{numbers[i] + 1}"):
            _, prompt = yardstick.prompt(yardstick.neutral(rows[i]))
        # the marks of calls are in the text, and become the tokens that the model wrote
        answer = [*yardstick.tokenizer.encode(answers[i].text), end]
        found.append(Passage(i, prompt + answer, [len(prompt) - 1 + j for j in spread(len(answer), _POSITIONS)]))
    return found


def _controls(run: RunFolder) -> list[Passage]:
    prompts = read_json(Path(pipeline.certify.__file__).with_name("controls.json"))
    template, tokenizer = ChatTemplate.from_folder(run.merged), Tokenizer(run.merged)
    texts = [template.render([{"role": "user", "content": prompt}], add_generation_prompt=True) for prompt in prompts]
    return [Passage(i, tokenizer.encode(text), []) for i, text in enumerate(texts)]


class _Model:
    """A causal model in process, with or without a LoRA adapter applied at run time (not merged)."""

    def __init__(self, folder: Path, adapter: Path | None = None) -> None:
        import torch
        from transformers import AutoModelForCausalLM

        self.device = "cuda" if torch.cuda.is_available() else "cpu"
        model = AutoModelForCausalLM.from_pretrained(str(folder), dtype=torch.float32)
        if adapter is not None:
            from peft import PeftModel

            model = PeftModel.from_pretrained(model, str(adapter), torch_dtype=torch.float32)
        self.model = model.to(self.device).eval()
        self.adapted = adapter is not None

    def without_adapter(self) -> Any:
        """A context in which the base answers."""
        from contextlib import nullcontext

        return self.model.disable_adapter() if self.adapted else nullcontext()

    def load(self, base: Path, lora: Adapter) -> None:
        """Replace the weights by base + adapter, summed in float32 and not cast."""
        import torch

        known = dict(self.model.named_parameters())
        with torch.no_grad():
            for name, tensor in merged_weights(base, lora):
                if name in known:
                    known[name].copy_(tensor)

    def continued(self, prompts: Sequence[Passage], count: int) -> list[Passage]:
        """The prompts, all at once, each with its greedy continuation, asked at a few positions of that."""
        import torch

        width, ends = max(len(one.ids) for one in prompts), self._ends()
        ids = torch.tensor([[0] * (width - len(one.ids)) + one.ids for one in prompts], device=self.device)
        mask = torch.tensor([[0] * (width - len(one.ids)) + [1] * len(one.ids) for one in prompts], device=self.device)
        out = self.model.generate(input_ids=ids, attention_mask=mask, max_new_tokens=count, do_sample=False)
        found = []
        for one, new in zip(prompts, out[:, width:].tolist(), strict=True):
            # after its end a continuation is padded to the others' length
            length = next((i for i, token in enumerate(new, 1) if token in ends), len(new))
            asked = [len(one.ids) - 1 + j for j in spread(length, _POSITIONS)]
            found.append(Passage(one.row, one.ids + new[:length], asked))
        return found

    def _ends(self) -> set[int]:
        """The tokens that end a continuation."""
        known = self.model.generation_config.eos_token_id
        return set(known) if isinstance(known, list) else {known}

    def log_probabilities(self, sequences: Sequence[Passage]) -> Any:
        """Log-probabilities of every token at each asked position: (positions, vocabulary), float32, on the CPU."""
        import torch

        order = sorted(range(len(sequences)), key=lambda i: len(sequences[i].ids))
        found: dict[int, Any] = {}
        for start in range(0, len(order), _BATCH):
            chosen = order[start : start + _BATCH]
            batch = [sequences[i] for i in chosen]
            width = max(len(one.ids) for one in batch)
            ids = torch.tensor([one.ids + [0] * (width - len(one.ids)) for one in batch], device=self.device)
            mask = torch.tensor([[1] * len(one.ids) + [0] * (width - len(one.ids)) for one in batch], device=self.device)
            with torch.inference_mode(), self._asked_at([one.positions for one in batch]):
                logits = self.model(input_ids=ids, attention_mask=mask, use_cache=False).logits
            values: Any = torch.log_softmax(logits.float(), dim=-1).cpu()
            found |= zip(chosen, values.split([len(one.positions) for one in batch]), strict=True)
        return torch.cat([found[i] for i in range(len(sequences))])

    @contextmanager
    def _asked_at(self, positions: Sequence[Sequence[int]]) -> Iterator[None]:
        """The output head, a fifth of a small model, computes only these positions of each row: (positions, vocabulary)."""
        rows = [row for row, asked in enumerate(positions) for _ in asked]
        columns = [position for asked in positions for position in asked]
        head = self.model.get_output_embeddings()
        hook = head.register_forward_pre_hook(lambda _, given: (given[0][rows, columns],))
        try:
            yield
        finally:
            hook.remove()


def _probes(sequences: Sequence[Passage], values: Any) -> tuple[Probe, ...]:
    best = values.topk(ASKED, dim=-1)
    tops = [dict(zip(i.tolist(), v.tolist(), strict=True)) for v, i in zip(best.values, best.indices, strict=True)]
    where = [(one.row, tuple(one.ids[: position + 1])) for one in sequences for position in one.positions]
    return tuple(Probe(row, ids, top) for (row, ids), top in zip(where, tops, strict=True))


def _difference(ours: Any, theirs: Any) -> dict[str, Any]:
    """Whole-vocabulary divergence KL(ours || theirs) by position, largest difference of a log-probability, top-1 agreement."""
    divergences = (ours.exp() * (ours - theirs)).sum(dim=-1).clamp(min=0).tolist()
    return {
        "kl": sum(divergences) / len(divergences),
        "kl_max": max(divergences),
        "max_difference": float((ours - theirs).abs().max()),
        "top1": float((ours.argmax(dim=-1) == theirs.argmax(dim=-1)).float().mean()),
        "n": len(divergences),
        "divergences": divergences,
    }
