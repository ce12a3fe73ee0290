"""Tokenizer and chat template of an export: copied from the base, and made to stop where the training stops."""

from __future__ import annotations

import logging
import shutil
from pathlib import Path
from typing import Any

from pipeline.chat import ChatTemplate
from pipeline.files import write_atomic
from pipeline.stops import repair_folder, special_ids, turn_end

log = logging.getLogger(__name__)
_FILES = (
    "tokenizer.json",
    "tokenizer_config.json",
    "special_tokens_map.json",
    "added_tokens.json",
    "vocab.json",
    "merges.txt",
    "tokenizer.model",
)


def save_tokenizer(base: Path, target: Path) -> dict[str, Any]:
    """Copy the base's tokenizer beside the merged weights; every config then names the token that ends a turn.

    Returns that token and what had to be repaired. Raises ModelError when the template ends a turn with no token of
    the vocabulary, or nothing can serve as padding.
    """
    for name in _FILES:
        if (base / name).is_file():
            shutil.copyfile(base / name, target / name)
    template = ChatTemplate.from_folder(base)
    write_atomic(target / "chat_template.jinja", template.source)
    repaired = repair_folder(target)
    for sentence in repaired:
        log.warning("export: %s", sentence)
    end = turn_end(template, special_ids(target))
    return {"end_token": end.text, "end_token_id": end.id, "chat_template_sha256": template.sha256, "repaired": repaired}
