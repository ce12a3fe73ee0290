from dataclasses import replace

import pytest

from pipeline import engines
from pipeline.engines.vllm.engine import Vllm
from pipeline.errors import InputError
from pipeline.machine.named import hardware_from
from pipeline.model.model import Model
from pipeline.planning.nodes import part_of, placed
from pipeline.planning.plan import Plan, Request


def _plan(shape: str, machine: str, nodes: int, **overrides: str) -> Plan:
    return Vllm().plan(Request(Model.from_shape(shape), hardware_from(machine), "serve", "m", overrides, nodes=nodes))


def test_what_one_node_does_not_hold_is_split_in_stages_over_two() -> None:
    assert not _plan("granite-4.0-h-small", "2xl4", 1).feasible
    plan = _plan("granite-4.0-h-small", "2xl4", 2)
    assert (plan.feasible, plan.quantization) == (True, None)
    assert (plan.nodes, plan.tensor_parallel, plan.pipeline_parallel) == (2, 2, 2)
    whole = Model.from_shape("granite-4.0-h-small").weights_gib("bfloat16")
    assert plan.memory.weights == pytest.approx(whole / 4, rel=0.03)


def test_where_one_node_holds_the_model_replicas_are_proposed() -> None:
    plan = _plan("granite-4.1-8b", "2xl4", 2)
    assert "one node holds this model" in plan.warnings[0]
    assert plan.alternatives == ("4 replicas, 2 on each of 2 nodes: a server each, without --nodes",)
    with_all = _plan("granite-4.0-h-small", "4xl4", 2)
    assert with_all.alternatives == ("2 replicas, 1 on each of 2 nodes: a server each, without --nodes",)
    assert "(tensor parallel 4)" in with_all.warnings[0]


def test_a_model_that_one_node_holds_only_quantised_is_split_as_trained() -> None:
    assert _plan("granite-4.1-30b", "2xl4", 1).quantization == "fp8"
    plan = _plan("granite-4.1-30b", "2xl4", 2)
    assert (plan.feasible, plan.quantization) == (True, None)
    assert any("one node holds it as fp8: 2 replicas" in warning for warning in plan.warnings)
    # asked for in 8 bits, it is on one node as it would be on two
    assert not _plan("granite-4.1-30b", "2xl4", 2, quantization="fp8").feasible


def test_too_few_nodes_name_the_number_that_holds_it() -> None:
    plan = _plan("granite-4.0-h-small", "l4", 2)
    assert not plan.feasible
    assert plan.alternatives == ("--nodes 4 (unquantised)",)
    assert _plan("granite-4.0-h-small", "l4", 4).feasible


def test_what_does_not_divide_is_refused() -> None:
    plan = _plan("granite-4.0-h-small", "2xl4", 3)
    assert (plan.feasible, plan.warnings) == (False, ("40 layers are not divided by 3 nodes",))
    plan = _plan("granite-4.1-8b", "cpu-16c-24g", 3)
    assert (plan.feasible, plan.warnings) == (False, ("3 nodes do not divide 32 heads and 8 kv heads",))
    with pytest.raises(InputError, match="does not divide 32 heads"):
        _plan("granite-4.0-h-small", "3xl4", 2, tensor_parallel_size="3")


def test_cpus_hold_a_slice_of_every_layer() -> None:
    plan = _plan("granite-4.1-8b", "cpu-16c-24g", 4)
    assert plan.feasible
    assert (plan.tensor_parallel, plan.pipeline_parallel) == (4, 1)
    assert plan.arguments[-6:] == ["--tensor-parallel-size", "4", "--distributed-executor-backend", "mp", "--nnodes", "4"]
    assert "VLLM_ENABLE_V1_MULTIPROCESSING" not in _plan("granite-4.1-8b", "cpu-4c-24g", 4).environment


@pytest.mark.parametrize("given", ["nnodes", "node-rank", "pipeline-parallel-size", "distributed-executor-backend"])
def test_what_nodes_plans_is_not_set_too(given: str) -> None:
    with pytest.raises(InputError, match=f"--{given} is set, and --nodes plans it"):
        _plan("granite-4.0-h-small", "2xl4", 2, **{given: "2"})


def test_every_engine_either_spans_nodes_or_refuses() -> None:
    model, machine = Model.from_shape("granite-4.0-h-small"), hardware_from("2xl4")
    for engine in engines.every():
        request = Request(model, machine, served_name="m", nodes=2)
        if not engine.spans_nodes:
            with pytest.raises(InputError, match="is not planned over several machines"):
                engine.rank(Plan(engine.name, True), request, placed(2)[1], host="127.0.0.1", port=1)
            continue
        plan = engine.plan(request)
        argv = [engine.rank(plan, request, node, host="127.0.0.1", port=1).argv for node in placed(2)]
        assert len({*argv}) == 2
        assert plan.nodes == 2


def test_a_stage_has_its_share_of_the_parameters() -> None:
    model = Model.from_shape("granite-4.1-8b")
    embedding = model.shape.vocab * model.shape.hidden
    stage = part_of(model, 2, "stage")
    assert stage.parameters == pytest.approx((model.parameters - embedding) / 2 + embedding, rel=0.01)
    untied = replace(model, shape=replace(model.shape, tied=False), parameters=model.parameters + embedding)
    assert part_of(untied, 2, "stage").parameters == pytest.approx(stage.parameters, rel=0.01)
    assert part_of(model, 2, "slice").parameters == model.parameters // 2
