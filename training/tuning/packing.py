"""Batches without waste: the rows of a batch lie in one sequence, and what several of them begin with lies there once.

System prompts, tool lists and documents are the same in many rows. Their tokens are computed once for a batch; each row's rest
sees them and itself, at the positions it has alone. Loss and gradients are those of the padded batch.
"""

import random
from collections import defaultdict
from collections.abc import Hashable, Iterator, Mapping, Sequence
from functools import partial
from itertools import pairwise
from typing import Any

from training.tuning.prepare import IGNORED, Example

_LOOKED_AT = 50  # batches
ATTENTION = "packed"  # this attention's name in transformers' registry
# layers that carry a state from token to token cannot begin twice in one sequence
_RECURRENT = ("linear_attention", "mamba", "conv", "recurrent")


class Batches:
    """Row numbers in the order of training: shuffled anew each epoch, rows with the same head in the same batch where they fill one.

    ``lengths``: for padded batches, whose rows are then of like length. A sampler of PyTorch: only the last batch is smaller than ``size``.
    """

    def __init__(self, heads: Sequence[Hashable], size: int, seed: int, lengths: Sequence[int] | None = None) -> None:
        self.heads, self.size, self.seed, self.lengths, self.epoch = heads, size, seed, lengths, 0

    def __len__(self) -> int:
        return len(self.heads)

    def set_epoch(self, epoch: int) -> None:
        """Shuffle as in this epoch; also one that a resumed training begins with."""
        self.epoch = epoch

    def __iter__(self) -> Iterator[int]:
        shuffle = random.Random(f"{self.seed}/{self.epoch}").shuffle
        groups: dict[Hashable, list[int]] = defaultdict(list)
        numbers = list(range(len(self.heads)))
        shuffle(numbers)
        for number in numbers:
            groups[self.heads[number]].append(number)
        batches, left = list[list[int]](), list[int]()
        for rows in groups.values():
            whole = len(rows) - len(rows) % self.size
            batches += self._cut(rows[:whole])
            left += rows[whole:]  # beside each other still, so that what they share is found
        batches += self._cut(left)
        last = [batches.pop()] if batches and len(batches[-1]) < self.size else []
        shuffle(batches)
        for batch in [*batches, *last]:
            yield from batch

    def _cut(self, rows: list[int]) -> list[list[int]]:
        if self.lengths:
            # of like length within some batches' worth: sorting all would give the same batches in every epoch
            lengths, several = self.lengths, 16 * self.size
            pieces = [rows[i : i + several] for i in range(0, len(rows), several)]
            rows = [row for piece in pieces for row in sorted(piece, key=lambda row: -lengths[row])]
        return [rows[i : i + self.size] for i in range(0, len(rows), self.size)]


def groups(rows: Sequence[Sequence[int]]) -> list[tuple[list[int], int]]:
    """Rows of token IDs by what they begin with: for each group its row numbers and the length of its common beginning.

    Of all ways to divide the sorted rows, the one that computes the fewest tokens. A row keeps at least one token of its own.
    """
    order = sorted(range(len(rows)), key=lambda i: tuple(rows[i]))
    beside = [_common(rows[a], rows[b]) for a, b in pairwise(order)]
    best: list[tuple[int, int, int]] = [(0, 0, 0)]  # tokens saved so far, where the last group begins, its common beginning
    for end in range(1, len(order) + 1):
        found, common, shortest = [], 0, len(rows[order[end - 1]])
        for start in range(end - 1, -1, -1):
            shortest = min(shortest, len(rows[order[start]]))
            if start < end - 1:
                # of sorted rows, the first and the last have in common what all neighbours between them have
                common = min(beside[start], common if start < end - 2 else beside[start])
            kept = min(common, shortest - 1)
            found.append((best[start][0] + kept * (end - start - 1), start, kept))
        best.append(max(found))
    divided, end = [], len(order)
    while end:
        _, start, common = best[end]
        divided.append((order[start:end], common))
        end = start
    return divided[::-1]


