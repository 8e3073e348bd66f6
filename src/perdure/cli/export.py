"""The command `perdure export`: the model of a finished run as files for other programs."""

from pathlib import Path
from typing import Annotated

import typer


def export(
    run: Path,
    arm: str,
    to: Annotated[str, typer.Option("--to", help="safetensors, torch-export or onnx.")],
    output: Annotated[
        Path | None, typer.Option(help="Folder of the files; default RUN/exports/ARM-FORMAT.")
    ] = None,
    seed: Annotated[
        int | None, typer.Option(help="Seed of the model, where the run has several.")
    ] = None,
    prune: Annotated[float, typer.Option(help="Share of the weights to set to 0.")] = 0.0,
    int8: Annotated[
        bool, typer.Option("--int8", help="Store weights of linear layers as int8.")
    ] = False,
    student: Annotated[
        str | None,
        typer.Option(help='Distil to a smaller model: fields of a model table, "hidden = [16]".'),
    ] = None,
    public_inputs: Annotated[
        Path | None,
        typer.Option(help="With --student: safetensors file with a tensor named inputs."),
    ] = None,
) -> None:
    """Write the model of a finished run to files that run without perdure.

    RUN is the folder of the run, ARM the name of an arm in it, such as ewc-private. The files
    predict as the strategy does: they are loaded, run and compared with its predictions before the
    command ends. A model card has data, strategy, privacy statement, metrics, versions and command.

    ONNX and int8 need the packages of `pip install 'perdure[export]'`.
    """
    from rich.console import Console

    from perdure.experiment.exports import export_run

    done = export_run(
        run,
        arm,
        output,
        to=to,
        seed=seed,
        student=student,
        public_inputs=public_inputs,
        prune=prune,
        int8=int8,
    )
    console = Console(soft_wrap=True, highlight=False)
    metric = done.card.metrics["metric"]
    for each in done.card.variants:
        score = "not measured" if each.score is None else f"{each.score:.2f}"
        console.print(
            f"{each.name}: {metric} {score}, {each.size_bytes:,} bytes, "
            f"{each.milliseconds:.3f} ms for {each.rows_per_call} records",
            markup=False,
        )
    for path in done.files:
        console.print(f"written: {path}", markup=False)
    console.print(f"card: {done.folder / 'model_card.md'}", markup=False)
