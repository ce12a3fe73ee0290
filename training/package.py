"""Package: write the run's Modelfile; the system message that all training rows share becomes its SYSTEM."""

from __future__ import annotations

import logging
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pipeline
from pipeline.errors import ModelError
from pipeline.files import sha256_file, sha256_tree
from pipeline.manifest import Manifest
from pipeline.modelfile import write_modelfile
from pipeline.modelfile_grammar import writable
from pipeline.runs import RunFolder
from training.stages import Force, StageResult, run_stage

log = logging.getLogger(__name__)
STAGE = "modelfile"
_RECIPE = 1


def package(run: RunFolder, *, force: Force = False) -> StageResult:
    """Write ``Modelfile`` beside the GGUF; skipped when neither artefact nor system message changed."""
    skeletons = sha256_tree(Path(pipeline.__file__).parent / "ollama_templates")
    manifest = Manifest(run.manifest)
    tuned = manifest.stage("finetune")
    system = tuned.get("result", {}).get("system")
    template = sha256_file(run.merged / "chat_template.jinja")
    inputs = {
        "recipe": _RECIPE,
        "gguf": manifest.sha256(run.gguf),
        "template": template,
        "skeletons": skeletons,
        "system": system,
    }

    def work() -> dict[str, Any]:
        try:
            write_modelfile(run, system=system, license=_license(tuned))
        except ModelError as error:
            # every other backend can still serve the run
            run.modelfile.unlink(missing_ok=True)
            log.warning("modelfile: none written, so Ollama is left out: %s", error)
            return {"refused": str(error)}
        return {"refused": None}

    return run_stage(run, STAGE, inputs, [run.modelfile], work, force=force)


def _license(tuned: Mapping[str, Any]) -> str | None:
    """The base's licence: the LICENSE file of a folder, or what is known of the embedded base; None when it cannot be written."""
    base = tuned.get("inputs", {}).get("base", {})
    file = Path(base.get("id", "")) / "LICENSE"
    if not file.is_file():
        return base.get("note") or None
    try:
        text = file.read_text(encoding="utf-8", errors="replace")
    except OSError as error:
        log.warning("modelfile: %s is left out: it cannot be read (%s)", file, error.strerror)
        return None
    # Ollama drops what is not printable: form feeds, no-break spaces, a byte order mark
    text = "".join(c if c in "\t\n" or c.isprintable() else " " for c in text)
    if not writable(text):
        log.warning("modelfile: %s is left out: no way of quoting it makes Ollama read it as it is", file)
        return None
    return text
