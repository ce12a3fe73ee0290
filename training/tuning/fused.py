"""Layers with a backward pass of their own: the same values and gradients, with fewer passes over memory and less kept.

LoRA: one product forward and one back with the frozen weight, of layers that read the same input (query, key and value; gate and up)
together. RMS norm with a frozen weight, and the gated unit of a feed-forward
block: what they need again is computed again, not kept.
"""

from collections.abc import Sequence
from functools import cache, partial
from typing import Any

_SAME_INPUT = (("q_proj", "k_proj", "v_proj"), ("gate_proj", "up_proj"))


def fuse(model: Any) -> int:
    """Let a PEFT model's plain LoRA layers, frozen RMS norms and SiLU-gated blocks compute so; returns how many LoRA layers do.

    LoRA layers with dropout, a bias of their own, several adapters, DoRA, or a quantised weight stay as PEFT has them.
    """
    from torch import nn

    fused, done = 0, set[Any]()
    for module in model.modules():
        for names in _SAME_INPUT:
            layers = [getattr(module, name, None) for name in names]
            if all(map(_is_plain_lora, layers)) and _alike(layers):
                _put_together(layers)
                done |= set(layers)
    for module in model.modules():
        if _is_plain_lora(module):
            if module not in done:
                _put_together([module])
            fused += 1
        elif _is_plain_norm(module):
            module.forward = _norm_forward(module)
        elif {"gate_proj", "up_proj", "down_proj", "act_fn"} <= set(dir(module)) and isinstance(module.act_fn, nn.SiLU):
            module.forward = _gated_forward(module)
    return fused


def _is_plain_lora(module: Any) -> bool:
    from peft.tuners.lora import Linear
    from torch import nn

    if type(module) is not Linear or type(module.base_layer) is not nn.Linear or len(module.active_adapters) != 1:
        return False
    name = module.active_adapters[0]
    plain = list(module.lora_A) == [name] and not module.lora_variant and not any(module.lora_bias.values())
    return plain and isinstance(module.lora_dropout[name], nn.Identity)


def _is_plain_norm(module: Any) -> bool:
    """An RMS norm that has a frozen weight and nothing else."""
    if not type(module).__name__.endswith("RMSNorm") or not hasattr(module, "variance_epsilon"):
        return False
    return [(name, weight.requires_grad) for name, weight in module.named_parameters()] == [("weight", False)]


def _alike(layers: Sequence[Any]) -> bool:
    """Whether LoRA layers can be computed as one: the same rank, scale and type, and no bias."""
    told = {
        (layer.scaling[layer.active_adapters[0]], layer.r[layer.active_adapters[0]], layer.base_layer.weight.dtype)
        for layer in layers
    }
    return len(told) == 1 and all(layer.base_layer.bias is None for layer in layers)


def _put_together(layers: Sequence[Any]) -> None:
    """Give LoRA layers that are called with the same input a ``forward`` that computes all of them at the first call.

    Their frozen weights become parts of one; PEFT's own ``forward`` is kept for when the adapter is switched off or another type is
    computed in.
    """
    import torch

    block_diagonal: Any = torch.block_diag
    name, base, apply = layers[0].active_adapters[0], layers[0].base_layer, functions()["lora"]
    scale, sizes, weight = layers[0].scaling[name], [layer.base_layer.weight.shape[0] for layer in layers], base.weight
    if len(layers) > 1:
        weight = torch.cat([layer.base_layer.weight.data for layer in layers])
        parts: Any = torch.split(weight, sizes)
        for layer, part in zip(layers, parts, strict=True):
            layer.base_layer.weight.data = part
    ready: dict[int, tuple[Any, Any]] = {}  # by layer: the input it was computed from, and the output

    def forward(i: int, plain: Any, x: Any, *args: Any, **more: Any) -> Any:
        kind = x.device.type
        dtype = torch.get_autocast_dtype(kind) if torch.is_autocast_enabled(kind) else x.dtype
        if args or more or layers[i].disable_adapters or layers[i].merged or weight.dtype != dtype:
            return plain(x, *args, **more)
        before, out = ready.pop(i, (None, None))
        if before is x:
            return out
        a = torch.cat([layer.lora_A[name].weight for layer in layers]).to(dtype)
        b = block_diagonal(*(layer.lora_B[name].weight for layer in layers)).to(dtype)
        outs = apply(x.to(dtype), weight, a, b, scale).split(sizes, -1)
        ready.update({j: (x, out) for j, out in enumerate(outs) if j != i})
        return outs[i] if base.bias is None else outs[i] + base.bias

    for i, layer in enumerate(layers):
        layer.forward = partial(forward, i, layer.forward)