def saved(rows: Sequence[Example], size: int, seed: int) -> float:
    """The share of tokens that need not be computed in batches of ``size``, as the first of an epoch's show."""
    order = list(Batches([row.head for row in rows], size, seed))[: size * _LOOKED_AT]
    batches = [[rows[i].input_ids for i in order[k : k + size]] for k in range(0, len(order), size)]
    shared = sum(common * (len(members) - 1) for batch in batches for members, common in groups(batch))
    return shared / sum(len(ids) for batch in batches for ids in batch)


def _common(one: Sequence[int], other: Sequence[int]) -> int:
    """How many tokens two rows begin with alike."""
    return next((i for i, (a, b) in enumerate(zip(one, other, strict=False)) if a != b), min(len(one), len(other)))


def pack(batch: Sequence[Example], *, share: bool = True) -> dict[str, Any]:
    """A batch of B rows as one sequence of T tokens: the common beginnings, then each row's rest.

    ``input_ids`` and ``position_ids`` (1, T), ``attention_mask`` (B, 1, R, P + R) bool - which of its beginning and its own tokens a
    rest's token sees - ``layout`` with the places of both in the sequence, ``logits_to_keep`` (K,) the trained positions, ``labels``
    and ``shift_labels`` (1, K) their next tokens. Without ``share`` each row is there whole.
    """
    import torch

    divided = groups([e.input_ids for e in batch]) if share else [([i], 0) for i in range(len(batch))]
    tokens, positions = list[int](), list[int]()
    begins: dict[int, range] = {}  # by row: where its common beginning lies
    for members, common in divided:
        place = range(len(tokens), len(tokens) + common)
        begins |= dict.fromkeys(members, place)
        tokens += batch[members[0]].input_ids[:common]
        positions += range(common)
    rests, kept, targets = list[range](), list[int](), list[int]()
    for i, example in enumerate(batch):
        begin = begins[i]
        rests.append(range(len(tokens), len(tokens) + len(example.input_ids) - len(begin)))
        tokens += example.input_ids[len(begin) :]
        positions += range(len(begin), len(example.input_ids))
        where = [*begin, *rests[-1]]
        for place, target in zip(where, example.labels[1:], strict=False):
            if target != IGNORED:
                kept.append(place)
                targets.append(target)
    shared = [place for place in dict.fromkeys(begins.values()) if place]
    width, longest = max(map(len, shared), default=0), max(map(len, rests))
    before = torch.tensor([[j < len(begins[i]) for j in range(width)] for i in range(len(batch))], dtype=torch.bool)
    mask = torch.ones(len(batch), 1, longest, width + longest, dtype=torch.bool).tril(width)
    mask[..., :width] = before[:, None, None, :]
    rows, rows_back = _places(rests, longest)
    starts, starts_back = _places(shared, width)
    seen = torch.cat([_places([begins[i] for i in range(len(batch))], width)[0], rows], dim=1)
    next_tokens = torch.tensor([targets], dtype=torch.long)
    return {
        "attention_mask": mask,
        "input_ids": torch.tensor([tokens]),
        "position_ids": torch.tensor([positions]),
        "logits_to_keep": torch.tensor(kept, dtype=torch.long),
        "labels": next_tokens,
        "shift_labels": next_tokens,
        "layout": {"rows": rows, "rows_back": rows_back, "seen": seen, "starts": starts, "starts_back": starts_back},
    }


def _places(pieces: Sequence[range], width: int) -> tuple[Any, Any]:
    """Places of pieces of the sequence as (pieces, width), padded with 0; and of that, flattened, where each token is."""
    import torch

    padded = torch.tensor([[*piece, *[0] * (width - len(piece))] for piece in pieces], dtype=torch.long).view(len(pieces), width)
    back = [i * width + j for i, piece in enumerate(pieces) for j in range(len(piece))]
    return padded, torch.tensor(back, dtype=torch.long)


