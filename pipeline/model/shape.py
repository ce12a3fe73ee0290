"""Widths of a model and what follows from them: parameters, KV cache and mamba state - from a config or a GGUF header.

Formulas are checked against public configs and real headers in the tests; published models are in ``published.json``.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from pipeline.errors import ModelError
from pipeline.model.gguf import GgufHeader
from pipeline.runs.files import read_json

_LARGEST_COUNT = 1 << 31
_MOST_LAYERS = 4096
# model_type -> GGUF's architecture where they differ
_GGUF_ARCHITECTURE = {"granitemoeshared": "granitemoe", "granitemoehybrid": "granitehybrid"}


@dataclass(frozen=True)
class Mamba:
    """Mamba-2 layers: their number and the widths that make up the state each running request holds."""

    layers: int
    heads: int
    head_dim: int
    state: int = 128
    groups: int = 1
    conv: int = 4

    @property
    def inner(self) -> int:
        """Inner width, heads x head_dim."""
        return self.heads * self.head_dim

    @property
    def conv_width(self) -> int:
        """Channels of the short convolution: x, B and C."""
        return self.inner + 2 * self.groups * self.state

    def state_elements(self) -> int:
        """Elements of state per request: SSM state plus the convolution's window, all layers (vLLM MambaStateShapeCalculator)."""
        return self.layers * (self.inner * self.state + self.conv_width * (self.conv - 1))


@dataclass(frozen=True)
class Experts:
    """Mixture of experts in every layer: ``count`` experts of ``width``, ``active`` of them used per token, plus a shared one."""

    count: int
    active: int
    width: int
    shared: int = 0


@dataclass(frozen=True)
class Shape:
    """Widths of a Granite model; ``intermediate`` is the dense feed-forward width (0 for a pure mixture of experts)."""

    architecture: str
    attention_layers: int
    hidden: int
    heads: int
    kv_heads: int
    head_dim: int
    intermediate: int
    vocab: int
    max_positions: int
    mamba: Mamba | None = None
    experts: Experts | None = None
    tied: bool = True

    @property
    def layers(self) -> int:
        """All decoder layers."""
        return self.attention_layers + (self.mamba.layers if self.mamba else 0)

    @property
    def hybrid(self) -> bool:
        """True when any layer is a mamba layer."""
        return self.mamba is not None

    @property
    def embedding_parameters(self) -> int:
        """Parameters of the token embedding, and of the output head where it is not tied."""
        return self.vocab * self.hidden * (1 if self.tied else 2)

    @property
    def parameters(self) -> int:
        """Parameters of the whole model, from its widths."""
        attention = self.hidden * self.head_dim * (2 * self.heads + 2 * self.kv_heads)
        total = self.attention_layers * attention + self.layers * (self._feed_forward() + 2 * self.hidden) + self.hidden
        if self.mamba:
            m = self.mamba
            projections = self.hidden * (m.inner + m.conv_width + m.heads) + m.inner * self.hidden
            total += m.layers * (projections + m.conv_width * (m.conv + 1) + 3 * m.heads + m.inner)
        return total + self.embedding_parameters

    def _feed_forward(self) -> int:
        if not self.experts:
            return 3 * self.hidden * self.intermediate
        e = self.experts
        return self.hidden * (e.count + 3 * (e.count * e.width + e.shared))

    def kv_bytes_per_token(self, element_bytes: float = 2.0) -> float:
        """KV cache bytes per token: 2 x attention layers x kv heads x head_dim x bytes (mamba layers hold none)."""
        return 2 * self.attention_layers * self.kv_heads * self.head_dim * element_bytes

    def mamba_bytes_per_request(self, element_bytes: float = 2.0) -> float:
        """Mamba state bytes each running request holds; 0 for dense models."""
        return self.mamba.state_elements() * element_bytes if self.mamba else 0.0


