"""Prompt parity on a real Ollama of the tests' own: both forms of its API, both of its renderers, with and without SYSTEM."""

from __future__ import annotations

import shutil
from collections.abc import Iterator
from datetime import datetime
from pathlib import Path

import httpx
import pytest
import servers
import tiny

from pipeline.engines.ollama import Ollama
from pipeline.modelfile.grammar import parse_modelfile
from pipeline.modelfile.modelfile import build_modelfile, own_system, to_create_request
from pipeline.net.client import open_client
from pipeline.prompts.chat import ChatTemplate
from pipeline.prompts.parity import Matrix, Reference, compare
from pipeline.verify.sources import EngineRenderer

pytestmark = [pytest.mark.slow, pytest.mark.ollama]
# no way of quoting it makes Ollama's Modelfile hold it
ONLY_IN_TEMPLATE = 'a """ b " c\u200b\u0007 é'
SYSTEMS = {"no SYSTEM": None, "SYSTEM": "Triage. Answer in JSON.", "in TEMPLATE": ONLY_IN_TEMPLATE}


@pytest.fixture(scope="module", params=["", "0"], ids=["default", "OLLAMA_GO_TEMPLATE=0"])
def server(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Iterator[tuple[str, str]]:
    """URL, and what OLLAMA_GO_TEMPLATE is."""
    if shutil.which("ollama") is None:
        pytest.skip("ollama is not on PATH")
    more = {"OLLAMA_GO_TEMPLATE": request.param} if request.param else {}
    with servers.ollama(tmp_path_factory.mktemp("ollama"), **more) as process:
        yield process.url(60, "/api/version"), request.param


@pytest.fixture(scope="module", params=["embedded", "3.3", "4.0", "4.1"])
def model(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> tuple[ChatTemplate, Path]:
    """A chat template, and a GGUF that carries it with the 16,384 positions that Ollama asks for."""
    pytest.importorskip("xllamacpp")
    from training.export.gguf import convert

    version, folder = request.param, tmp_path_factory.mktemp("model") / "m"
    if version != "embedded" and not tiny.TEMPLATES.is_dir():
        pytest.skip(f"the published templates are not at {tiny.TEMPLATES}")
    tiny.make("3.x-dense" if version == "3.3" else "4.1", folder, vocab_size=49152 + 16, max_position_embeddings=16384)
    tiny.published(version, folder)
    convert(folder, folder / "x.gguf", name="tiny")
    return ChatTemplate.from_folder(folder), folder / "x.gguf"


def _compared(url: str, model: tuple[ChatTemplate, Path], system: str | None) -> Matrix:
    template, gguf = model
    parsed = parse_modelfile(build_modelfile(gguf=str(gguf), template=template, system=system, parameters={"num_ctx": 16384}))
    assert bool(parsed.system) == (system not in (None, ONLY_IN_TEMPLATE))
    parts = {k: v for k, v in to_create_request(parsed, "", "m").items() if k not in ("model", "files", "stream")}
    Ollama().create(url, "parity", gguf, parts)
    with open_client(url) as client:
        assert Ollama().own_system(client, "parity") == (system or "") == own_system(parsed)
    renderer = EngineRenderer("ollama", url, "parity", system=own_system(parsed))
    try:
        return compare(Reference(template, datetime.now()), renderer.doors)
    finally:
        httpx.request("DELETE", f"{url}/api/delete", json={"model": "parity"}, timeout=60)


@pytest.mark.parametrize("system", SYSTEMS.values(), ids=list(SYSTEMS))
def test_every_prompt_is_equal_or_listed(server: tuple[str, str], model: tuple[ChatTemplate, Path], system: str | None) -> None:
    url, go_template = server
    matrix = _compared(url, model, system)
    assert matrix.differences == []
    counts = matrix.counts()
    assert set(counts) == {"ollama", "ollama/v1"}
    assert min(each["equal"] for each in counts.values()) >= (104 if go_template == "0" else 119)
    if go_template == "0" and "<think>" not in model[0].source:
        refused = [cell for cell in matrix.cells if "refuses a tool without parameters" in cell.detail]
        assert {(cell.status, cell.renderer) for cell in refused} == {
            ("not applicable", "ollama"),
            ("not applicable", "ollama/v1"),
        }
