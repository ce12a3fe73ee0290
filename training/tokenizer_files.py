"""Tokenizer and chat template of an export: copied from the base, checked to stop where the training stops."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

from pipeline.chat import ChatTemplate
from pipeline.errors import ModelError
from pipeline.files import read_json, write_atomic, write_json

_FILES = ("tokenizer.json", "tokenizer_config.json", "special_tokens_map.json", "added_tokens.json", "vocab.json", "merges.txt", "tokenizer.model")  # fmt: skip


def save_tokenizer(base: Path, target: Path) -> dict[str, Any]:
    """Copy the base's tokenizer beside the merged weights and make every config name the same end-of-turn token.

    Returns what was found and repaired. Raises ModelError when the tokenizer has no end token or its pad token is
    the end token and cannot be told apart in training.
    """
    for name in _FILES:
        if (base / name).is_file():
            shutil.copyfile(base / name, target / name)
    template = ChatTemplate.from_folder(base)
    write_atomic(target / "chat_template.jinja", template.source)
    eos = template.variables.get("eos_token")
    eos_id = _token_id(base, eos)
    if eos is None or eos_id is None:
        raise ModelError(f"{base}: the tokenizer's eos_token {eos!r} is not in its vocabulary")
    repaired = [name for name in ("config.json", "generation_config.json") if _set_eos(target / name, eos_id)]
    return {
        "eos_token": eos,
        "eos_token_id": eos_id,
        "chat_template_sha256": template.sha256,
        "repaired_eos_in": repaired,
    }


def _set_eos(path: Path, eos_id: int) -> bool:
    """Put the end-of-turn id into a config when it names another; True when it did."""
    config = read_json(path)
    known = config.get("eos_token_id")
    if known == eos_id or (isinstance(known, list) and eos_id in known):
        return False
    write_json(path, {**config, "eos_token_id": eos_id})
    return True


def _token_id(folder: Path, token: str | None) -> int | None:
    tokenizer = read_json(folder / "tokenizer.json")
    added = {entry["content"]: entry["id"] for entry in tokenizer.get("added_tokens", [])}
    found = added.get(token, tokenizer["model"]["vocab"].get(token) if isinstance(tokenizer["model"]["vocab"], dict) else None)
    return None if found is None else int(found)
