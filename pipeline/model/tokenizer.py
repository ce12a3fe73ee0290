"""The tokenizer of a model folder through the ``tokenizers`` library, without transformers."""

import json
from collections.abc import Sequence
from functools import cached_property
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


def _byte_letters() -> dict[str, int]:
    """The letter that stands for each byte in a byte-level vocabulary (GPT-2's): printable ones for themselves, others from U+0100."""
    plain = [*range(ord("!"), ord("~") + 1), *range(ord("¡"), ord("¬") + 1), *range(ord("®"), ord("ÿ") + 1)]
    others = [byte for byte in range(256) if byte not in plain]
    return {chr(byte): byte for byte in plain} | {chr(256 + i): byte for i, byte in enumerate(others)}


_BYTES = _byte_letters()
# what stands for bytes that are no text
_NO_TEXT = "\ufffd"


def _whole(token: str) -> str:
    """What an engine prints of a byte-level token: without a character that only begins in it, and U+FFFD for bytes that are none."""
    if not all(letter in _BYTES for letter in token):
        return token
    raw = bytes(_BYTES[letter] for letter in token)
    for cut in range(1, min(4, len(raw)) + 1):
        lead = raw[-cut]
        if lead >= 0xC0:  # the first byte of a character
            length = 2 if lead < 0xE0 else 3 if lead < 0xF0 else 4
            raw = raw[:-cut] if length > cut else raw
            break
        if lead < 0x80:
            break
    text = raw.decode("utf-8", errors="replace")
    return _NO_TEXT if _NO_TEXT in text else text


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

    @cached_property
    def printed(self) -> dict[str, list[int]]:
        """Token IDs by the text that an engine prints for one alone.

        Special tokens print nothing, and of a character in several tokens only what is whole of it: many print alike.
        """
        added = {token["id"]: token for token in json.loads(self._tokenizer.to_str())["added_tokens"]}
        found: dict[str, list[int]] = {}
        for token, i in sorted(self._tokenizer.get_vocab(with_added_tokens=True).items(), key=lambda pair: pair[1]):
            special = i in added and added[i]["special"]
            found.setdefault("" if special else token if i in added else _whole(token), []).append(i)
        return found

    @cached_property
    def alike(self) -> dict[int, int]:
        """For each token ID the first of those that print alike: itself, where it is the only one."""
        return {i: ids[0] for ids in self.printed.values() for i in ids}

    def named(self, text: str) -> int | None:
        """The first token ID that is printed so, or is written so (a special token); None when there is none."""
        ids = self.printed.get(_NO_TEXT if _NO_TEXT in text else text)
        written = self.id_of(text)
        return ids[0] if ids else None if written is None else self.alike[written]

    def id_of(self, token: str) -> int | None:
        """ID of a token string, None when the vocabulary lacks it."""
        found = self._tokenizer.token_to_id(token)
        return None if found is None else int(found)
