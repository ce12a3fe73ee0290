"""What a text names that does not exist: options, verbs, make targets, variables, files, settings and extras.

A word that an f-string fills in (``HOLE``) is matched against everything known.
"""

from __future__ import annotations

import json
import re
import tomllib
from collections.abc import Iterator
from functools import cache

from advice import HOLE, ROOT, VERBS, Text

from pipeline import engines
from pipeline.config import Settings
from pipeline.runs.folder import Part, RunFolder

OPTIONS = {verb: {word for p in command.params for word in p.opts} | {"--help", "-h"} for verb, command in VERBS.items()}
OURS = set().union(*OPTIONS.values())
# options of programs that are not ours
FOREIGN = {
    "pip": {"-y", "-c"},
    "python": {"-m"},
    "curl": {"-fsSL", "-s", "-H", "-d"},
    "docker": {"--profile"},
    "nvidia-smi": {"--query-gpu"},
    "pytest": {"-m"},
}
# English that follows "make" in some text
_MADE = {"it", "available"}
# variables of other programs, each with the reason to name it
VARIABLES = {
    "HF_ENDPOINT": "huggingface_hub's own: a mirror",
    "HF_HOME": "huggingface_hub's own: where its cache is",
    "VLLM_HOST_IP": "vLLM's own: this machine's address towards the others",
    "GLOO_SOCKET_IFNAME": "gloo's own: the interface towards them",
    "NCCL_SOCKET_IFNAME": "NCCL's own: the interface towards them",
    "NO_PROXY": "every HTTP client's: what is asked without a proxy",
    "TMPDIR": "the system's: where temporary files go",
}
# capitals that are no variables: number types and instruction sets
_TYPES = re.compile(r"(I?Q\d|B?F\d|FP\d|AVX|AMX|MXFP|NVFP)[A-Z0-9_]*")
# files that people bring, those of a run that RunFolder does not name, and those that a verb writes where it is told to
FILES = {
    *(
        "agents.yaml",
        "alerts.jsonl",
        "good.jsonl",
        "train.jsonl",
        "chat.json",
        "model.gguf",
        "machine.json",
        "FILE.json",
        "KEY.pem",
    ),
    # what benchmarks.agent_data writes
    *(f"sets/{what}/{part}.jsonl" for what in ("tools", "documents") for part in ("train", "heldout")),
    *(
        "model.safetensors",
        "model.safetensors.index.json",
        "chat_template.jinja",
        "tokenizer.json",
        "report.html",
        "report/report.html",
        "junit.xml",
        "offline.json",
    ),
}


def unknown(text: Text) -> list[str]:
    """What a text names that does not exist."""
    return [
        *_verbs(text.words),
        *_targets(text.words),
        *_options(text),
        *_variables(text.words),
        *_files(text.words),
        *_extras(text.words),
        *_settings(text.words),
    ]


def _verbs(words: str) -> Iterator[str]:
    for verb in re.findall(r"granite-pipeline ([a-z][a-z-]*)", words):
        if verb not in VERBS:
            yield f"granite-pipeline {verb}"


def _targets(words: str) -> Iterator[str]:
    for assigned, target in re.findall(r"\bmake ((?:[A-Z]+=\S+ )*)([a-z][a-z-]*)(?![\w-]|\.\w)", words):
        if target not in _makefile()[0] and (assigned or target not in _MADE):
            yield f"make {target}"


def _options(text: Text) -> Iterator[str]:
    """Options no verb has - or not the verb or program that their clause names."""
    advice = text.words.replace(f"{HOLE} -m pip", "python -m pip")
    for clause in re.split(r"[;,()`\n|]| or | and (?=granite-pipeline)", advice):
        words, program = clause.split(), ""
        for place, word in enumerate(words):
            option = re.match(r"[\"'\[]*(--?[a-zA-Z][\w-]*)|\w+=['\"]?(--[a-z][a-z-]+)", word)  # ARGS='--offline'
            if option is None:
                first = text.remedy and place == 0  # "train again with --force"
                followed = "".join(words[place + 1 : place + 2]).startswith("--")  # "certify --offline"
                program = _program(word.strip("\"':.").rpartition("/")[2], program, advised=first or followed)
            elif (name := option[1] or option[2]) not in _options_of(program, text.remedy):
                yield f"{program} {name}".strip()


def _program(name: str, before: str, *, advised: bool) -> str:
    """The verb or program that a clause speaks of after this word; a verb's name alone is one only where it is ``advised``."""
    if name == "granite-pipeline" or name.endswith(".py") or name.startswith("benchmarks."):
        return name
    if before in ("", "python") and (name in FOREIGN or re.fullmatch(r"python[\d.]*", name)):
        return "python" if name.startswith("python") else name
    named = before == "granite-pipeline" or (not before and advised and name != "choose")
    return name if name in VERBS and named else before


