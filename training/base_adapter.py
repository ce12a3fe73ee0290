"""A LoRA adapter given as the base: what it was trained on, and the sum of both as a model folder."""

from dataclasses import dataclass
from pathlib import Path

from pipeline.errors import ModelError
from pipeline.model.safetensors import read_header
from pipeline.runs import lock
from pipeline.runs.files import read_object
from pipeline.runs.folder import cached
from pipeline.runs.hashes import sha256_json, sha256_tree
from training.export.weights import merge_folder

_RECIPE = 1
_WEIGHTS = "adapter_model.safetensors"
# settings of PEFT that, when used, make an adapter more than W + scale * B @ A
_MORE: tuple[str, ...] = (
    "use_dora",
    "fan_in_fan_out",
    "lora_bias",
    "use_qalora",
    "use_bdlora",
    "kasa_config",
    "velora_config",
    "monteclora_config",
)
_MORE += ("modules_to_save", "trainable_token_indices", "layer_replication", "target_parameters", "alora_invocation_tokens")
_MORE += ("rank_pattern", "alpha_pattern", "bias", "arrow_config", "loftq_config", "megatron_config")
_UNUSED: tuple[object, ...] = (None, False, "none", [], {})
# ways to begin that leave the base's weights as they are; pissa and the like change them
_KEEPS_BASE = (None, True, False, "gaussian", "eva", "orthogonal")


@dataclass(frozen=True)
class Wanted:
    """The base an adapter names: a hub id or folder, and its revision (None when none is named)."""

    base: str
    revision: str | None

    @property
    def name(self) -> str:
        """The id, or the last part of a folder's path, and the revision."""
        return str(Wanted(Path(self.base).name if Path(self.base).is_absolute() else self.base, self.revision))

    def __str__(self) -> str:
        return f"{self.base} at revision {self.revision}" if self.revision else self.base


def read_wanted(folder: Path) -> Wanted:
    """What the adapter was trained on; ModelError when it does not say, or is no plain LoRA that can be merged."""
    config = read_object(folder / "adapter_config.json")
    base, revision = config.get("base_model_name_or_path"), config.get("revision")
    if not isinstance(base, str) or not base:
        what = f"{folder} holds only an adapter, and its adapter_config.json names no base_model_name_or_path"
        raise ModelError(what, remedy="merge the adapter into the model it was trained on, and give that folder as --base")
    wanted = Wanted(base, str(revision) if revision else None)
    strange = [key for key in _MORE if config.get(key) not in _UNUSED]
    strange += ["peft_type"] * (config.get("peft_type", "LORA") != "LORA")
    strange += ["init_lora_weights"] * (config.get("init_lora_weights") not in _KEEPS_BASE)
    strange += [key for key in ("r", "lora_alpha") if not isinstance(config.get(key), int | float) or not config[key] > 0]
    if strange:
        shown = f"{strange[0]}={config.get(strange[0])!r}"
        raise refused(folder, wanted, f"it has {shown}, and only plain LoRA can be merged here", base=False)
    if not (folder / _WEIGHTS).is_file():
        raise refused(folder, wanted, f"it has no {_WEIGHTS}", base=False)
    read_header(folder / _WEIGHTS)
    return wanted


def refused(folder: Path, wanted: Wanted, why: str, *, base: bool = True) -> ModelError:
    """The error for an adapter that cannot be trained on: because of ``base`` or, when false, of the adapter itself."""
    problem = f"which cannot be had: {why}" if base else f"and it cannot be merged onto it: {why}"
    what = f"{folder} holds only an adapter, trained on {wanted}, {problem}"
    return ModelError(what, remedy=f"train on {wanted.base}, or merge the adapter first and give the merged folder as --base")


def summed(adapter: Path, base: Path, base_sha256: str, cache: Path) -> Path:
    """Base + adapter as a float16 model folder in the cache, made when it is not there yet; its path."""
    files = {name: sha256_tree(adapter / name) for name in ("adapter_config.json", _WEIGHTS)}
    target = cached(cache, f"summed-{sha256_json([_RECIPE, base_sha256, files])[:16]}")
    target.parent.mkdir(parents=True, exist_ok=True)
    with lock.guarded(target.parent):
        if not target.is_dir():
            merge_folder(base, adapter, target)
    return target
