from __future__ import annotations

import pytest

from pipeline.errors import ModelError
from pipeline.model.tokenizer import Tokenizer


def test_encodes_without_adding_anything(tokenizer_folder):
    tokenizer = Tokenizer(tokenizer_folder)
    ids = tokenizer.encode("<|start_of_role|>é")
    assert ids[0] == tokenizer.id_of("<|start_of_role|>")
    assert len(ids) == 3  # é is two bytes
    assert tokenizer.decode(ids) == "<|start_of_role|>é"
    assert tokenizer.encode("") == []
    assert tokenizer.id_of("nothing of the kind") is None


def test_truncation_of_the_file_is_ignored(tokenizer_folder, tmp_path):
    import json

    content = json.loads((tokenizer_folder / "tokenizer.json").read_text(encoding="utf-8"))
    content["truncation"] = {"direction": "Right", "max_length": 4, "strategy": "LongestFirst", "stride": 0}
    (tmp_path / "tokenizer.json").write_text(json.dumps(content), encoding="utf-8")
    assert len(Tokenizer(tmp_path).encode("x" * 50)) == 50


def test_missing_or_broken_file(tmp_path):
    with pytest.raises(ModelError, match=r"no tokenizer\.json"):
        Tokenizer(tmp_path)
    (tmp_path / "tokenizer.json").write_text("{}", encoding="utf-8")
    with pytest.raises(ModelError, match="not a tokenizer file"):
        Tokenizer(tmp_path)


def test_tokens_by_the_text_that_an_engine_prints(tokenizer_folder):
    tokenizer = Tokenizer(tokenizer_folder)
    letter, end = tokenizer.encode("a")[0], tokenizer.id_of("<|end_of_text|>")
    assert (tokenizer.named("a"), tokenizer.alike[letter]) == (letter, letter)
    # é is two bytes: the first prints nothing yet, the second alone is no text
    first, second = tokenizer.encode("é")
    assert first in tokenizer.printed[""]
    assert second in tokenizer.printed["\ufffd"]
    # special tokens print nothing; the same one stands for all, however the engine writes it
    assert tokenizer.alike[end] == tokenizer.alike[first] == tokenizer.named("") == tokenizer.named("<|end_of_text|>")
    # the tool marks are added, but not special
    assert tokenizer.named("<tool_call>") == tokenizer.id_of("<tool_call>")
    assert tokenizer.named("no token's text") is None
    assert sorted(i for ids in tokenizer.printed.values() for i in ids) == sorted(tokenizer.alike)
