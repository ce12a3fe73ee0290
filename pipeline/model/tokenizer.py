"""The tokenizer of a model folder through the ``tokenizers`` library, without transformers."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from pipeline.errors import ModelError


def load(folder: Path) -> Any:
    """The folder's ``tokenizers.Tokenizer``, without truncation and padding; ModelError when it has none or a broken one."""
    import tokenizers

    path = folder / "tokenizer.json"
    if not path.is_file():
        remedy = "save the tokenizer there with tokenizer.save_pretrained(folder)"
        raise ModelError(f"{folder} has no tokenizer.json", remedy=remedy)
    try:
        found = tokenizers.Tokenizer.from_file(str(path))
    except BaseException as error:  # the library raises bare Exception, and its panics are not even that
        if isinstance(error, KeyboardInterrupt | SystemExit):
            raise
        raise ModelError(f"{path} is not a tokenizer file: {error}") from None
    found.no_truncation()
    found.no_padding()
    return found


class Tokenizer:
    """Token IDs of rendered prompts, as ``apply_chat_template(tokenize=True)`` gives them, with nothing added."""

    def __init__(self, folder: Path) -> None:
        self._tokenizer = load(folder)

    def encode(self, text: str) -> list[int]:
        """Token IDs of a text; control tokens written in it count as such."""
        return list(self._tokenizer.encode(text, add_special_tokens=False).ids)

    def decode(self, ids: Sequence[int]) -> str:
        """Text of token IDs, control tokens included."""
        return str(self._tokenizer.decode(list(ids), skip_special_tokens=False))

    def id_of(self, token: str) -> int | None:
        """ID of a token string, None when the vocabulary lacks it."""
        found = self._tokenizer.token_to_id(token)
        return None if found is None else int(found)
