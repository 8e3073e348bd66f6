"""The command `perdure predict`: predictions of a finished run's model for a file of inputs."""

import io
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from perdure.cli.consoles import wide_console
from perdure.cli.local_modules import local_modules
from perdure.errors import DataError

if TYPE_CHECKING:
    from torch import Tensor


def predict(
    run: Path,
    source: Annotated[
        Path, typer.Option("--input", help="Inputs (n, ...) as .npy, scaled as the run's data are.")
    ],
    target: Annotated[Path, typer.Option("--output", help="File for the predictions, as .npy.")],
    arm: Annotated[
        str | None, typer.Argument(help="Name of an arm; default: the only arm of the run.")
    ] = None,
    seed: Annotated[
        int | None, typer.Option(help="Seed of the model, where the run has several.")
    ] = None,
    experience: Annotated[
        int | None,
        typer.Option(help="Experience of the inputs, from 0; on task-incremental streams only."),
    ] = None,
    outputs: Annotated[
        bool, typer.Option("--outputs", help="Write the outputs (n, C) instead of classes.")
    ] = False,
) -> None:
    """Predict with a model of a finished run, as its strategy does.

    RUN is the folder of the run, ARM the name of an arm such as ewc-plain. Predictions are classes,
    or what the task of the data predicts; iCaRL answers by its nearest class mean.
    """
    import numpy as np

    from perdure.experiment import load
    from perdure.utils.atomic_files import write_atomically

    with local_modules():
        learner = load(run, arm, seed=seed)
        wanted = learner.stream[0].test.inputs.dtype
        found = learner.predict(_read(source, wanted), experience=experience)
    answer = found if outputs else learner.stream.task.predictions(found)
    content = io.BytesIO()
    np.save(content, answer.cpu().numpy(), allow_pickle=False)
    write_atomically(target, content.getvalue())
    wide_console().print(
        f"written: {target}, {len(answer)} predictions", markup=False, highlight=False
    )


def _read(path: Path, wanted: Any) -> "Tensor":
    """Read inputs from a .npy file, and convert them to the dtype of the stream's inputs."""
    import numpy as np
    import torch

    try:
        array = np.load(path, allow_pickle=False)
    except (OSError, ValueError, EOFError) as error:
        reason = error.strerror if isinstance(error, OSError) and error.strerror else error
        raise DataError(f"{path} cannot be read ({reason}); save it with numpy.save") from None
    if not isinstance(array, np.ndarray) or array.dtype.kind not in "fiub":
        raise DataError(f"{path} has no array of numbers; save one array with numpy.save")
    rows = torch.from_numpy(array)
    # bytes of images are not scaled by a guess: predict refuses them
    return rows.to(wanted) if rows.is_floating_point() == wanted.is_floating_point else rows
