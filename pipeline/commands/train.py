"""``train`` and ``export``: the training stages from the command line, the same code as notebooks 1 and 2."""

from __future__ import annotations

from dataclasses import replace
from typing import TYPE_CHECKING, Annotated, Any

from typer import Option

from pipeline.commands import options, show
from pipeline.runs import lock
from pipeline.runs.folder import DEFAULT_NAME, DEFAULT_OUTPUT

if TYPE_CHECKING:
    from training.parameters import FinetuneParameters


def _defaults() -> FinetuneParameters:
    from training.parameters import FinetuneParameters

    return FinetuneParameters()


_DEFAULT = _defaults()


def train(
    run: options.Run = DEFAULT_NAME,
    output: options.Output = DEFAULT_OUTPUT,
    base: Annotated[str, Option(help="embedded (offline), a hub id, or a model folder.")] = _DEFAULT.base,
    revision: Annotated[str | None, Option(help="Hub revision; the commit is recorded either way.")] = None,
    data: Annotated[
        str, Option(help="soc (built in), a file, a folder or glob of files, or hub:owner/name[:config][:split].")
    ] = _DEFAULT.data,
    eval_data: options.EvalData = None,
    method: Annotated[str, Option(help="lora, qlora (GPU) or full.")] = _DEFAULT.method,
    trainer: Annotated[str, Option(help="auto (the faster one here), unsloth or hf.")] = _DEFAULT.trainer,
    rank: Annotated[int, Option(help="LoRA rank.")] = _DEFAULT.rank,
    alpha: Annotated[int, Option(help="LoRA alpha; the delta is scaled by alpha / rank.")] = _DEFAULT.alpha,
    learning_rate: Annotated[
        float | None, Option(help="Peak learning rate, cosine schedule; default by base and method.")
    ] = None,
    epochs: Annotated[float, Option(help="Passes over the rows.")] = _DEFAULT.epochs,
    max_steps: Annotated[int | None, Option(help="Stop after this many optimizer steps.")] = None,
    batch_size: Annotated[int, Option(help="Rows of a batch.")] = _DEFAULT.batch_size,
    gradient_accumulation: Annotated[
        int, Option(help="Batches a step; the rows of a step are divided over the processes.")
    ] = _DEFAULT.gradient_accumulation,
    max_length: Annotated[int, Option(help="Longest row in tokens; longer ones are left out and listed.")] = _DEFAULT.max_length,
    max_rows: Annotated[int | None, Option(help="Train on the first N rows only.")] = None,
    processes: Annotated[
        str, Option(help="Processes that train together: auto (one for each GPU), or a number; docs/scale.md.")
    ] = str(_DEFAULT.processes),
    save_steps: Annotated[int, Option(help="Steps between checkpoints.")] = _DEFAULT.save_steps,
    seed: Annotated[int, Option(help="Seed of everything random.")] = _DEFAULT.seed,
    columns: options.Columns = "",
    ignore: options.Ignore = None,
    greeting: options.Greeting = _DEFAULT.greeting,
    repeated: options.Repeated = _DEFAULT.repeated,
    skip_bad: options.SkipBad = False,
    force: options.Force = "",
    agent: options.Agent = None,
    as_json: options.AsJson = False,
) -> None:
    """Fine-tune a base model on a dataset and leave adapter/ in the run folder.

    A killed run continues from its last checkpoint when called again with the same parameters; a finished one is skipped.

    Examples:
      granite-pipeline train
      granite-pipeline train --name mine --base ibm-granite/granite-4.0-350m --data alerts.jsonl --epochs 2
    """
    given = {key: value for key, value in locals().items() if key in _DEFAULT.__dataclass_fields__ and key != "ignore"}
    given["ignore"] = tuple(ignore or ())
    from training.tuning.finetune import finetune

    _show([finetune(options.folder(agent, run, output), replace(_DEFAULT, **given), force=force, exports=False)], as_json)


def export(
    run: options.Run = DEFAULT_NAME,
    output: options.Output = DEFAULT_OUTPUT,
    force: options.Force = "",
    agent: options.Agent = None,
    base_answers: Annotated[int, Option(help="Held-out rows the base is asked, evenly spread; 0: all.")] = 64,
    tuned_answers: Annotated[int, Option(help="Held-out rows the merged model is asked at most; 0: all.")] = 1000,
    as_json: options.AsJson = False,
) -> None:
    """Merge the adapter to FP16, convert to Q8_0 GGUF, write the Modelfile, and record reference answers.

    The GGUF is loaded and generated from before it takes its final name. Stages whose inputs have not changed are skipped.

    Example: granite-pipeline export --name mine
    """
    from pipeline.runs import stages
    from training.export import evaluate, gguf, merge

    this = options.folder(agent, run, output)
    stages.forced(force, "merge")  # a name that is no stage is refused before anything is done
    merge.require_trained(this)
    with lock.held(this, "export"):
        done = [merge.merge(this, force=force), gguf.export_gguf(this, force=force), gguf.package(this, force=force)]
        done += evaluate.evaluate(this, force=force, base_answers=base_answers, tuned_answers=tuned_answers).values()
    _show(done, as_json)


def _show(stages: list[Any], as_json: bool) -> None:
    if as_json:
        show.as_json({s.stage: {"skipped": s.skipped, "seconds": s.seconds, **s.result} for s in stages})
        return
    rows = []
    for stage in stages:
        status = "unchanged, skipped" if stage.skipped else f"done in {stage.seconds:.0f} s"
        told = (f"{k} {v}" for k, v in stage.result.items() if isinstance(v, int | float | str) or k == "eval_loss")
        rows.append((stage.stage, status, ", ".join(told)))
    show.table("", ("stage", "", "result"), rows, err=True)
