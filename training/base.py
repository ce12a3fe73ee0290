"""Base models: the embedded offline one, a hub id, or a local folder - all end as a local folder with a known hash."""

import os
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from pipeline.errors import EnvironmentFailure, ModelError
from pipeline.runs import lock
from pipeline.runs.files import leftovers, read_object, remove, require_free_space
from pipeline.runs.folder import RunFolder
from pipeline.runs.hashes import HashCache
from pipeline.runs.manifest import Manifest
from training import embedded

EMBEDDED = "embedded"
_NOTE = "SmolLM2-135M-Instruct weights (Apache-2.0) in the Granite architecture and chat format; not an IBM Granite model"
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
        folder = cache / f"embedded-{embedded.RECIPE}"
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
            embedded.build(folder)


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
