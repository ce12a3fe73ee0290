"""Every rank of a plan over several nodes, as vLLM's own parser and configuration classes read it."""

import json
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import tiny

from pipeline.engines.vllm.engine import Vllm
from pipeline.machine.named import hardware_from
from pipeline.model.model import Model
from pipeline.planning.nodes import placed
from pipeline.planning.plan import Request

pytestmark = pytest.mark.slow

# it validates world size, ranks and heads without devices
_CHECK = """
import json, sys
from vllm import AsyncEngineArgs
from vllm.entrypoints.launchers.cli_args import make_arg_parser
from vllm.utils.argparse_utils import FlexibleArgumentParser

def check(words):
    given = make_arg_parser(FlexibleArgumentParser()).parse_args(words)
    parallel = AsyncEngineArgs.from_cli_args(given).create_engine_config(headless=given.headless).parallel_config
    names = ("world_size", "local_world_size", "node_rank", "nnodes", "tensor_parallel_size", "pipeline_parallel_size")
    return {name: getattr(parallel, name) for name in (*names, "distributed_executor_backend", "master_addr")}

for words in json.loads(sys.stdin.read()):
    try:
        print("SAID" + json.dumps(check(words)))
    except Exception as error:
        print("SAID" + json.dumps({"refused": str(error)}))
"""


def _said(argvs: list[list[str]]) -> list[dict[str, Any]]:
    pytest.importorskip("vllm")
    done = subprocess.run([sys.executable, "-c", _CHECK], input=json.dumps(argvs), capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr[-2000:]
    return [json.loads(line.removeprefix("SAID")) for line in done.stdout.splitlines() if line.startswith("SAID")]


def _ranks(folder: Path, shape: str, machine: str, nodes: int) -> list[list[str]]:
    """The flags of each rank planned for a large model, said of a tiny one with as many heads."""
    model = replace(Model.from_shape(shape), path=folder)
    request = Request(model, hardware_from(machine), "serve", "m", {"max_model_len": "256"}, nodes=nodes)
    plan = Vllm().plan(request)
    launches = [Vllm().rank(plan, request, node, host="127.0.0.1", port=8003) for node in placed(nodes, "10.0.0.1")]
    return [list(launch.argv[launch.argv.index("--model") :]) for launch in launches]


def test_vllm_reads_every_rank_as_it_was_planned(tmp_path: Path) -> None:
    folder = tiny.make("4.1", tmp_path / "m", hidden_size=512, num_attention_heads=8, num_key_value_heads=8, head_dim=64)
    stages, slices = _ranks(folder, "granite-4.0-h-small", "2xl4", 2), _ranks(folder, "granite-4.1-8b", "cpu-16c-24g", 4)
    said = _said([*stages, *slices, [*stages[0], "--nnodes", "3"], [*stages[1], "--node-rank", "2"]])
    for rank, found in enumerate(said[:2]):
        assert found == {
            **{"world_size": 4, "local_world_size": 2, "node_rank": rank, "nnodes": 2, "master_addr": "10.0.0.1"},
            **{"tensor_parallel_size": 2, "pipeline_parallel_size": 2, "distributed_executor_backend": "mp"},
        }
    for rank, found in enumerate(said[2:6]):
        assert (found["world_size"], found["local_world_size"], found["node_rank"]) == (4, 1, rank)
    # the check refuses what is wrong
    assert "evenly divide" in said[6]["refused"]
    assert "node-rank" in said[7]["refused"]
