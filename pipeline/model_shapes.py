"""Published Granite shapes by name, for planning without files (source: the models' public config.json files)."""

from __future__ import annotations

from dataclasses import replace

from pipeline.shape import Experts, Mamba, Shape

_V3, _V33, _V4 = 49155, 49159, 100352
_LONG = 131072


def _dense(layers: int, hidden: int, attention: tuple[int, int, int], intermediate: int, vocab: int) -> Shape:
    heads, kv_heads, head_dim = attention
    return Shape("granite", layers, hidden, heads, kv_heads, head_dim, intermediate, vocab, _LONG)


def _hybrid(
    hidden: int, attention: tuple[int, int, int], intermediate: int, mamba: Mamba, experts: Experts | None = None
) -> Shape:
    heads, kv_heads, head_dim = attention
    return Shape("granitehybrid", 4, hidden, heads, kv_heads, head_dim, intermediate, _V4, _LONG, mamba, experts)


_2B = _dense(40, 2048, (32, 8, 64), 8192, _V3)
_8B = _dense(40, 4096, (32, 8, 128), 12800, _V3)
_1B_A400M = Shape("granitemoe", 24, 1024, 16, 8, 64, 0, _V3, _LONG, experts=Experts(32, 8, 512))
_3B_A800M = Shape("granitemoe", 32, 1536, 24, 8, 64, 0, _V3, _LONG, experts=Experts(40, 8, 512))
_4_DENSE = _dense(40, 2560, (40, 8, 64), 8192, _V4)

SHAPES: dict[str, Shape] = {
    "granite-3.0-2b": replace(_2B, max_positions=4096),
    "granite-3.1-2b": _2B,
    "granite-3.2-2b": _2B,
    "granite-3.3-2b": replace(_2B, vocab=_V33),
    "granite-3.0-8b": replace(_8B, max_positions=4096),
    "granite-3.1-8b": _8B,
    "granite-3.2-8b": _8B,
    "granite-3.3-8b": replace(_8B, vocab=_V33),
    "granite-3.0-1b-a400m": replace(_1B_A400M, max_positions=4096),
    "granite-3.1-1b-a400m": _1B_A400M,
    "granite-3.0-3b-a800m": replace(_3B_A800M, max_positions=4096),
    "granite-3.1-3b-a800m": _3B_A800M,
    "granite-4.0-350m": replace(_dense(28, 1024, (16, 4, 64), 2048, _V4), max_positions=32768),
    "granite-4.0-1b": _dense(40, 2048, (16, 4, 128), 4096, _V4),
    "granite-4.0-micro": _4_DENSE,
    "granite-4.0-h-350m": replace(_hybrid(768, (12, 4, 64), 2048, Mamba(28, 48, 32)), max_positions=32768),
    "granite-4.0-h-1b": _hybrid(1536, (12, 4, 128), 4096, Mamba(36, 48, 64)),
    "granite-4.0-h-micro": _hybrid(2048, (32, 8, 64), 8192, Mamba(36, 64, 64)),
    "granite-4.0-h-tiny": _hybrid(1536, (12, 4, 128), 0, Mamba(36, 48, 64), Experts(64, 6, 512, 1024)),
    "granite-4.0-h-small": _hybrid(4096, (32, 8, 128), 0, Mamba(36, 128, 64), Experts(72, 10, 768, 1536)),
    "granite-4.1-3b": _4_DENSE,
    "granite-4.1-8b": _dense(40, 4096, (32, 8, 128), 12800, _V4),
    "granite-4.1-30b": _dense(64, 4096, (32, 8, 128), 32768, _V4),
}
# The name written when the minor version does not matter: 3.x stands for its last release.
ALIASES = {
    "granite-3.x-2b": "granite-3.3-2b",
    "granite-3.x-8b": "granite-3.3-8b",
    "granite-3.x-1b-a400m": "granite-3.1-1b-a400m",
    "granite-3.x-3b-a800m": "granite-3.1-3b-a800m",
}
# Every 4.0 model, the all-attention ones included, is of this class; the shape alone does not tell.
HYBRID_CLASS = tuple(name for name in SHAPES if name.startswith("granite-4.0-"))
