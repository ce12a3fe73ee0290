"""Where things are kept: each artefact of a run in its folder, and what only saves time where this user may write.

A container's user often has no home folder, one that cannot be written, or no name; libraries then stop with a traceback.
"""

import contextlib
import logging
import os
import pwd
import re
import site
import stat
import tempfile
from dataclasses import dataclass
from functools import cache
from pathlib import Path

from pipeline.errors import EnvironmentFailure, InputError

log = logging.getLogger(__name__)
DEFAULT_OUTPUT = Path("training/output")
DEFAULT_NAME = "generic"
# the hub's cache below a home folder that cannot be written: what is there is used, and nothing new can be put there
OLD_HUB_CACHE = "GRANITE_PIPELINE_OLD_HUB_CACHE"
_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]{0,63}")


class Part:
    """A path below the run folder, by what is joined to it."""

    def __init__(self, *parts: str) -> None:
        self.parts = parts

    def __get__(self, run: "RunFolder", owner: "type[RunFolder]") -> Path:
        return run.path.joinpath(*self.parts)


@dataclass(frozen=True)
class RunFolder:
    """Paths of one run below ``output``; the name is one path component of letters, digits, '.', '_' and '-'."""

    name: str = DEFAULT_NAME
    output: Path = DEFAULT_OUTPUT

    def __post_init__(self) -> None:
        if not _NAME.fullmatch(self.name):
            remedy = "use 1 to 64 letters, digits, '.', '_' or '-', starting with a letter or digit"
            raise InputError(f"run name {self.name!r} is not usable", remedy=remedy)

    @property
    def path(self) -> Path:
        """The folder itself."""
        return self.output / self.name

    adapter = Part("adapter")  # LoRA adapter (or, after full fine-tuning, the whole model) as training saved it
    merged = Part("merged_fp16")  # Merged float16 model folder: safetensors, config, tokenizer, chat template
    gguf = Part("unsloth.Q8_0.gguf")  # Q8_0 GGUF made from the merged weights
    modelfile = Part("Modelfile")  # Ollama Modelfile
    manifest = Part("manifest.json")  # The run's record: inputs, parameters, hashes, metrics, launches
    notebooks = Part("notebooks")  # Executed notebook copies
    report = Part("report")  # report.html, report.json, junit.xml
    report_file = Part("report", "report.json")  # The report as other programs read it
    evidence = Part("report", "evidence.json")  # What each backend said in the last verification
    logs = Part("logs")  # One log per server start
    checkpoints = Part("checkpoints")  # Trainer checkpoints, kept until training ends
    heldout = Part("heldout.jsonl")  # Held-out conversations, control tokens neutralised, one JSON object a line
    certificate = Part("certificate")  # certificate.json, its JUnit file, and the evidence it was judged on
    certificate_file = Part("certificate", "certificate.json")  # The certificate itself
    replicas = Part("certificate", "replicas.json")  # What each address behind a name was found to be
    servers = Part("servers")  # Records of the servers that were started for this run
    probes = Part("reference", "probes.json")  # In-process next-token distributions at some positions, for the certificate

    def reference(self, which: str) -> Path:
        """In-process answers of ``base`` or ``tuned`` to the held-out prompts."""
        return self.path / "reference" / f"{which}.jsonl"

    @property
    def base_cache(self) -> Path:
        """Where the embedded base is built, beside the runs that share it."""
        return self.output / ".base"

    def require_inside(self) -> None:
        """Raise InputError when the run folder, or what is in it under a name of ours, is a link to somewhere else."""
        ours = dict.fromkeys(part.parts[0] for part in vars(RunFolder).values() if isinstance(part, Part))
        for path in (self.path, *(self.path / name for name in ours)):
            if path.is_symlink():
                remedy = "a run is written only below the output folder: move it there, or link the whole --output folder"
                raise InputError(f"{path} is a symbolic link (to {path.readlink()})", remedy=remedy)


