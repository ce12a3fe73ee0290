"""``train`` and ``export``: the training stages from the command line, the same code as notebooks 1 and 2."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Annotated, Any

import typer
from rich.console import Console
from rich.table import Table

from pipeline.runs import lock
from pipeline.runs.folder import DEFAULT_NAME, DEFAULT_OUTPUT, RunFolder
from training.parameters import FinetuneParameters

_DEFAULT = FinetuneParameters()
Name = Annotated[str, typer.Option("--name", "--run", help="Name of the run, one folder below --output.")]
Output = Annotated[Path, typer.Option("--output", help="Folder that holds the runs.")]
AsJson = Annotated[bool, typer.Option("--json", help="Print the result as JSON.")]
Force = Annotated[
    str,
    typer.Option(
        "--force", metavar="[STAGE]", help="Do it again even when nothing changed: all, or finetune, merge, gguf, evaluate, ..."
    ),
]


def train(
    name: Name = DEFAULT_NAME,
    output: Output = DEFAULT_OUTPUT,
    base: Annotated[str, typer.Option("--base", help="embedded (offline), a hub id, or a model folder.")] = _DEFAULT.base,
    revision: Annotated[str | None, typer.Option("--revision", help="Hub revision; the commit is recorded either way.")] = None,
    data: Annotated[str, typer.Option("--data", help="soc (built in), a file, or hub:owner/name.")] = _DEFAULT.data,
    eval_data: Annotated[
        str | None, typer.Option("--eval-data", help="Held-out rows; else a share of --data is held out.")
    ] = None,
    method: Annotated[str, typer.Option("--method", help="lora, qlora (GPU) or full.")] = _DEFAULT.method,
    trainer: Annotated[str, typer.Option("--trainer", help="auto, unsloth or hf.")] = _DEFAULT.trainer,
    rank: Annotated[int, typer.Option("--rank", help="LoRA rank.")] = _DEFAULT.rank,
    alpha: Annotated[int, typer.Option("--alpha", help="LoRA alpha; the delta is scaled by alpha / rank.")] = _DEFAULT.alpha,
    learning_rate: Annotated[
        float | None, typer.Option("--learning-rate", help="Peak learning rate, cosine schedule; default by base and method.")
    ] = None,
    epochs: Annotated[float, typer.Option("--epochs", help="Passes over the rows.")] = _DEFAULT.epochs,
    max_steps: Annotated[int | None, typer.Option("--max-steps", help="Stop after this many optimizer steps.")] = None,
    batch_size: Annotated[int, typer.Option("--batch-size", help="Rows a step and device.")] = _DEFAULT.batch_size,
    gradient_accumulation: Annotated[
        int, typer.Option("--gradient-accumulation", help="Batches a step.")
    ] = _DEFAULT.gradient_accumulation,
    max_length: Annotated[
        int, typer.Option("--max-length", help="Longest row in tokens; longer ones are left out and listed.")
    ] = _DEFAULT.max_length,
    max_rows: Annotated[int | None, typer.Option("--max-rows", help="Train on the first N rows only.")] = None,
    save_steps: Annotated[int, typer.Option("--save-steps", help="Steps between checkpoints.")] = _DEFAULT.save_steps,
    seed: Annotated[int, typer.Option("--seed", help="Seed of everything random.")] = _DEFAULT.seed,
    force: Force = "",
    as_json: AsJson = False,
) -> None:
    """Fine-tune a base model on a dataset and leave adapter/ in the run folder.

    A killed run continues from its last checkpoint when called again with the same parameters; a finished one is skipped.

    Examples:
      granite-pipeline train
      granite-pipeline train --name mine --base ibm-granite/granite-4.0-350m --data alerts.jsonl --epochs 2
    """
    given = {key: value for key, value in locals().items() if key in FinetuneParameters.__dataclass_fields__}
    from training.tuning.finetune import finetune

    _show([finetune(RunFolder(name, output), FinetuneParameters(**given), force=force)], as_json)


def export(name: Name = DEFAULT_NAME, output: Output = DEFAULT_OUTPUT, force: Force = "", as_json: AsJson = False) -> None:
    """Merge the adapter to FP16, convert to Q8_0 GGUF, write the Modelfile, and record reference answers.

    The GGUF is loaded and generated from before it takes its final name. Stages whose inputs have not changed are skipped.

    Example: granite-pipeline export --name mine
    """
    from pipeline.runs import stages
    from training.export import evaluate, gguf, merge, package

    run = RunFolder(name, output)
    stages.forced(force, "merge")  # a name that is no stage is refused before anything is done
    merge.require_trained(run)
    with lock.held(run, "export"):
        done = [merge.merge(run, force=force), gguf.export_gguf(run, force=force), package.package(run, force=force)]
        done += evaluate.evaluate(run, force=force).values()
    _show(done, as_json)


def _show(stages: list[Any], as_json: bool) -> None:
    if as_json:
        typer.echo(json.dumps({s.stage: {"skipped": s.skipped, "seconds": s.seconds, **s.result} for s in stages}, indent=2))
        return
    table = Table("stage", "", "result")
    for stage in stages:
        kept = {k: v for k, v in stage.result.items() if isinstance(v, int | float | str) or k == "eval_loss"}
        status = "unchanged, skipped" if stage.skipped else f"done in {stage.seconds:.0f} s"
        table.add_row(stage.stage, status, ", ".join(f"{k} {v}" for k, v in kept.items()))
    Console(stderr=True).print(table)
