"""Model card of an exported model: its data, strategy, training, metrics and privacy statement."""

import json
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, fields, is_dataclass
from pathlib import Path
from typing import Any

from torch import nn

from perdure.contract.combine import Combine
from perdure.contract.strategy import Strategy
from perdure.data.experience import Stream, declared_size_of
from perdure.export.measures import TOLERANCE, Variant
from perdure.export.predictor import Predictor
from perdure.privacy.ledger.account import Statement
from perdure.utils.atomic_files import write_atomically, write_json
from perdure.utils.environment import command, machine, versions

JSON_NAME = "model_card.json"
MARKDOWN_NAME = "model_card.md"
SCHEMA = 1
NO_PRIVACY = (
    "no privacy: trained without differential privacy, so epsilon is infinite; treat the model as "
    "if it contained its training records"
)


@dataclass(frozen=True, kw_only=True)
class ModelCard:
    """Model card of an exported model (artifact), written as JSON and as Markdown.

    Args:
        title: name of the model.
        format: name of the format.
        files: name of every file to its SHA-256.
        use: code that loads and calls the artifact.
        data: name, scenario, classes and declared sizes of the stream.
        model: class, number of parameters, inputs and outputs.
        strategy: name and settings of the strategy, and its way to predict.
        training: settings of the training.
        privacy: parts of the privacy statement; without one, a sentence that there is no privacy.
        metrics: name of the metric, and measurements during and after training.
        check: difference of the artifact's outputs from the outputs of the learner's predictor.
        variants: size, time and metric as trained and after every option.
        versions: versions of Python and packages.
        machine: machine on which the artifact was measured.
        command: command that made the artifact.
        schema: version of the JSON form of the card.
    """

    title: str
    format: str
    files: Mapping[str, str]
    use: str
    data: Mapping[str, Any]
    model: Mapping[str, Any]
    strategy: Mapping[str, Any]
    training: Mapping[str, Any]
    privacy: Mapping[str, Any]
    metrics: Mapping[str, Any]
    check: Mapping[str, Any]
    variants: Sequence[Variant]
    versions: Mapping[str, str]
    machine: Mapping[str, Any]
    command: str
    schema: int = SCHEMA

    def write(self, folder: Path) -> None:
        """Write the card to a folder, as model_card.json and model_card.md."""
        write_json(folder / JSON_NAME, asdict(self))
        write_atomically(folder / MARKDOWN_NAME, self.markdown().encode())

    def markdown(self) -> str:
        """Return the card as a Markdown page."""
        text = self.privacy["text"]
        parts = [
            f"# {self.title}",
            f"Format {self.format}; {self.data['scenario']}-incremental learning of "
            f"{self.data['name']} with {self.strategy['name']}.",
            f"## Privacy\n\n{text[0].upper()}{text[1:]}.",
            f"## Use\n\n```python\n{self.use}\n```",
            "## Measured\n\n" + _variants(self.variants, self.metrics["metric"]),
            f"The artifact was loaded and run on {self.check['rows']} inputs: its outputs differ "
            f"from the predictor's by at most {self.check['largest_difference']:.1e} (allowed: "
            f"{self.check['tolerance']:g}, relative where an output is above 1).",
        ]
        tables = {
            "Data": self.data,
            "Model": self.model,
            "Strategy": self.strategy,
            "Training": self.training,
            "Privacy statement": self.privacy,
            "Metrics": self.metrics,
            "Files (SHA-256)": self.files,
            "Versions": self.versions,
            "Machine": self.machine,
        }
        parts += [f"## {title}\n\n{_table(facts)}" for title, facts in tables.items()]
        parts.append(f"## Command\n\n```\n{self.command}\n```")
        return "\n\n".join(parts) + "\n"


def data_facts(stream: Stream) -> dict[str, Any]:
    """Return the public facts of a stream for a card: names, classes and declared sizes."""
    return {
        "name": stream.name,
        "scenario": stream.scenario,
        "task": stream.task.name,
        "experiences": len(stream.stages),
        "classes": [list(stream[stage.last].classes) for stage in stream.stages],
        "declared_sizes": [
            declared_size_of(stream.experiences[stage.first : stage.last + 1])
            for stage in stream.stages
        ],
        "test_records": [len(stage.test) for stage in stream.stages],
    }


