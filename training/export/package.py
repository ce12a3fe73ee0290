"""Package: write the run's Modelfile; the system message that all training rows share becomes its SYSTEM."""

import logging
from pathlib import Path
from typing import Any

import pipeline
from pipeline.errors import ModelError
from pipeline.modelfile.modelfile import base_license, write_modelfile
from pipeline.runs.folder import RunFolder
from pipeline.runs.hashes import sha256_file, sha256_tree
from pipeline.runs.manifest import Manifest
from pipeline.runs.stages import Force, StageResult, run_stage

log = logging.getLogger(__name__)
STAGE = "modelfile"
_RECIPE = 1


def package(run: RunFolder, *, force: Force = False) -> StageResult:
    """Write ``Modelfile`` beside the GGUF; skipped when neither artefact nor system message changed."""
    skeletons = sha256_tree(Path(pipeline.__file__).parent / "modelfile" / "skeletons")
    manifest = Manifest(run.manifest)
    training = manifest.require_training()
    system = training.system
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
            write_modelfile(run, system=system, license=base_license(training.base))
        except ModelError as error:
            # every other backend can still serve the run
            run.modelfile.unlink(missing_ok=True)
            log.warning("modelfile: none written, so Ollama is left out: %s", error)
            return {"refused": str(error)}
        return {"refused": None}

    return run_stage(run, STAGE, inputs, [run.modelfile], work, force=force)
