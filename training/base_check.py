"""What a base model folder must be, asked in seconds before anything is trained: whole, 16-bit or wider, and one model."""

import logging
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from pipeline.errors import MissingDependency, ModelError
from pipeline.model import tokenizer
from pipeline.model.safetensors import INDEX, SINGLE, TensorInfo, read_folder, weight_files
from pipeline.prompts.chat import ChatTemplate
from pipeline.runs.files import read_object, staged
from pipeline.runs.folder import cached
from pipeline.runs.hashes import sha256_json

log = logging.getLogger(__name__)
ADAPTER_CONFIG = "adapter_config.json"
_ADAPTER_FILES = (ADAPTER_CONFIG, "adapter_model.safetensors", "adapter_model.bin")
# where tools of the time before config.json had a place for it say that the weights are quantised
_QUANTIZED_FILES = {"quantize_config.json": "GPTQ", "quant_config.json": "AWQ", "hf_quant_config.json": "ModelOpt"}
_QUANTIZED_KEYS = ("quantization_config", "compression_config")
# tensors that only quantised checkpoints have: GPTQ and AWQ, bitsandbytes, compressed-tensors and fp8
_PACKED = r"\.(qweight|qzeros|g_idx|scales|absmax|quant_map|nested_absmax|quant_state\..+|SCB"
_PACKED += r"|weight_packed|weight_scale|weight_scale_inv|weight_zero_point|weight_shape|input_scale)$"
_PLAIN = ("F64", "F32", "F16", "BF16")
_TORCH = {"F64": "float64", "F32": "float32", "F16": "float16", "BF16": "bfloat16", "I64": "int64", "I32": "int32"}
_TORCH |= {"I16": "int16", "I8": "int8", "U8": "uint8", "BOOL": "bool"}
_EMBEDDING, _HEAD, _SAMPLED_ROWS = "embed_tokens.weight", "lm_head.weight", 1024
_SHOWN = 3


def is_adapter_alone(folder: Path) -> bool:
    """Whether a folder is a LoRA adapter without the model it belongs to."""
    return (folder / ADAPTER_CONFIG).is_file() and not _model_weights(folder)


def require_files(folder: Path, cache: Path | None = None) -> None:
    """Refuse by names and JSON keys alone: what is missing, quantised, GGUF, pickled, an adapter, or code of its own.

    Links may leave the folder only where it lies in ``cache``: those are ours.
    """
    ours = cache is not None and folder.resolve().parent == cache.resolve()
    for path in folder.rglob("*"):
        if not ours and path.is_symlink() and not _stays_inside(path, folder):
            raise ModelError(f"{path} is a symbolic link to a place outside the model folder ({path.readlink()})")
    require_unquantized(folder)
    missing = [name for name in ("config.json", "tokenizer.json") if not (folder / name).is_file()]
    if not any(folder.glob("*.safetensors")):
        if ggufs := sorted(path.name for path in folder.glob("*.gguf")):
            remedy = "give the safetensors folder or hub id that the GGUF was made from"
            raise ModelError(f"base model folder {folder} holds {ggufs[0]} only: a GGUF file cannot be trained on", remedy=remedy)
        pickles = [path.name for suffix in ("bin", "pt", "pth") for path in folder.glob(f"*.{suffix}")]
        refused = f" (found {pickles[0]}: pickled weights can run code and are refused)" if pickles else ""
        missing.append(f"*.safetensors{refused}")
    for name in ("config.json", "tokenizer_config.json"):
        if (folder / name).is_file() and "auto_map" in read_object(folder / name):
            remedy = "Granite needs none: use the model as published, or remove auto_map if the architecture is a known one"
            asks = f"base model folder {folder} asks for code of its own (auto_map in {name}), which is never run"
            raise ModelError(asks, remedy=remedy)
    if missing:
        remedy = "save the model with model.save_pretrained(folder) and tokenizer.save_pretrained(folder)"
        raise ModelError(f"base model folder {folder} lacks {', '.join(missing)}", remedy=remedy)
    if left := [name for name in _ADAPTER_FILES if (folder / name).is_file()]:
        what = f"base model folder {folder} has an adapter in it ({', '.join(left)}), which transformers would load unasked"
        remedy = f"move {' and '.join(left)} to a folder of their own; to train on their sum, give that folder as --base"
        raise ModelError(what, remedy=remedy)
    weight_files(folder)


def require_unquantized(folder: Path, name: str = "") -> None:
    """Refuse a model whose JSON files say that its weights are quantised; ``name`` is the hub id it was fetched by.

    Raises ModelError that names the method, and the 16-bit model where the folder or the id tells.
    """
    config = read_object(folder / "config.json") if (folder / "config.json").is_file() else {}
    for key in _QUANTIZED_KEYS:
        settings = config.get(key)
        if settings is not None and not isinstance(settings, dict):
            raise ModelError(f"{folder}/config.json: {key} must be an object, this is {type(settings).__name__}")
        if settings:
            raise _quantized(folder, f"{_method(settings)} ({key} in config.json)", config, name)
    for file, method in _QUANTIZED_FILES.items():
        if (folder / file).is_file():
            raise _quantized(folder, f"{method} ({file})", config, name)


