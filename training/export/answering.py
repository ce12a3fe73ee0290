"""Greedy decoding of many prompts: what they begin with is computed once, what has ended leaves the batch."""

import contextlib
import ctypes
import mmap
import sys
from collections.abc import Callable, Collection, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch.nn.functional import scaled_dot_product_attention
from transformers import AutoModelForCausalLM, Cache, DynamicCache
from transformers.cache_utils import CacheLayerMixin, DynamicLayer
from transformers.masking_utils import AttentionMaskInterface, sdpa_mask
from transformers.modeling_utils import AttentionInterface

from pipeline.model.safetensors import read_folder
from training.memory import PREFILL_TOKENS

_ATTENTION = "grouped"
_STORED = {"F16": torch.float16, "BF16": torch.bfloat16, "F32": torch.float32}
# weights below this are norms and biases: kept as float32, at no cost
_SMALL = 2**16
# rows of a batch that end before the others are taken out of it in groups of this share: each time all keys and values move up
_MOVED = 8
# settings of a generation config with which greedy answers are not the likeliest token each time
_CHANGES: tuple[str, ...] = (
    "no_repeat_ngram_size",
    "suppress_tokens",
    "begin_suppress_tokens",
    "bad_words_ids",
    "forced_bos_token_id",
)
_CHANGES += ("forced_eos_token_id", "min_length", "min_new_tokens", "sequence_bias")


@dataclass(frozen=True)
class Decoded:
    """New token IDs of a prompt, the end token too, and why there are no more: ``stop``, ``length`` or ``cut``."""

    ids: list[int]
    reason: str


def load(folder: Path, device: str, dtype: torch.dtype, *, mapped: bool = False) -> Any:
    """The model of a folder, ready to answer in ``dtype``.

    ``mapped``: weights stay as they lie in the file, and each is made ``dtype`` when it is used: the same products on half the
    memory of float32. Otherwise they are converted one by one, and what was read of the file is given back at once.
    """
    tensors = read_folder(folder)
    stored = _STORED.get(max(tensors, key=lambda tensor: tensor.elements).dtype, dtype)
    options = {"attn_implementation": _ATTENTION, "trust_remote_code": False, "use_safetensors": True}
    model = AutoModelForCausalLM.from_pretrained(str(folder), dtype=stored, **options).eval()
    for parameter in model.parameters():
        before = parameter.data
        if not mapped or before.numel() <= _SMALL:
            parameter.data = before.to(device, dtype)
        if parameter.data.data_ptr() != before.data_ptr():
            _forget(before)
    if mapped:
        _convert_in_use(model, dtype)
    return model.to(device)