def cache_folder(wanted: Path | None = None) -> Path:
    """Where what only saves time is kept: ``wanted`` (None: this user's cache), else - told once - a temporary folder of this user.

    It need not exist yet. Raises EnvironmentFailure where nothing at all can be written.
    """
    folder = wanted or user_caches() / "granite-pipeline"
    return folder if writable(folder) else _instead_of(folder)


def cached(folder: Path, name: str) -> Path:
    """An entry of a folder of caches: where it is or, when it is nowhere yet, where it can be made."""
    return folder / name if (folder / name).exists() else cache_folder(folder) / name


def writable_home() -> None:
    """Give this process, and what it starts, a home folder to write to and a user name, where the user has none.

    Nothing is changed for others. What the hub has already fetched below the old home stays in reach.
    """
    old, before = _home(), user_caches()
    usable = old is not None and old.is_absolute() and writable(old) and old.is_dir()
    try:
        if not usable:
            # packages installed for the user alone lie below the home folder too
            if site.ENABLE_USER_SITE and site.USER_BASE:
                os.environ.setdefault("PYTHONUSERBASE", site.USER_BASE)
            what = "this user has no home folder" if old is None else f"the home folder {old} cannot be written"
            log.warning("%s: caches and settings of libraries go to %s", what, _temporary())
        os.environ["HOME"] = str(old if usable else _temporary())
        if not writable(user_caches()):
            os.environ["XDG_CACHE_HOME"] = str(_instead_of(user_caches()))
    except EnvironmentFailure as error:  # much can be done without
        os.environ.setdefault("HOME", "/")
        log.warning("%s: %s", error.message, error.remedy)
    if user_caches() != before and "HF_HOME" not in os.environ:
        for variable, part in (("HF_HUB_CACHE", "hub"), ("HF_TOKEN_PATH", "token")):
            if os.access(kept := before / "huggingface" / part, os.R_OK):
                # into a cache that cannot be written nothing new could be fetched
                readable_only = kept.is_dir() and not writable(kept)
                os.environ.setdefault(OLD_HUB_CACHE if readable_only else variable, str(kept))
    if not _name():
        os.environ["USER"] = f"uid-{os.getuid()}"


def _home() -> Path | None:
    """The home folder that HOME or the user database names, whether it can be used or not."""
    with contextlib.suppress(KeyError):
        return Path(os.environ.get("HOME") or pwd.getpwuid(os.getuid()).pw_dir)
    return None


def _name() -> str:
    """The user's name, as Python and torch look for it; empty when there is none."""
    named = next(filter(None, map(os.environ.get, ("LOGNAME", "USER", "LNAME", "USERNAME"))), "")
    with contextlib.suppress(KeyError):
        return named or pwd.getpwuid(os.getuid()).pw_name
    return ""


def user_caches() -> Path:
    """The folder of this user's caches, by the XDG base directory specification; whether it can be written is not asked."""
    return Path(os.environ.get("XDG_CACHE_HOME") or (_home() or Path("/")) / ".cache")


def writable(folder: Path) -> bool:
    """Whether a folder can be written, or made."""
    existing = next((path for path in (folder, *folder.absolute().parents) if os.access(path, os.F_OK)), Path("/"))
    return existing.is_dir() and os.access(existing, os.W_OK | os.X_OK)


@cache
def _instead_of(folder: Path) -> Path:
    temporary = _temporary()
    log.warning("%s cannot be written: what only saves time is kept in %s", folder, temporary)
    return temporary


@cache
def _temporary() -> Path:
    """A folder of this user's own below the temporary one; EnvironmentFailure where there is none."""
    try:
        folder = Path(tempfile.gettempdir()) / f"granite-pipeline-{os.getuid()}"
        with contextlib.suppress(FileExistsError):
            folder.mkdir(mode=0o700)
        seen = folder.lstat()
        if not stat.S_ISDIR(seen.st_mode) or seen.st_uid != os.getuid():  # put there by someone else
            folder = Path(tempfile.mkdtemp(prefix=f"{folder.name}-"))
    except OSError as error:
        what = f"there is no folder to write caches to ({error.strerror})"
        raise EnvironmentFailure(what, remedy="set TMPDIR to a folder that this user may write") from None
    return folder