def only_what_counts(folder: Path, cache: Path) -> Path:
    """The folder itself, or - where an old model.safetensors lies beside an index - a folder of links to all but that file.

    The index says what the weights are, and merge and certificate read them by it, but transformers' and unsloth's loaders
    take model.safetensors before they look for an index.
    """
    counted = weight_files(folder)
    if not (folder / INDEX).is_file() or not (folder / SINGLE).is_file() or counted == [folder / SINGLE]:
        return folder
    if folder / SINGLE in counted:
        remedy = f"save the model again: loaders take a file of that name for the whole model and never see the {INDEX}"
        raise ModelError(f"{folder / INDEX} names {SINGLE} as one shard of {len(counted)}", remedy=remedy)
    kept = [path for path in folder.iterdir() if path.suffix != ".safetensors" and path.is_file()] + counted
    wanted = {path.name: path.resolve() for path in kept}
    links = cached(cache, f"indexed-{sha256_json([str(folder.resolve()), sorted(wanted)])[:16]}")
    told = logging.INFO
    if not links.is_dir() or {path.name: path.resolve() for path in links.iterdir()} != wanted:
        with staged(links) as target:
            target.mkdir()
            for name, path in wanted.items():
                (target / name).symlink_to(path)
        told = logging.WARNING  # once: each stage asks for its base again
    log.log(told, "base: %s has %s beside %s: the index counts, trained is what %s links to", folder, SINGLE, INDEX, links)
    return links


def require_whole(folder: Path) -> None:
    """Read every header and refuse what cannot be loaded as the config says; weights are not read. Takes about a second.

    Raises ModelError for a broken tokenizer or chat template, packed weights, token ids without an embedding, and for
    tensors that are missing, left over or of another shape than the architecture's.
    """
    ChatTemplate.from_folder(folder)
    known = tokenizer.load(folder)
    tensors = read_folder(folder)
    for tensor in tensors:
        if re.search(_PACKED, tensor.name) or (tensor.name.endswith(".weight") and tensor.dtype not in _PLAIN):
            found = f"packed weights ({tensor.name} of type {tensor.dtype})"
            raise _quantized(folder, found, read_object(folder / "config.json"))
    _require_embeddings(folder, tensors, known.get_vocab(with_added_tokens=True))
    _require_loadable(folder, tensors)


def _model_weights(folder: Path) -> list[Path]:
    return [path for path in folder.glob("*.safetensors") if path.name not in _ADAPTER_FILES]


def _stays_inside(path: Path, folder: Path) -> bool:
    """Whether a link ends inside its model folder, or - as in the hub's cache - among the blobs beside the snapshots."""
    target = path.resolve()
    blobs = folder.resolve().parent.parent / "blobs"
    return target.is_relative_to(folder.resolve()) or (folder.parent.name == "snapshots" and target.is_relative_to(blobs))


def _method(settings: dict[str, Any]) -> str:
    """What quantised the weights, in the words of its own settings."""
    method = str(settings.get("quant_method") or settings.get("quantization_method") or "an unnamed method")
    bits = settings.get("bits") or settings.get("w_bit")
    bits = bits or (4 if settings.get("load_in_4bit") else 8 if settings.get("load_in_8bit") else None)
    said = " ".join(str(word) for word in (method, settings.get("format")) if word)
    return f"{said}, {bits} bits" if bits else said


def _quantized(folder: Path, found: str, config: dict[str, Any], name: str = "") -> ModelError:
    made_from = next(_made_from(folder, config, name), None)
    use = (
        f"the 16-bit model it was made from, which seems to be {made_from}" if made_from else "the 16-bit model it was made from"
    )
    what = f"base model {name or folder} is quantised: {found}; its weights cannot be trained or merged"
    return ModelError(what, remedy=f"use {use}; --method qlora loads that in 4 bits")


def _made_from(folder: Path, config: dict[str, Any], name: str) -> Iterator[str]:
    """Names that the original may have: as the model card, the config or the id itself tells."""
    card = folder / "README.md"
    if card.is_file():
        with card.open(encoding="utf-8", errors="replace") as text:
            head = text.read(20_000)
        if found := re.search(r"^base_model:\s*(?:-\s*|\[\s*)?[\"']?(\w[\w./-]*)", head, re.MULTILINE):
            yield found[1]
    for key in ("base_model", "base_model_name_or_path", "_name_or_path"):
        if isinstance(config.get(key), str) and config[key] not in ("", name, str(folder)):
            yield config[key]
    plain = re.sub(
        r"[-_](gptq|awq|fp8|int[48]|w\d+a\d+|bnb|nf4|\d-?bit|bitsandbytes|quantized).*$", "", name, flags=re.IGNORECASE
    )
    if plain != name:
        yield plain