def _forget(tensor: torch.Tensor) -> None:
    """Give back the pages of a tensor that nobody will read again; where that cannot be asked for they are given back later."""
    if sys.platform != "linux" or tensor.device.type != "cpu":
        return
    start = -(-tensor.data_ptr() // mmap.PAGESIZE) * mmap.PAGESIZE
    length = (tensor.data_ptr() + tensor.nbytes) // mmap.PAGESIZE * mmap.PAGESIZE - start
    if length > 0:
        with contextlib.suppress(OSError, AttributeError):
            ctypes.CDLL(None).madvise(ctypes.c_void_p(start), ctypes.c_size_t(length), mmap.MADV_DONTNEED)


def _convert_in_use(model: Any, dtype: torch.dtype) -> None:
    """Let each module see its large weights in ``dtype`` while it works, all in one room as large as the largest needs."""
    owners = [module for module in model.modules() if any(p.dtype != dtype for p in module.parameters(recurse=False))]
    embedding = model.get_input_embeddings()

    def size(module: Any) -> int:
        return sum(parameter.numel() for parameter in module.parameters(recurse=False))

    room = torch.empty(max((size(module) for module in owners if module is not embedding), default=0), dtype=dtype)

    def before(module: Any, _: Any) -> None:
        module.as_stored, filled = [(p, p.data) for p in module.parameters(recurse=False) if p.dtype != dtype], 0
        for parameter, data in module.as_stored:
            parameter.data = room[filled : filled + data.numel()].view(data.shape).copy_(data)
            filled += data.numel()

    def after(module: Any, *_: Any) -> None:
        for parameter, data in module.as_stored:
            parameter.data = data
        module.as_stored = []

    for module in owners:
        if module is embedding:  # a few rows of it are looked up
            module.register_forward_hook(lambda _module, _given, found: found.to(dtype))
        else:
            module.register_forward_pre_hook(before)
            module.register_forward_hook(after, always_call=True)


def obstacle(model: Any) -> str | None:
    """Why this model is not decoded here but by ``generate``; None: nothing speaks against it."""
    if not hasattr(model, "config"):
        return "it has no config"
    others = {type(layer).__name__ for layer in DynamicCache(config=model.config).layers if type(layer) is not DynamicLayer}
    if others:
        return f"its cache has other layers than attention over all tokens ({', '.join(sorted(others))})"
    settings = model.generation_config
    found = [name for name in _CHANGES if getattr(settings, name, None)]
    if getattr(settings, "repetition_penalty", None) not in (None, 1.0):
        found.append("repetition_penalty")
    return f"its generation config sets {', '.join(found)}" if found else None


def end_tokens(model: Any, tokenizer: Any) -> frozenset[int]:
    """Tokens that end an answer: the generation config's and the tokenizer's."""
    given = model.generation_config.eos_token_id
    every = given if isinstance(given, list | tuple) else [given]
    return frozenset(token for token in (*every, tokenizer.eos_token_id) if token is not None)


def decode(
    model: Any,
    prompts: Sequence[Sequence[int]],
    budget: int,
    ends: Collection[int],
    hopeless: Callable[[int, list[int]], bool] = lambda *_: False,
) -> list[Decoded]:
    """The likeliest token each time, until one of ``ends``, ``budget`` tokens, or ``hopeless`` (of prompt number and new tokens).

    One batch: keys and values of every prompt and answer are in memory until they have ended.
    """
    device, count = model.device, len(prompts)
    # one token of each is left, whose answer is asked for
    common = next((i for i, ids in enumerate(zip(*prompts, strict=False)) if len(set(ids)) > 1), min(map(len, prompts)))
    common = min(common, min(map(len, prompts)) - 1)
    width = max(map(len, prompts)) - common
    cache = _Kept(model, count, common + width + budget)
    mask = torch.zeros(count, common + width + budget, dtype=torch.long, device=device)
    mask[:, :common] = 1
    lengths = torch.tensor([len(ids) for ids in prompts], device=device)
    new: list[list[int]] = [[] for _ in prompts]
    reasons: dict[int, str] = {}

    def likeliest(ids: torch.Tensor, places: torch.Tensor, seen: torch.Tensor) -> torch.Tensor:
        out = model(
            input_ids=ids, position_ids=places, attention_mask=seen, past_key_values=cache, use_cache=True, logits_to_keep=1
        )
        found: torch.Tensor = out.logits[:, -1].float().argmax(dim=-1)
        return found

    with torch.inference_mode():
        if common:
            cache.turn(0, 1, 0)
            likeliest(
                torch.tensor([prompts[0][:common]], device=device), torch.arange(common, device=device)[None], mask[:1, :common]
            )
            cache.copy_first(common)
        tokens = torch.empty(count, dtype=torch.long, device=device)
        step = max(1, PREFILL_TOKENS // width)
        for start in range(0, count, step):
            rests = [list(ids[common:]) for ids in prompts[start : start + step]]
            end = start + len(rests)
            ids = torch.tensor([[0] * (width - len(rest)) + rest for rest in rests], device=device)
            mask[start:end, common : common + width] = torch.tensor([[0] * (width - len(r)) + [1] * len(r) for r in rests])
            seen = mask[start:end, : common + width]
            cache.turn(start, end, common)
            tokens[start:end] = likeliest(ids, (seen.cumsum(-1) - 1).clamp(min=0)[:, common:], seen)
        rows = list(range(count))
        for column in range(common + width, common + width + budget):
            for row, token in zip(rows, tokens.tolist(), strict=True):
                if row not in reasons:
                    new[row].append(token)
                    if token in ends:
                        reasons[row] = "stop"
                    elif len(new[row]) == budget:
                        reasons[row] = "length"
                    elif hopeless(row, new[row]):
                        reasons[row] = "cut"
            left = [place for place, row in enumerate(rows) if row not in reasons]
            if not left:
                break
            if (len(rows) - len(left)) * _MOVED >= len(rows):
                cache.move_up(left, column)
                kept = torch.tensor(left, device=device)
                mask, lengths, tokens = mask[kept], lengths[kept], tokens[kept]
                rows = [rows[place] for place in left]
            mask[:, column] = 1
            cache.turn(0, len(rows), column)
            tokens = likeliest(tokens[:, None], lengths[:, None], mask[:, : column + 1])
            lengths = lengths + 1
    return [Decoded(ids, reasons[row]) for row, ids in enumerate(new)]


class _Layer(CacheLayerMixin):  # type: ignore[misc]
    """Keys and values of one layer in a room of (rows, heads, columns, size) that is taken once and filled in place."""

    def __init__(self, rows: int, columns: int) -> None:
        super().__init__()
        self.rows, self.columns = rows, columns
        self.first, self.last, self.filled = 0, rows, 0

    def lazy_initialization(self, key_states: torch.Tensor, value_states: torch.Tensor) -> None:
        """Take the room, now that the sizes are seen."""
        self.keys, self.values = (
            one.new_empty(self.rows, one.shape[1], self.columns, one.shape[3]) for one in (key_states, value_states)
        )
        self.is_initialized = True

    def update(
        self, key_states: torch.Tensor, value_states: torch.Tensor, *_: Any, **__: Any
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Add columns to the rows whose turn it is, and give all their columns."""
        if not self.is_initialized:
            self.lazy_initialization(key_states, value_states)
        assert self.keys is not None and self.values is not None
        before, self.filled = self.filled, self.filled + key_states.shape[2]
        found = []
        for room, states in ((self.keys, key_states), (self.values, value_states)):
            rows = room[self.first : self.last]
            rows[:, :, before : self.filled] = states
            found.append(rows[:, :, : self.filled])
        return found[0], found[1]

    def get_mask_sizes(self, query_length: int) -> tuple[int, int]:
        """Columns with the new ones, and that they begin at the first."""
        return self.filled + query_length, 0

    def get_seq_length(self) -> int:
        """Columns so far."""
        return self.filled

    def get_max_length(self) -> int:
        """Columns there is room for."""
        return self.columns


class _Kept(Cache):  # type: ignore[misc]
    """Keys and values of a batch whose rows can be worked on in parts, and can leave it."""

    def __init__(self, model: Any, rows: int, columns: int) -> None:
        super().__init__(layers=[_Layer(rows, columns) for _ in DynamicCache(config=model.config).layers])

    def turn(self, first: int, last: int, filled: int) -> None:
        """The next pass is about these rows, which have so many columns."""
        for layer in self.layers:
            layer.first, layer.last, layer.filled = first, last, filled

    def copy_first(self, columns: int) -> None:
        """Every row begins as the first."""
        for layer in self.layers:
            for room in (layer.keys, layer.values):
                room[1:, :, :columns] = room[:1, :, :columns]

    def move_up(self, rows: Sequence[int], columns: int) -> None:
        """Keep only these rows (ascending), at the front; in place, for a copy might not fit."""
        for layer in self.layers:
            for room in (layer.keys, layer.values):
                for place, row in enumerate(rows):
                    if place != row:
                        room[place, :, :columns] = room[row, :, :columns]


def _attend(
    _module: Any, query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, attention_mask: torch.Tensor | None,
    scaling: float | None = None, **_: Any,
) -> tuple[torch.Tensor, None]:  # fmt: skip
    """Attention in which the heads that share keys are further queries to them: nothing is repeated in memory."""
    rows, heads, length, size = query.shape
    group = heads // key.shape[1]
    assert attention_mask is not None
    if group > 1:
        query, attention_mask = query.reshape(rows, key.shape[1], group * length, size), attention_mask.repeat(1, 1, group, 1)
    out = scaled_dot_product_attention(query, key, value, attn_mask=attention_mask, scale=scaling)
    return out.reshape(rows, heads, length, -1).transpose(1, 2).contiguous(), None


def _mask(*given: Any, **more: Any) -> torch.Tensor | None:
    """A mask that is always written out: what is left out where nothing is padded would have to be known to :func:`_attend`."""
    made: torch.Tensor | None = sdpa_mask(*given, **{**more, "allow_is_causal_skip": False, "allow_is_bidirectional_skip": False})
    return made


AttentionInterface.register(_ATTENTION, _attend)
AttentionMaskInterface.register(_ATTENTION, _mask)