def shape_from_config(config: dict[str, Any], source: Path) -> Shape:
    """Shape from a transformers config; hybrid is decided by ``layer_types``, never by the presence of ``mamba_*`` keys."""
    try:
        heads, hidden, layers = config["num_attention_heads"], config["hidden_size"], config["num_hidden_layers"]
        _require_counts({"num_attention_heads": heads, "hidden_size": hidden, "num_hidden_layers": layers})
        _require_counts({key: config[key] for key in ("vocab_size", "max_position_embeddings")})
        kinds = config.get("layer_types") or ["attention"] * layers
        mamba_layers = sum(kind in ("mamba", "linear_attention") for kind in kinds)
        count, shared = config.get("num_local_experts"), config.get("shared_intermediate_size")
        experts = Experts(count, config["num_experts_per_tok"], config["intermediate_size"], shared or 0) if count else None
        kind = str(config.get("model_type", ""))
        if len(kinds) != layers:
            raise ValueError(f"layer_types has {len(kinds)} entries for {layers} layers")
        return Shape(
            architecture=_GGUF_ARCHITECTURE.get(kind, kind),
            attention_layers=layers - mamba_layers,
            hidden=hidden,
            heads=heads,
            kv_heads=config.get("num_key_value_heads") or heads,
            head_dim=config.get("head_dim") or hidden // heads,
            intermediate=0 if experts else shared or config["intermediate_size"],
            vocab=config["vocab_size"],
            max_positions=config["max_position_embeddings"],
            mamba=_mamba_from_config(config, mamba_layers),
            experts=experts,
            tied=bool(config.get("tie_word_embeddings", True)),
        )
    except (KeyError, TypeError, ValueError, AttributeError, ZeroDivisionError) as error:
        raise ModelError(f"{source}/config.json does not describe a decoder model: {error!r}") from None


def _require_counts(values: Mapping[str, Any]) -> None:
    """Refuse what cannot be a width or a number of layers before a list of that length is made."""
    for name, value in values.items():
        if type(value) is not int or not 0 < value <= _LARGEST_COUNT:
            raise ValueError(f"{name} is {value!r}")
        if name.endswith(("layers", "block_count")) and value > _MOST_LAYERS:
            raise ValueError(f"{value} layers")


def _mamba_from_config(config: dict[str, Any], layers: int) -> Mamba | None:
    if not layers:
        return None
    heads, head_dim = config["mamba_n_heads"], config.get("mamba_d_head")
    if not isinstance(head_dim, int):  # "auto"
        head_dim = config.get("mamba_expand", 2) * config["hidden_size"] // heads
    return Mamba(layers, heads, head_dim, config["mamba_d_state"], config["mamba_n_groups"], config["mamba_d_conv"])


def shape_from_gguf(header: GgufHeader, source: Path) -> Shape:
    """Shape from a GGUF header; a layer without kv heads is a mamba layer."""
    try:
        layers, heads, hidden = map(header.get, ("block_count", "attention.head_count", "embedding_length"))
        _require_counts({"block_count": layers, "embedding_length": hidden, "context_length": header.get("context_length")})
        kv = header.get("attention.head_count_kv", heads)
        per_layer = kv if isinstance(kv, list) else [kv] * layers
        query = max(heads) if isinstance(heads, list) else heads
        mamba_layers, mamba = per_layer.count(0), None
        if mamba_layers:
            rank, *widths = (header.get(f"ssm.{key}") for key in ("time_step_rank", "state_size", "group_count", "conv_kernel"))
            mamba = Mamba(mamba_layers, rank, header.get("ssm.inner_size") // rank, *widths)
        vocab = header.get("vocab_size") or header.metadata.get("tokenizer.ggml.tokens", 0)
        experts = header.get("expert_count") or 0
        shared = header.get("expert_shared_feed_forward_length") or 0
        width = header.get("feed_forward_length")
        return Shape(
            architecture=header.architecture,
            attention_layers=layers - mamba_layers,
            hidden=hidden,
            heads=query,
            kv_heads=max(per_layer),
            head_dim=header.get("attention.key_length") or header.get("rope.dimension_count") or hidden // query,
            intermediate=0 if experts else max(width) if isinstance(width, list) else width,
            vocab=len(vocab) if isinstance(vocab, list) else vocab,
            max_positions=header.get("context_length"),
            mamba=mamba,
            experts=Experts(experts, header.get("expert_used_count"), width, shared) if experts else None,
            tied=all(t.name != "output.weight" for t in header.tensors),
        )
    except (KeyError, TypeError, ValueError, AttributeError, ZeroDivisionError) as error:
        raise ModelError(f"{source} does not describe a decoder model: {error!r}") from None


def _published() -> tuple[dict[str, Shape], dict[str, str]]:
    """Shapes of the published Granite models by name, and other names for them: 3.x stands for its last release."""
    data = read_json(Path(__file__).with_name("published.json"))
    parts = {"mamba": Mamba, "experts": Experts}
    shapes = {
        name: Shape(**{key: parts[key](**value) if key in parts else value for key, value in widths.items()})
        for name, widths in data["shapes"].items()
    }
    return shapes, data["aliases"]


SHAPES, ALIASES = _published()
