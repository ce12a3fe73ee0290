"""One model over several machines: what each node holds, when that is worth it, and what is refused.

Where it can, a node holds a stage of the layers (pipeline parallel across nodes), split over its own GPUs (tensor parallel
inside): one row of activations a token is all that crosses the network. Else each holds a slice of every layer.
Not covered: the network's speed, and nodes that differ.
"""

from collections.abc import Callable
from dataclasses import replace
from typing import Literal

from pipeline.model.model import Model
from pipeline.model.shape import Shape
from pipeline.planning.gpu_fit import alike, legal_tensor_parallel
from pipeline.planning.plan import Node, Plan, Request

Part = Literal["stage", "slice"]
# stands for the first node's address where a plan is made for nobody's machines
HEAD = "HEAD"
_MOST = 16


def over_nodes(request: Request, part: Part, plan_one: Callable[[Request], Plan]) -> Plan:
    """The plan for what one of ``request.nodes`` equal nodes holds, or a refusal: one node is enough, or all together are not.

    ``plan_one`` plans a whole model on one node.
    """
    nodes, model = request.nodes, request.model
    alone = plan_one(replace(request, nodes=1))
    if words := _indivisible(model.shape, nodes, part):
        return replace(alone, feasible=False, nodes=nodes, warnings=(words,), alternatives=())
    held = plan_one(replace(request, nodes=1, model=part_of(model, nodes, part)))
    held = replace(held, nodes=nodes, pipeline_parallel=nodes if part == "stage" else 1)
    held = held if part == "stage" else replace(held, tensor_parallel=nodes)
    # quantised on one node, as it was trained on several: that is a reason to use several
    if alone.feasible and (alone.quantization == held.quantization or not held.feasible):
        return replace(held, feasible=False, warnings=(_enough(alone),), alternatives=(_replicas(request, alone),))
    if not held.feasible:
        return replace(held, alternatives=_more_nodes(request, part, plan_one))
    warnings = [f"one node holds it as {alone.quantization}: {_replicas(request, alone)}"] if alone.feasible else []
    return replace(held, warnings=(*held.warnings, *warnings), alternatives=())


def part_of(model: Model, nodes: int, part: Part) -> Model:
    """What the fullest node holds of a model, as a model: its stage of the layers, or its slice of every layer.

    The first and the last stage hold an embedding each. Raises nothing: :func:`over_nodes` refuses what does not divide.
    """
    shape = _stage(model.shape, nodes) if part == "stage" else _slice(model.shape, nodes)
    share = shape.parameters / model.shape.parameters if part == "stage" else 1 / nodes
    parameters, size = int(model.parameters * share), int(model.weight_bytes * share)
    return replace(model, shape=shape, parameters=parameters, weight_bytes=size)


def placed(nodes: int, master: str = HEAD) -> list[Node]:
    """The nodes of a plan that is made for nobody's machines: what each has to fill in has a name."""
    return [Node(rank, nodes, master, f"ADDRESS_OF_NODE_{rank}", f"INTERFACE_OF_NODE_{rank}") for rank in range(nodes)]


def _stage(shape: Shape, nodes: int) -> Shape:
    mamba = shape.mamba and replace(shape.mamba, layers=_up(shape.mamba.layers, nodes))
    return replace(shape, attention_layers=_up(shape.attention_layers, nodes), mamba=mamba, tied=True)


def _slice(shape: Shape, nodes: int) -> Shape:
    mamba = shape.mamba and replace(shape.mamba, heads=shape.mamba.heads // nodes)
    experts = shape.experts and replace(shape.experts, width=shape.experts.width // nodes, shared=shape.experts.shared // nodes)
    widths = {name: getattr(shape, name) // nodes for name in ("heads", "intermediate", "vocab")}
    return replace(shape, **widths, kv_heads=max(1, shape.kv_heads // nodes), mamba=mamba, experts=experts)


def _up(count: int, parts: int) -> int:
    return -(-count // parts)


def _indivisible(shape: Shape, nodes: int, part: Part) -> str:
    if nodes > _MOST:
        return f"{nodes} nodes for one model: no Granite needs more than {_MOST}"
    if part == "slice":
        heads = f"{shape.heads} heads and {shape.kv_heads} kv heads" + (
            f", {shape.mamba.heads} mamba heads" if shape.mamba else ""
        )
        return "" if legal_tensor_parallel(shape, nodes) else f"{nodes} nodes do not divide {heads}"
    return f"{shape.layers} layers are not divided by {nodes} nodes" if shape.layers % nodes else ""


def _enough(alone: Plan) -> str:
    gpus = f" (tensor parallel {alone.tensor_parallel})" if alone.tensor_parallel > 1 else ""
    return f"one node holds this model{gpus}: over several, every token would wait for the network"


def _replicas(request: Request, alone: Plan) -> str:
    """How many whole models the nodes hold, one node's plan each."""
    gpus = request.hardware.gpus
    each = len(alike(gpus)) // alone.tensor_parallel if gpus else 1
    return f"{request.nodes * each} replicas, {each} on each of {request.nodes} nodes: a server each, without --nodes"


def _more_nodes(request: Request, part: Part, plan_one: Callable[[Request], Plan]) -> tuple[str, ...]:
    """The smallest number of such nodes that holds the model."""
    for nodes in range(request.nodes + 1, _MOST + 1):
        if not _indivisible(request.model.shape, nodes, part):
            made = plan_one(replace(request, nodes=1, model=part_of(request.model, nodes, part)))
            if made.feasible:
                return (f"--nodes {nodes} ({made.quantization or 'unquantised'})",)
    return ()