def _options_of(program: str, remedy: bool) -> set[str]:
    """What is an option there; where no program is named, anything of ours, and in a text of an engine's flags those too."""
    if program in FOREIGN or program in VERBS:
        return FOREIGN.get(program) or OPTIONS[program]
    return OURS | _scripts() | (set() if remedy else _engine_flags())


def _variables(words: str) -> Iterator[str]:
    for name in re.findall(
        rf"(?<![\w{HOLE}./-])[A-Z{HOLE}][A-Z0-9{HOLE}]*(?:_[A-Z0-9{HOLE}]+)+(?![\w(])|\b[A-Z][A-Z]+(?==[^=])", words
    ):
        pattern = re.compile(re.escape(name).replace(HOLE, "[A-Z0-9_]+"))
        if name.strip(HOLE + "_") and not _TYPES.fullmatch(name) and not any(map(pattern.fullmatch, _known_variables())):
            yield name


def _files(words: str) -> Iterator[str]:
    kinds = r"jsonl?|md|txt|html|py|toml|ya?ml|ipynb|xml|gguf|jinja|safetensors|csv|parquet|pem|service|sh|lock|cfg|ini"
    for name in re.findall(rf"(?<![\w*{HOLE}<./:-])((?:[\w.-]+/)*[\w.-]*\w\.(?:{kinds}))(?![\w/])", words):
        plain = re.sub(r"^\./|^(training/output|path/to)/([\w-]+/)?", "", name)
        if plain not in FILES and not any(path == plain or path.endswith(f"/{plain}") for path in _known_files()):
            yield name


def _settings(words: str) -> Iterator[str]:
    """What ``--set`` is given, which some engine knows."""
    for name in re.findall(r"--set (-?[A-Za-z][\w-]*)(?==)|--set ([a-z]+[-_][\w-]+)", words):
        plain = "".join(name).lstrip("-")
        known = {flag.lstrip("-") for flag in _engine_flags()} | _known_variables()
        if plain not in known and plain.replace("_", "-") not in known:
            yield f"--set {plain}"


def _extras(words: str) -> Iterator[str]:
    for extra in re.findall(r"granite-pipeline\[([a-z-]+)\]", words):
        if extra not in _makefile()[2]:
            yield f"granite-pipeline[{extra}]"


@cache
def _makefile() -> tuple[set[str], set[str], set[str]]:
    """Targets, variables of the Makefile; extras of the package."""
    text = (ROOT / "Makefile").read_text(encoding="utf-8")
    targets = set(re.findall(r"^([a-z][a-z-]*):", text, re.MULTILINE))
    variables = set(re.findall(r"^([A-Z_]+)\s*[?:]?=|\$\(call opt,([A-Z_]+)|\$\(([A-Z_]+)\)", text, re.MULTILINE))
    project = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
    return targets, {name for names in variables for name in names if name}, set(project["optional-dependencies"])


@cache
def _scripts() -> set[str]:
    """Options of the programs that are not verbs: the set-up, the documented serve script, the benchmarks."""
    paths = [*(ROOT / "training" / "scripts").glob("*.py"), *(ROOT / "benchmarks").glob("*.py")]
    return {word for path in paths for word in re.findall(r"add_argument\(\s*\"(--?[a-z-]+)\"", path.read_text(encoding="utf-8"))}


@cache
def _engine_flags() -> set[str]:
    return {flag for engine in engines.every() for flag in (*engine.flags.flags, *engine.flags.switches)}


@cache
def _known_variables() -> set[str]:
    example = set(re.findall(r"^(?:# )?([A-Z_]+)=", (ROOT / ".env.example").read_text(encoding="utf-8"), re.MULTILINE))
    compose = set().union(*(re.findall(r"\$\{([A-Z_]+)", path.read_text()) for path in ROOT.glob("docker-compose*.yml")))
    notebooks = set()
    for path in (ROOT / "notebooks").glob("*.ipynb"):
        cells = json.loads(path.read_text(encoding="utf-8"))["cells"]
        tagged = ("".join(cell["source"]) for cell in cells if "parameters" in cell["metadata"].get("tags", []))
        assigned = [names for code in tagged for names in re.findall(r"^([A-Z_, ]+)=", code, re.MULTILINE)]
        notebooks |= {name for names in assigned for name in re.findall("[A-Z_]+", names)}
    listed = {name for engine in engines.every() for name in (*engine.flags.variables, *engine.variables())}
    fields = {name.upper() for name in Settings.model_fields}
    return fields | example | compose | notebooks | listed | _makefile()[1] | set(VARIABLES)


@cache
def _known_files() -> set[str]:
    """Files of the repository and of a run."""
    skipped = {".git", ".venv", "__pycache__", "output", ".mypy_cache", ".ruff_cache", ".pytest_cache", "shared"}
    found = (path.relative_to(ROOT) for path in ROOT.rglob("*") if path.is_file())
    ours = {path.as_posix() for path in found if not skipped & set(path.parts)}
    return ours | {"/".join(part.parts) for part in vars(RunFolder).values() if isinstance(part, Part)}
