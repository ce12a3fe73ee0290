"""Link 4 for Ollama, on a real one of the tests' own: its copy of the GGUF, and its next tokens told as text."""

from __future__ import annotations

import shutil
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import pytest
import servers
import tiny

from pipeline.certify.links.served import _DISTANCES
from pipeline.engines.base import UNNAMED
from pipeline.engines.ollama import Ollama
from pipeline.model.gguf import compare_gguf
from pipeline.model.tokenizer import Tokenizer
from pipeline.net.client import open_client
from pipeline.prompts.conversation import Prompt
from pipeline.verify.distributions import compare_tops, fold

pytestmark = [pytest.mark.slow, pytest.mark.ollama]
TEXTS = [
    "<|start_of_role|>user<|end_of_role|>Hello",
    "The server 10.0.0.1 was",
    "漢字 \U0001f6a8 and é",
    '{"a": [1, 2',
    "\n\n  x =",
]


@dataclass(frozen=True)
class Served:
    url: str
    folder: Path
    gguf: Path


@pytest.fixture(scope="module")
def served(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Served]:
    if shutil.which("ollama") is None:
        pytest.skip("ollama is not on PATH")
    pytest.importorskip("xllamacpp")
    from training.export.gguf import convert

    folder = tmp_path_factory.mktemp("model") / "m"
    tiny.make("4.1", folder, max_position_embeddings=16384)
    gguf = folder / "x.gguf"
    convert(folder, gguf, name="tiny")
    with servers.ollama(tmp_path_factory.mktemp("ollama")) as process:
        url = process.url(60, "/api/version")
        Ollama().create(url, "m", gguf, {"template": "{{ .Prompt }}", "parameters": {"num_ctx": 4096}})
        yield Served(url, folder, gguf)


def test_its_copy_is_named_and_holds_every_tensor_and_value(served: Served, tmp_path: Path) -> None:
    with open_client(served.url) as client:
        file = Ollama().loaded_file(client, "m")
        assert Ollama().loaded_file(client, "another") is None
    assert file is not None
    found = compare_gguf(served.gguf, Path(file))
    assert (found.problems, found.tensors[0]) == ((), found.tensors[1])
    other = tmp_path / "other.gguf"
    data = bytearray(served.gguf.read_bytes())
    data[-1] ^= 1
    other.write_bytes(data)
    assert len(compare_gguf(other, Path(file)).problems) == 1


def test_its_next_tokens_are_the_in_process_ones_within_q8_0(served: Served) -> None:
    import torch
    from transformers import AutoModelForCausalLM

    tokenizer = Tokenizer(served.folder)
    prompts = [Prompt(text, tuple(tokenizer.encode(text))) for text in TEXTS]
    with open_client(served.url) as client:
        said = Ollama().next_tokens(client, "m", prompts, tokenizer)
    theirs = [fold(top, tokenizer.alike) for top in said]
    assert not any(UNNAMED in top for top in theirs)
    model = AutoModelForCausalLM.from_pretrained(str(served.folder), dtype=torch.float32).eval()
    ours = []
    for prompt in prompts:
        with torch.inference_mode():
            logits = model(torch.tensor([prompt.ids])).logits[0, -1]
        best = torch.log_softmax(logits.float(), -1).topk(20)
        ours.append(fold(zip(best.indices.tolist(), best.values.tolist(), strict=True), tokenizer.alike))
    distance, _ = compare_tops(ours, theirs)
    bound = _DISTANCES["Q8_0"]
    assert distance.kl <= bound.kl
    assert distance.gap <= bound.gap
    # another text's tokens are not taken for these
    assert compare_tops(ours, theirs[1:] + theirs[:1])[0].gap > distance.gap
