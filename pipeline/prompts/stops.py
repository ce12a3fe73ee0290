"""Where answers stop: one token ends a turn, and every file that names an end token must name it.

The truth is the chat template: the control token it writes after an assistant's text is the one the model learns to
emit. A pad token must be another one, because padding is left out of training.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from datetime import datetime
from pathlib import Path
from typing import Any, NamedTuple

from pipeline.errors import ModelError
from pipeline.prompts.chat import ChatTemplate
from pipeline.prompts.neutralise import added_tokens
from pipeline.runs.files import read_object, write_json

_ANSWER = "qAnswerq"
# Tokens that models carry for padding or never use in chats, best first
_PADS = ("<|pad|>", "<pad>", "[PAD]", "<|fim_pad|>", "<fim_pad>", "<|endoftext|>", "<|unk|>", "<unk>")


@dataclass(frozen=True)
class Token:
    """A token's text and ID."""

    text: str
    id: int


class StopFiles(NamedTuple):
    """The three files that name end and pad tokens: config.json, generation_config.json, tokenizer_config.json."""

    config: Mapping[str, Any]
    generation: Mapping[str, Any]
    tokenizer: Mapping[str, Any]


def turn_end(template: ChatTemplate, vocabulary: Mapping[str, int]) -> Token:
    """The control token that follows an assistant's text; ``vocabulary`` has the control tokens' IDs.

    Raises ModelError when the template ends a turn with no single token of the vocabulary.
    """
    messages = [{"role": "user", "content": "q"}, {"role": "assistant", "content": _ANSWER}]
    after = template.render(messages, now=datetime(2000, 1, 1)).partition(_ANSWER)[2]
    found = max((token for token in vocabulary if after.startswith(token)), key=len, default=None)
    if found is None:
        what = f"the chat template ends an assistant turn with {after[:40]!r}, which is no control token of the tokenizer"
        remedy = "a model trained on it would never learn to stop; use the template published with the model"
        raise ModelError(what, remedy=remedy)
    return Token(found, vocabulary[found])


def repair_stops(files: StopFiles, end: Token, vocabulary: Mapping[str, int]) -> tuple[StopFiles, list[str]]:
    """The files naming ``end`` as end token and another token for padding, and a sentence for each repair.

    An ID list (several end tokens) that holds ``end`` is right. Raises ModelError when no other token can be the pad.
    """
    notes: list[str] = []
    config, generation, tokenizer = map(dict[str, Any], files)
    configs = (("config.json", config), ("generation_config.json", generation))
    for name, values in configs:
        known = values.get("eos_token_id")
        if known != end.id and not (isinstance(known, list) and end.id in known):
            values["eos_token_id"] = end.id
            notes.append(f"{name}: eos_token_id {known} is now {end.id} ({end.text}), which ends a turn")
    old_end, old_pad = _text(tokenizer.get("eos_token")), _text(tokenizer.get("pad_token"))
    if old_end != end.text:
        notes.append(f"tokenizer_config.json: eos_token {old_end} is now {end.text}, which ends a turn")
        tokenizer["eos_token"] = end.text
    pad = _pad(old_pad, end, vocabulary)
    if old_pad != pad.text:
        notes.append(f"tokenizer_config.json: pad_token {old_pad} is now {pad.text}")
        tokenizer["pad_token"] = pad.text
    for name, values in configs:
        if values.get("pad_token_id") != pad.id:
            notes.append(f"{name}: pad_token_id {values.get('pad_token_id')} is now {pad.id} ({pad.text})")
            values["pad_token_id"] = pad.id
    return StopFiles(config, generation, tokenizer), notes


def repair_folder(folder: Path) -> list[str]:
    """Repair a model folder's files in place, each atomically; the sentences say what changed, empty when all agreed."""
    before, vocabulary = _stop_files(folder), special_ids(folder)
    after, notes = repair_stops(before, turn_end(ChatTemplate.from_folder(folder), vocabulary), vocabulary)
    for path, old, new in zip(_paths(folder), before, after, strict=True):
        if old != new:
            write_json(path, dict(new))
    return notes