def pad(pad_id: int, batch: Sequence[Example], *, keep: bool = False) -> dict[str, Any]:
    """A batch of B rows, each padded on its right to L tokens: ``input_ids``, ``attention_mask`` and ``labels`` (B, L).

    Padding carries no loss and no attention, so any id will do. ``keep``: logits are asked for only where a row is trained.
    """
    import torch

    width = max(len(e.input_ids) for e in batch)
    rows = [(e, width - len(e.input_ids)) for e in batch]
    labels = torch.tensor([[*e.labels, *[IGNORED] * gap] for e, gap in rows])
    padded = {
        "input_ids": torch.tensor([[*e.input_ids, *[pad_id] * gap] for e, gap in rows]),
        "attention_mask": torch.tensor([[1] * len(e.input_ids) + [0] * gap for e, gap in rows]),
        "labels": labels,
    }
    if keep:
        kept = (labels[:, 1:] != IGNORED).any(dim=0).nonzero()[:, 0]
        padded |= {"logits_to_keep": kept, "shift_labels": labels[:, kept + 1]}
    return padded


def attend(
    module: Any,
    query: Any,
    key: Any,
    value: Any,
    attention_mask: Any,
    scaling: float | None = None,
    dropout: float = 0.0,
    layout: Mapping[str, Any] | None = None,
    **other: Any,
) -> tuple[Any, None]:
    """Attention of transformers' interface: query (1, heads, T, size) and a :func:`pack` layout to (1, T, heads, size).

    The common beginnings among themselves, then each rest to its own beginning and itself. Without a layout it is ``sdpa``.
    """
    import torch
    from torch.nn.functional import scaled_dot_product_attention as attention
    from transformers.integrations.sdpa_attention import sdpa_attention_forward

    if layout is None:
        return sdpa_attention_forward(module, query, key, value, attention_mask, dropout=dropout, scaling=scaling, **other)  # type: ignore[no-any-return]
    kind = value.dtype
    # a CPU's attention in bfloat16 takes four times as long backward as in float32, and rounds more
    computed = kind if query.is_cuda else torch.float32
    q, k, v = (x[0].transpose(0, 1).to(computed) for x in (query, key, value))  # (T, heads, size)
    grouped = query.shape[1] // key.shape[1]
    if grouped > 1 and query.is_cuda:
        # with a mask, CUDA's fast kernels take one key head for each head only
        k, v, grouped = k.repeat_interleave(grouped, dim=1), v.repeat_interleave(grouped, dim=1), 1
    one = partial(attention, scale=scaling, dropout_p=dropout, enable_gqa=grouped > 1)

    def at(x: Any, places: Any) -> Any:
        return x.index_select(0, places.flatten()).view(*places.shape, *x.shape[1:]).transpose(1, 2)

    out = []
    # autocast would make bfloat16 of it again
    with torch.autocast(query.device.type, enabled=False):
        if layout["starts"].numel():
            among = (at(x, layout["starts"]) for x in (q, k, v))
            # padded on the right, where no token before sees it
            out.append(_back(one(*among, is_causal=True), layout["starts_back"]))
        rest, seen = at(q, layout["rows"]), layout["seen"]
        out.append(_back(one(rest, at(k, seen), at(v, seen), attn_mask=attention_mask), layout["rows_back"]))
    return torch.cat(out)[None].to(kind), None


def _back(attended: Any, places: Any) -> Any:
    return attended.transpose(1, 2).flatten(0, 1).index_select(0, places)


def obstacle(config: Any) -> str:
    """Why a model's rows cannot lie in one sequence; empty when they can."""
    kinds = {str(kind) for name in ("layer_types", "layers_block_type") for kind in getattr(config, name, None) or ()}
    if recurrent := sorted(kind for kind in kinds if any(word in kind for word in _RECURRENT)):
        return f"its {recurrent[0]} layers carry a state from token to token"
    if any("sliding" in kind for kind in kinds) or getattr(config, "sliding_window", None):
        return "its attention sees a window of tokens only"
    return ""


def register() -> None:
    """Make :func:`attend` known to transformers, with the masks of ``sdpa`` for batches that are not packed."""
    from transformers import AttentionInterface, AttentionMaskInterface
    from transformers.masking_utils import sdpa_mask

    AttentionInterface.register(ATTENTION, attend)
    AttentionMaskInterface.register(ATTENTION, sdpa_mask)
