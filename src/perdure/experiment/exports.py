"""Export of a finished run's model (`perdure export`)."""

import json
import tomllib
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from torch import Tensor, nn

from perdure.data.experience import Stream
from perdure.errors import ConfigError, RunError
from perdure.experiment.config import read
from perdure.experiment.from_tables import build as build_dataclass
from perdure.experiment.result_schema import MEASURES
from perdure.experiment.results import account_of_arm
from perdure.experiment.run import load
from perdure.experiment.trained_models import chosen_trial, trials
from perdure.export import Distillation, Exported, export_learner
from perdure.models.classifiers import build
from perdure.models.config import ModelConfig
from perdure.privacy.ledger.account import Statement

EXPORTS = "exports"
"""Default folder of exported models, inside the folder of the run."""
METRICS = (*MEASURES, "robust_accuracy")
"""Keys of a trial's result that the model card of an export repeats."""


def export_run(
    run: Path | str,
    arm: str | None = None,
    folder: Path | str | None = None,
    *,
    to: str,
    seed: int | None = None,
    student: str | None = None,
    public_inputs: Path | str | None = None,
    prune: float = 0.0,
    int8: bool = False,
) -> Exported:
    """Export the model of a finished run's arm; the card has the run's metrics and statement.

    See `perdure.export.export_learner` for the checks and the options.

    Args:
        run: folder of the run.
        arm: name of an arm, or of its folder in `checkpoint/`, such as ewc-private or
            ewc-private-seed-1; None where the run has one arm.
        folder: folder of the files; None for RUN/exports/ARM-FORMAT.
        to: name of the format: `safetensors`, `torch-export` or `onnx`.
        seed: seed of the model; None if the run has one seed, or if `arm` contains the seed.
        student: fields of a [model] table, such as "hidden = [16]", for a smaller model that is
            distilled from the arm's model and exported instead; None for the arm's own model.
        public_inputs: safetensors file with the tensor "inputs" (n, ...), which a student of a
            private arm is distilled on; None for the training records.
        prune: share of the weights to set to 0; 0 for none.
        int8: store weights of linear layers as 8-bit whole numbers.

    Raises:
        ConfigError: for an option that is not allowed, or a package that is not installed.
        ExportError: if the format cannot store the predictor, or the files give other outputs.
        LedgerError: if a ledger of the arm is missing or damaged.
        PrivacyError: if a private model would be distilled on its training records.
        RunError: if no model or several models match, or if the model cannot be read.
    """
    run = Path(run)
    arm = chosen_trial(run, trials(read(run / "config.toml")), arm, seed)
    learner = load(run, arm)
    row = _row(run, arm)
    distillation = None
    if student is not None:
        distillation = Distillation(
            student=_student(student, learner.stream, learner.seed),
            inputs=None if public_inputs is None else _inputs(Path(public_inputs)),
            seed=learner.seed,
        )
    elif public_inputs is not None:
        raise ConfigError.of("public_inputs", str(public_inputs), "only together with a student")
    measured = {name: row[name] for name in METRICS if row.get(name) is not None}
    return export_learner(
        learner,
        run / EXPORTS / f"{arm}-{to}" if folder is None else folder,
        to=to,
        distillation=distillation,
        prune=prune,
        int8=int8,
        title=f"{run.name}, {arm}",
        statement=_statement(run, arm, row),
        facts={"metrics": {"matrix": row["accuracy_matrix"], **measured}},
    )


def _row(run: Path, arm: str) -> Mapping[str, Any]:
    """Return the row of an arm's trial from the run's `result.json`."""
    path = run / "arms" / arm / "arm.json"
    try:
        row: dict[str, Any] = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise RunError(f"{path} cannot be read ({error}); let the run finish first") from None
    return row


def _statement(run: Path, arm: str, row: Mapping[str, Any]) -> Statement | None:
    """Return the privacy statement from an arm's ledgers; None for an arm without privacy.

    Raises:
        RunError: if the arm is private and has no ledger.
    """
    if row["epsilon"] is None:
        return None
    account = account_of_arm(run / "arms" / arm)
    if not account.parts:
        raise RunError(
            f"{run / 'arms' / arm} has no ledger, but the arm is private; restore it from a backup"
        )
    return account.statement(row["epsilon"]["delta"])


def _student(text: str, stream: Stream, seed: int) -> nn.Module:
    """Make the untrained student of a distillation from the fields of a [model] table."""
    try:
        table = tomllib.loads(f"student = {{ {text} }}")["student"]
    except tomllib.TOMLDecodeError as error:
        raise ConfigError.of(
            "student", text, f'fields of a [model] table, such as "hidden = [16]" ({error})'
        ) from None
    chosen = build_dataclass(ModelConfig, table, "student")
    width = stream.num_classes
    return build(chosen, input_shape=stream.input_shape, num_classes=width, seed=seed)


def _inputs(path: Path) -> Tensor:
    from safetensors import SafetensorError
    from safetensors.torch import load_file

    try:
        return load_file(path)["inputs"]
    except (OSError, SafetensorError, KeyError) as error:
        raise ConfigError.of(
            "public_inputs", str(path), f'a safetensors file with the tensor "inputs" ({error})'
        ) from None