def folder_problems(folder: Path, end: Token, vocabulary: Mapping[str, int]) -> list[str]:
    """What :func:`repair_folder` would have to change, as problems; the cause first when eos and pad have changed places."""
    files = _stop_files(folder)
    after, notes = repair_stops(files, end, vocabulary)
    here = tuple(f"{path.name}:" for path in _paths(folder) if path.is_file())  # an absent file contradicts nothing
    found = [note.replace(" is now ", " should be ") for note in notes if note.startswith(here)]
    swapped = (after.config.get("pad_token_id"), end.id)
    if swapped in [(values.get("eos_token_id"), values.get("pad_token_id")) for values in files[:2]]:
        found.insert(0, "eos and pad are swapped")
    return found


def extra_ends(folder: Path, base: Path | None, end: Token, vocabulary: Mapping[str, int]) -> list[str]:
    """End tokens that a folder's configs name beside ``end`` and that the base did not have: answers would break off there.

    Without the base every control token of the vocabulary may end an answer, and no other.
    """
    known = set(vocabulary.values()) if base is None else set().union(*map(_ends, _stop_files(base)))
    beside = f"beside {end.id} ({end.text}), which alone ends a turn"
    extra = [_ends(values) - known - {end.id} for values in _stop_files(folder)]
    named = zip(_paths(folder), extra, strict=True)
    return [f"{path.name}: eos_token_id {sorted(ids)} {beside}" for path, ids in named if ids]


def _ends(values: Mapping[str, Any]) -> set[int]:
    ids = values.get("eos_token_id")
    return {int(one) for one in (ids if isinstance(ids, list) else [ids]) if one is not None}


def special_ids(folder: Path) -> dict[str, int]:
    """IDs of the added special tokens of a folder's tokenizer.json."""
    path = folder / "tokenizer.json"
    try:
        return {str(t["content"]): int(t["id"]) for t in added_tokens(read_object(path)) if t.get("special")}
    except (KeyError, TypeError, ValueError, AttributeError) as error:
        raise ModelError(f"{path}: an entry of added_tokens is malformed ({error!r})") from None


def gguf_problems(metadata: Mapping[str, Any], end: Token) -> list[str]:
    """What a GGUF's metadata says about end and pad tokens that is wrong; empty when it stops where training stopped."""
    problems, ggml = [], "tokenizer.ggml"
    known, pad = metadata.get(f"{ggml}.eos_token_id"), metadata.get(f"{ggml}.padding_token_id")
    if known != end.id and pad == end.id:
        problems.append("eos and pad are swapped in the GGUF")
    if known != end.id:
        problems.append(f"the GGUF's eos_token_id is {known}, but {end.id} ({end.text}) ends a turn: answers would not stop")
    for name in ("eot", "eom"):  # llama.cpp stops at these too
        other = metadata.get(f"{ggml}.{name}_token_id")
        if other not in (None, end.id):
            only = f"only {end.id} ({end.text}) ends a turn"
            problems.append(f"the GGUF also ends answers with its {name}_token_id {other}; {only}")
    if pad == end.id:
        problems.append(f"the GGUF pads with {end.id} ({end.text}), the token that ends a turn")
    added = [name for name in ("bos", "eos") if metadata.get(f"{ggml}.add_{name}_token")]
    return problems + [f"the GGUF adds its {name} token to every prompt, which the chat template does not" for name in added]


def _pad(known: str | None, end: Token, vocabulary: Mapping[str, int]) -> Token:
    for text in (known, *_PADS):
        if text is not None and text in vocabulary and text != end.text:
            return Token(text, vocabulary[text])
    what = f"the pad token is {known}, which ends a turn and so must be learned, and the tokenizer has no other to pad with"
    raise ModelError(what, remedy="add a special token <|pad|> to the tokenizer")


def _paths(folder: Path) -> list[Path]:
    return [folder / f"{name}.json" for name in ("config", "generation_config", "tokenizer_config")]


def _stop_files(folder: Path) -> StopFiles:
    return StopFiles(*(read_object(path) if path.is_file() else {} for path in _paths(folder)))


def _text(token: Any) -> str | None:
    return str(token["content"]) if isinstance(token, Mapping) else token