def _require_embeddings(folder: Path, tensors: list[TensorInfo], vocabulary: dict[str, int]) -> None:
    """Every token id of the tokenizer, and every row that the config promises, has an embedding."""
    rows = next((t.shape[0] for t in tensors if t.name.endswith(_EMBEDDING) and t.shape), None)
    if rows is None:  # named as missing below
        return
    token, last = max(vocabulary.items(), key=lambda entry: entry[1], default=("", -1))
    if last >= rows:
        beyond = sum(number >= rows for number in vocabulary.values())
        what = f"{folder}: {beyond} tokens of tokenizer.json have no embedding, the last is {token!r} = {last} of {rows} rows"
        remedy = "use the tokenizer published with the model, or model.resize_token_embeddings(len(tokenizer)) and save both"
        raise ModelError(what, remedy=remedy)
    promised = read_object(folder / "config.json").get("vocab_size")
    if isinstance(promised, int) and promised != rows:
        what = f"{folder}: config.json has vocab_size {promised}, the embedding has {rows} rows"
        raise ModelError(what, remedy="use the config.json saved with these weights")


def _require_loadable(folder: Path, tensors: list[TensorInfo]) -> None:
    """Let transformers' own loader put tensors of these names and shapes into the architecture, on torch's meta device.

    It knows tied heads, packed experts and the names that older versions saved; what it would initialise at random or leave
    out is refused.
    """
    try:
        import torch
        import transformers
    except ImportError as error:
        raise MissingDependency(f"{error.name} is not installed, so the base cannot be checked", remedy="make setup") from None
    remedy = "copy or download the model again, or use the config.json saved with these weights"
    before, bars = transformers.logging.get_verbosity(), transformers.logging.is_progress_bar_enabled()
    transformers.logging.set_verbosity_error()  # it would print a table of what is said below
    transformers.logging.disable_progress_bar()
    try:
        config = transformers.AutoConfig.from_pretrained(str(folder), trust_remote_code=False)
        kind = transformers.AutoModelForCausalLM._model_mapping[type(config)]
        empty = {t.name: torch.empty(t.shape, dtype=getattr(torch, _TORCH.get(t.dtype, "uint8")), device="meta") for t in tensors}
        asked = {"config": config, "state_dict": empty, "device_map": "meta", "ignore_mismatched_sizes": True}
        _, told = kind.from_pretrained(None, **asked, output_loading_info=True)
    except Exception as error:  # whatever a hostile or foreign config makes transformers raise
        said = " ".join(str(error).split())[:200]
        what = f"{folder}: config.json describes no language model that can be built ({type(error).__name__}: {said})"
        raise ModelError(what, remedy=remedy) from None
    finally:
        transformers.logging.set_verbosity(before)
        if bars:
            transformers.logging.enable_progress_bar()
    if wrong := _differences(told):
        raise ModelError(f"{folder}: the weights are not those that config.json describes: {wrong}", remedy=remedy)
    if getattr(config, "tie_word_embeddings", False) and not _head_is_embedding(folder, [t.name for t in tensors]):
        what = f"{folder}: config.json ties {_HEAD} to the embedding, but the two differ: loaders disagree about which one counts"
        raise ModelError(
            what, remedy='set "tie_word_embeddings": false in config.json if the head is meant, else remove the head'
        )


def _head_is_embedding(folder: Path, names: list[str]) -> bool:
    """Whether the head's first rows are the embedding's, where a checkpoint has both."""
    from safetensors import safe_open

    embedding = next((name for name in names if name.endswith(_EMBEDDING)), None)
    rows = []
    for path in weight_files(folder):
        with safe_open(str(path), framework="pt") as file:
            rows += [file.get_slice(name)[:_SAMPLED_ROWS] for name in file.keys() if name in (_HEAD, embedding)]  # noqa: SIM118
    return len(rows) < 2 or bool((rows[0] == rows[1]).all())


def _differences(told: dict[str, Any]) -> str:
    """What the loader missed, did not know, or found in another shape, the first names of each; "" when all fits."""
    named = [("missing", sorted(told["missing_keys"])), ("unexpected", sorted(told["unexpected_keys"]))]
    shapes = [f"{key} {list(ours)} instead of {list(wanted)}" for key, ours, wanted in sorted(told["mismatched_keys"])]
    parts = [f"{len(names)} {what}" for what, names in (*named, ("of another shape", shapes)) if names]
    first = [f"first {what}: {', '.join(names[:_SHOWN])}" for what, names in (*named, ("of another shape", shapes)) if names]
    return "; ".join([", ".join(parts), *first]) if parts else ""
