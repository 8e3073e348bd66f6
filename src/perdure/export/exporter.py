"""Export of a trained learner to files that are run and compared before they are kept."""

import copy
import hashlib
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import torch
from torch import Tensor

from perdure.data.experience import Stream
from perdure.errors import ConfigError, PrivacyError
from perdure.export.card import (
    ModelCard,
    check_facts,
    data_facts,
    environment_facts,
    model_facts,
    privacy_facts,
    strategy_facts,
)
from perdure.export.distillation import Distillation, distil
from perdure.export.formats import Format, format_of
from perdure.export.int8 import quantise
from perdure.export.measures import Rows, Variant, measured, scores_of
from perdure.export.predictor import Predictor, predictor_of
from perdure.export.pruning import prune as prune_weights
from perdure.learner.evaluation import refuse_learnt
from perdure.learner.learner import Learner
from perdure.learner.model_history import trainings_of
from perdure.privacy.ledger.account import Statement
from perdure.utils.atomic_files import writing

USES = {
    "safetensors": "from safetensors.torch import load_file\n\n"
    'module.load_state_dict(load_file("model.safetensors"))',
    "torch-export": "import torch\n\n"
    'predict = torch.export.load("model.pt2").module()\noutputs = predict({torch_arguments})',
    "onnx": "import onnxruntime\n\n"
    'session = onnxruntime.InferenceSession("model.onnx")\n'
    '(outputs,) = session.run(["outputs"], {onnx_arguments})',
}
WITH_PREDICTOR = (
    "\n\n# The module alone does not predict as {name} does. With perdure:\n"
    "from perdure.export import read_predictor\n\n"
    'predict = read_predictor(".", model=module, strategy={name}(...))'
)


@dataclass(frozen=True, kw_only=True)
class Exported:
    """Result of `export_learner`: the folder, its files and the model card.

    Args:
        folder: folder of the files.
        files: exported files without the card; the first one is the model.
        card: content of model_card.json and model_card.md.
    """

    folder: Path
    files: tuple[Path, ...]
    card: ModelCard


def export_learner(
    learner: Learner,
    folder: Path | str,
    *,
    to: str,
    distillation: Distillation | None = None,
    prune: float = 0.0,
    int8: bool = False,
    title: str | None = None,
    statement: Statement | None = None,
    facts: Mapping[str, Mapping[str, Any]] | None = None,
) -> Exported:
    """Write a trained model to files that give the same outputs as the learner's predictions.

    The options are applied in this order: distillation, pruning, int8. The files are loaded, run
    and compared with the predictor; files whose outputs differ by more than 1e-5 are refused. The
    learner and its model do not change.

    Guarantee: no training record is read, unless a student is distilled without public inputs,
    which a private model refuses. The check uses the test records, which are public. So the files
    are functions of what the learner has released.

    Args:
        learner: learner that was fitted, or of a finished run.
        folder: folder of the files; it is created. Existing files of the same names are replaced.
        to: name of the format: `safetensors`, `torch-export` or `onnx`.
        distillation: settings to train a smaller model on the outputs of the predictor, which is
            exported instead; None for the learner's own model.
        prune: share of the weights to set to 0; 0 for none.
        int8: store weights of linear layers as 8-bit whole numbers; not for safetensors.
        title: name of the model in its card; None for the names of stream and strategy.
        statement: privacy statement of the model, if the learner does not have the ledger.
        facts: more facts for the card, by field of `ModelCard`, such as {"metrics": {...}}.

    Raises:
        ConfigError: for an option that is not allowed, or a package that is not installed.
        ExportError: if the format cannot store the predictor, or the files give other outputs.
        PrivacyError: if a private model would be distilled or measured on its training records, or
            its privacy statement is not known.
    """
    kind = format_of(to)
    if int8 and kind.name == "safetensors":
        raise ConfigError.of("int8", True, "only with to='torch-export' or to='onnx'")
    stated = statement or _statement(learner)
    stream = learner.stream
    refuse_learnt(learner.session, stream)
    rows = Rows.of(stream)
    predictor = predictor_of(learner)
    options = {"distillation": distillation, "prune": prune, "int8": int8}
    folder = Path(folder)
    variants: list[Variant] = []
    with writing(folder):
        folder.mkdir(parents=True, exist_ok=True)
        with TemporaryDirectory(prefix=".export-", dir=folder) as draft:
            place = Path(draft)
            final = predictor
            for name, final in _variants(predictor, learner, options, private=stated is not None):
                variants.append(measured(name, final, kind, rows, place))
            sums = {name: _digest(place / name) for name in kind.files}
            card = _card(learner, final, kind, variants, sums, rows, stated, title, facts or {})
            for name in kind.files:
                (place / name).replace(folder / name)
    card.write(folder)
    files = tuple(folder / name for name in kind.files)
    return Exported(folder=folder, files=files, card=card)


