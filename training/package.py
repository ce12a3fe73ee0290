"""Package: write the run's Modelfile; the system message that all training rows share becomes its SYSTEM."""

from __future__ import annotations

from pipeline.files import sha256_file, sha256_tree
from pipeline.manifest import Manifest
from pipeline.modelfile import write_modelfile
from pipeline.runs import RunFolder
from training.stages import StageResult, run_stage

STAGE = "modelfile"
_RECIPE = 1


def package(run: RunFolder, *, force: bool = False) -> StageResult:
    """Write ``Modelfile`` beside the GGUF; skipped when neither artefact nor system message changed."""
    system = Manifest(run.manifest).stage("finetune").get("result", {}).get("system")
    template = sha256_file(run.merged / "chat_template.jinja")
    inputs = {"recipe": _RECIPE, "gguf": sha256_tree(run.gguf), "template": template, "system": system}

    def work() -> dict[str, str]:
        write_modelfile(run, system=system)
        return {"template": template}

    return run_stage(run, STAGE, inputs, [run.modelfile], work, force=force)