def _norm_forward(layer: Any) -> Any:
    apply = functions()["norm"]
    return lambda x: apply(x, layer.weight, layer.variance_epsilon)


def _gated_forward(block: Any) -> Any:
    apply = functions()["gated"]
    return lambda x: block.down_proj(apply(block.gate_proj(x), block.up_proj(x)))


@cache
def functions() -> dict[str, Any]:
    """``lora(x, W, A, B, s)`` = x Wᵀ + s (x Aᵀ) Bᵀ for x (..., in), W (out, in) frozen, A (r, in), B (out, r);
    ``norm(x, w, e)`` = w x / sqrt(mean(x²) + e), in float32 but for w, w frozen; ``gated(g, u)`` = silu(g) u.

    Backward, for rows x and dy of shape (tokens, ·): dx = dy W + s (dy B) A; dA = s (dy B)ᵀ x; dB = s dyᵀ (x Aᵀ). With n the
    normed x, i the inverse root and g = dy w: dx = i (g - n mean(g n)). du = dy silu(g); dg = dy u silu'(g).
    """
    import torch
    from torch.nn.functional import silu

    class Lora(torch.autograd.Function):
        @staticmethod
        def forward(ctx: Any, x: Any, weight: Any, a: Any, b: Any, scale: float) -> Any:
            rows = x.reshape(-1, x.shape[-1])
            low = rows @ a.t()
            ctx.save_for_backward(rows, weight, a, b, low)
            ctx.scale, ctx.shape = scale, x.shape
            return (rows @ weight.t()).addmm_(low, b.t(), alpha=scale).view(*x.shape[:-1], -1)

        @staticmethod
        def backward(ctx: Any, *grads: Any) -> Any:
            rows, weight, a, b, low = ctx.saved_tensors
            out = grads[0].reshape(-1, grads[0].shape[-1])
            back = out @ b
            into = (out @ weight).addmm_(back, a, alpha=ctx.scale).view(ctx.shape) if ctx.needs_input_grad[0] else None
            return into, None, (back.t() @ rows) * ctx.scale, (out.t() @ low) * ctx.scale, None

    class Norm(torch.autograd.Function):
        @staticmethod
        def forward(ctx: Any, x: Any, weight: Any, epsilon: float) -> Any:
            wide = x.float()
            inverse = wide.square().mean(-1, keepdim=True).add_(epsilon).rsqrt_()
            ctx.save_for_backward(x, weight, inverse)
            return weight * (wide * inverse).to(x.dtype)

        @staticmethod
        def backward(ctx: Any, *grads: Any) -> Any:
            x, weight, inverse = ctx.saved_tensors
            normed, grad = x.float() * inverse, (grads[0] * weight).float()
            along = (grad * normed).mean(-1, keepdim=True)
            return torch.addcmul(grad, normed, along, value=-1).mul_(inverse).to(x.dtype), None, None

    class Gated(torch.autograd.Function):
        @staticmethod
        def forward(ctx: Any, gate: Any, up: Any) -> Any:
            ctx.save_for_backward(gate, up)
            return silu(gate).mul_(up)

        @staticmethod
        def backward(ctx: Any, *grads: Any) -> Any:
            gate, up = ctx.saved_tensors
            grad = grads[0]
            return torch.ops.aten.silu_backward(grad * up, gate), silu(gate).mul_(grad)

    return {"lora": Lora.apply, "norm": Norm.apply, "gated": Gated.apply}
