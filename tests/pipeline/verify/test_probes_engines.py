"""The probes on the real llama.cpp with random weights: only its grammars and parsers can make it answer right."""

from __future__ import annotations

import asyncio

import pytest
from servers import llama

from pipeline.model.toolcalls import tool_format
from pipeline.report.check import Check
from pipeline.serve.start import Endpoint
from pipeline.verify.material import Yardstick
from pipeline.verify.prober import Prober
from pipeline.verify.probes import injection, structured_output, tool_call
from pipeline.verify.score import HeldOut

pytestmark = pytest.mark.slow


def test_llamacpp(base, gguf, template, tmp_path):
    yardstick = Yardstick(template, Yardstick.of_folder(base).tokenizer, Yardstick.of_folder(base).controls)
    row = HeldOut(({"role": "user", "content": "hi"},), "x")
    with llama(gguf, template.source, tmp_path) as server:
        endpoint = Endpoint("llamacpp", server.url(180), "")

        async def ask() -> list[Check]:
            async with Prober(endpoint, 8) as prober:
                return [
                    await structured_output(prober, row),
                    await tool_call(prober, template.source),
                    await injection(prober, yardstick),
                ]

        schema, tools, attack = (check.data for check in asyncio.run(ask()))
    assert schema["result"] == "passed", schema
    granite4 = tool_format(template.source) == "granite4"
    assert tools["result"] == ("passed" if granite4 else "not supported by this engine for this chat template"), tools
    assert (attack["raw"], attack["neutralised"], attack["how"]) == (True, False, "token IDs")