def model_facts(predictor: Predictor, stream: Stream) -> dict[str, Any]:
    """Return class, number of parameters, inputs and outputs of the model for a card."""
    model = predictor.model
    return {
        "class": _class_name(model),
        "parameters": sum(value.numel() for value in model.parameters()),
        "inputs": f"(n, {', '.join(map(str, stream.input_shape))}) "
        f"{str(stream[0].test.inputs.dtype).removeprefix('torch.')}",
        "task_input": "(n,) int64, number of the experience" if predictor.by_task else None,
        "outputs": f"(n, ..., {stream.num_classes}); -1e9 for a class that may not be predicted",
    }


def strategy_facts(strategy: Strategy, predictor: Predictor) -> dict[str, Any]:
    """Return name and settings of a strategy and its way to predict, for a card."""
    return {
        "name": strategy.name,
        "settings": settings_of(strategy),
        "predicts_by": "its own rule, with tensors beside the model"
        if predictor.needs_more_than_masks
        else "the model's outputs, with a mask of the classes that may be predicted",
        "privacy_cost": repr(strategy.privacy_cost),
    }


def settings_of(strategy: Strategy) -> dict[str, Any]:
    """Return the fields of a strategy, or of every part of a combination, as plain values."""
    if isinstance(strategy, Combine):
        return {part.name: settings_of(part) for part in strategy.parts}
    return {
        field.name: _plain(getattr(strategy, field.name))
        for field in fields(strategy)
        if field.init
    }


def privacy_facts(statement: Statement | None) -> dict[str, Any]:
    """Return the parts of a privacy statement for a card; None gives a sentence of no privacy."""
    if statement is None:
        return {"private": False, "text": NO_PRIVACY}
    return {"private": True, **asdict(statement), "text": str(statement)}


def check_facts(variant: Variant, rows: int) -> dict[str, Any]:
    """Return the comparison of the artifact's outputs with the predictor's, for a card."""
    return {
        "rows": rows,
        "largest_difference": variant.largest_difference,
        "tolerance": TOLERANCE,
    }


def environment_facts() -> dict[str, Any]:
    """Return versions, machine and command, by the names of fields of `ModelCard`."""
    own = {name: value for name, value in machine().items() if value is not None}
    return {"versions": versions(), "machine": own, "command": command()}


def _plain(value: object) -> object:
    if is_dataclass(value) and not isinstance(value, type):
        return {each.name: _plain(getattr(value, each.name)) for each in fields(value)}
    if isinstance(value, list | tuple):
        return [_plain(each) for each in value]
    return value if isinstance(value, str | int | float | bool | None) else repr(value)


def _class_name(model: nn.Module) -> str:
    kind = type(model)
    return f"{kind.__module__}.{kind.__qualname__}"


def _variants(variants: Sequence[Variant], metric: str) -> str:
    lines = [
        f"| | {metric} | bytes | bytes, zipped | ms a call | zeros |",
        "|---|---|---|---|---|---|",
    ]
    for each in variants:
        score = "not measured" if each.score is None else f"{each.score:.2f}"
        zeros = "–" if each.zero_share is None else f"{100 * each.zero_share:.1f} %"
        lines.append(
            f"| {each.name} | {score} | {each.size_bytes:,} | {each.compressed_bytes:,} | "
            f"{each.milliseconds:.3f} | {zeros} |"
        )
    lines.append(f"\nA call has {variants[-1].rows_per_call} records, on this machine's processor.")
    return "\n".join(lines)


def _table(facts: Mapping[str, Any]) -> str:
    rows = [
        f"| {name.replace('_', ' ')} | {_cell(value)} |"
        for name, value in facts.items()
        if value is not None
    ]
    return "\n".join(["| | |", "|---|---|", *rows])


def _cell(value: object) -> str:
    text = value if isinstance(value, str) else json.dumps(value)
    return text.replace("|", "\\|").replace("\n", " ")