def _variants(
    predictor: Predictor, learner: Learner, options: Mapping[str, Any], *, private: bool
) -> Iterator[tuple[str, Predictor]]:
    """Yield (name, predictor): as trained, and after each chosen option in turn."""
    yield "as trained", predictor
    now = predictor
    settings: Distillation | None = options["distillation"]
    if settings is not None:
        inputs = _inputs(settings, learner.stream, now, private=private)
        settings = replace(settings, student=copy.deepcopy(settings.student))
        now = distil(settings, now, inputs, learner.stream.task)
        yield "distilled", now
    if options["prune"]:
        now = copy.deepcopy(now)
        prune_weights(now.model, options["prune"])
        yield f"pruned {100 * options['prune']:g} %", now
    if options["int8"]:
        now = copy.deepcopy(now)
        quantise(now.model)
        yield "int8", now


def _inputs(
    settings: Distillation, stream: Stream, predictor: Predictor, *, private: bool
) -> list[Tensor]:
    """Return the inputs on which the student is trained, one tensor per task of the predictor.

    Raises:
        PrivacyError: for training records of a private model.
    """
    tasks = len(predictor.contexts)
    if settings.inputs is not None:
        return [settings.inputs.cpu()] * tasks
    if private:
        raise PrivacyError(
            "a student of a private model cannot be distilled on its training records, which have "
            "no budget left for it; give public inputs (Distillation(inputs=...), --public-inputs)"
        )
    last = predictor.contexts[0].experience
    stages = [
        torch.cat([stream[i].train.inputs.cpu() for i in range(stage.first, stage.last + 1)])
        for stage in stream.stages
        if predictor.by_task or stage.first <= last
    ]
    return stages if predictor.by_task else [torch.cat(stages)]


def _statement(learner: Learner) -> Statement | None:
    """Return the privacy statement from the learner's ledger; None for a model without privacy.

    Raises:
        PrivacyError: if the model is private and the learner does not have its ledger.
    """
    if learner.private_sum is not None and learner.privacy is not None:
        return learner.private_sum.ledger.statement(learner.privacy.delta)
    if learner.privacy is not None or any(
        each.entries or each.private for each in trainings_of(learner.model)
    ):
        raise PrivacyError(
            "the model was trained with privacy, but this learner does not hold its ledger; give "
            "its statement (statement=...), or export the run (perdure export RUN ARM)"
        )
    return None


def _card(
    learner: Learner,
    predictor: Predictor,
    kind: Format,
    variants: list[Variant],
    sums: Mapping[str, str],
    rows: Rows,
    statement: Statement | None,
    title: str | None,
    facts: Mapping[str, Mapping[str, Any]],
) -> ModelCard:
    stream = learner.stream
    metric = stream.task.metric
    scores = {
        "metric": f"{metric.name} in {metric.unit}",
        "artifact_by_experience": variants[-1].scores,
        "matrix": learner.matrix,
    }
    if kind.name == "safetensors" and predictor.needs_more_than_masks:
        bare = scores_of(predictor.model, rows, by_task=False)
        scores["bare_module_by_experience"] = bare
    made: dict[str, Mapping[str, Any]] = {
        "data": data_facts(stream),
        "model": model_facts(predictor, stream),
        "strategy": strategy_facts(learner.strategy, predictor),
        "training": _training(learner),
        "privacy": privacy_facts(statement),
        "metrics": scores,
    }
    for field, more in facts.items():
        made[field] = {**made[field], **more}
    return ModelCard(
        title=title or f"{stream.name}, {learner.strategy.name}",
        format=kind.name,
        files=sums,
        use=_use(kind, predictor),
        check=check_facts(variants[-1], len(rows.checked()[0])),
        variants=variants,
        data=made["data"],
        model=made["model"],
        strategy=made["strategy"],
        training=made["training"],
        privacy=made["privacy"],
        metrics=made["metrics"],
        **environment_facts(),
    )


def _training(learner: Learner) -> dict[str, Any]:
    return {
        "epochs": learner.epochs,
        "iterations": learner.iterations,
        "batch_size": learner.batch_size,
        "optimizer": repr(learner.current_optimizer).replace("\n", " "),
        "precision": learner.precision,
        "seed": learner.seed,
        "adversary": None if learner.adversary is None else repr(learner.adversary),
        "defence": None if learner.defence is None else repr(learner.defence),
        "device": str(learner.device),
    }


def _use(kind: Format, predictor: Predictor) -> str:
    """Return Python code that loads and runs the artifact, for the model card."""
    text = USES[kind.name]
    if kind.name == "safetensors":
        name = type(predictor.strategy).__name__
        return text + WITH_PREDICTOR.format(name=name) * predictor.needs_more_than_masks
    torch_arguments = "inputs, task" if predictor.by_task else "inputs"
    arrays = '{"inputs": inputs, "task": task}' if predictor.by_task else '{"inputs": inputs}'
    return text.replace("{torch_arguments}", torch_arguments).replace("{onnx_arguments}", arrays)


def _digest(path: Path) -> str:
    return hashlib.sha256(path.read_bytes()).hexdigest()
