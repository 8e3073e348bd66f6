"""The command `perdure explain`: contributions of input features to answers of a run's model."""

from dataclasses import fields
from inspect import signature
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from perdure.cli.consoles import wide_console
from perdure.cli.local_modules import local_modules
from perdure.errors import ConfigError

if TYPE_CHECKING:
    from torch import Tensor

    from perdure.data import Records
    from perdure.explain import Attribution, Explainer

CELLS = 7
"""Superpixels along each side of an image, where only their method is given."""

SHOWN = 10
"""Number of features or superpixels in the text."""


def explain(
    run: Path,
    arm: Annotated[
        str | None, typer.Argument(help="Name of an arm, where the run has several.")
    ] = None,
    method: Annotated[
        str, typer.Option(help="Explainer, as kernel_shap, lime or integrated_gradients.")
    ] = "kernel_shap",
    out: Annotated[Path, typer.Option(help="Folder of the results.")] = Path("explained"),
    records: Annotated[int, typer.Option(help="Test records to explain.")] = 6,
    experience: Annotated[int, typer.Option(help="Experience of the records, from 1.")] = 1,
    samples: Annotated[
        int | None, typer.Option(help="Samples of an instance; default of the method.")
    ] = None,
    cells: Annotated[
        int | None, typer.Option(help="Superpixels along each side of an image.")
    ] = None,
    superpixels: Annotated[
        str | None,
        typer.Option(help="slic or watershed: superpixels by colour, about --cells squared."),
    ] = None,
    baseline: Annotated[
        int, typer.Option(help="Value of absent features; for texts the token of an absent one.")
    ] = 0,
    layer: Annotated[
        str | None, typer.Option(help="Layer for grad_cam; default the last convolution.")
    ] = None,
    seed: Annotated[int | None, typer.Option(help="Seed of the model, of several.")] = None,
    overwrite: Annotated[bool, typer.Option(help="Replace results in the folder.")] = False,
) -> None:
    """Explain answers of a finished run's model on public test records.

    RUN is the folder of the run. The right class of each record is explained. The results are
    explanations.json, explanations.txt with the features of largest contribution, and for images
    explanations.png.
    """
    if records < 1:
        raise ConfigError.of("--records", records, "1 or more")
    with local_modules():
        import torch

        from perdure.experiment.run import load
        from perdure.tasks import SingleLabel, refuse_other_tasks

        _require_free(out, overwrite=overwrite)
        grid = None if superpixels else cells
        explainer = _explainer(method, samples=samples, cells=grid, layer=layer)
        learner = load(run, arm, seed=seed)
        stream = learner.stream
        refuse_other_tasks(stream.task, (SingleLabel,), "explain", "it asks for a class")
        stages = stream.stages
        if not 1 <= experience <= len(stages):
            raise ConfigError.of("--experience", experience, f"1 to {len(stages)}")
        stage = stages[experience - 1]
        test = stage.test.take(torch.arange(min(records, len(stage.test)))).to(learner.device)
        predict = learner.predictor(stage.last, after=len(stream) - 1)
        background = torch.full_like(test.inputs[:1], baseline)
        found = [
            explainer.explain(predict, rows, background, targets=labels, **grouped)
            for rows, labels, grouped in _questions(explainer, test, superpixels, cells)
        ]
        _write(out, repr(explainer), found, test, _rows(found, test, superpixels, cells))
    wide_console().print(f"written: {out}", markup=False, highlight=False)


def _write(
    out: Path,
    method: str,
    found: "list[Attribution]",
    test: "Records",
    rows: list[dict[str, Any]],
) -> None:
    """Write the results as JSON and text, and those of images as a picture."""
    import torch

    from perdure.utils.atomic_files import write_atomically, write_json

    out.mkdir(parents=True, exist_ok=True)
    write_json(out / "explanations.json", {"method": method, "records": rows})
    write_atomically(out / "explanations.txt", "\n".join(map(_text, rows)).encode())
    if test.inputs.ndim in (3, 4):
        from perdure.explain import heat_maps

        titles = [f"class {label}" for label in test.labels.tolist()]
        values = torch.cat([each.values for each in found])
        figure = heat_maps(test.inputs, [(method.partition("(")[0], values)], titles)
        figure.savefig(out / "explanations.png", dpi=150)


def _require_free(out: Path, *, overwrite: bool) -> None:
    """Refuse a folder that has results already."""
    if (out / "explanations.json").exists() and not overwrite:
        allowed = "a folder without explanations; give another --out, or --overwrite"
        raise ConfigError.of("--out", str(out), allowed)


def _questions(
    explainer: "Explainer", test: "Records", superpixels: str | None, cells: int | None
) -> list[tuple["Tensor", "Tensor", dict[str, Any]]]:
    """Return inputs, targets and groups of each call of the explainer.

    Superpixels by colour are other groups for each record, so each has a call of its own.
    """
    if superpixels is None:
        return [(test.inputs, test.labels, {})]
    if "groups" not in signature(explainer.explain).parameters:
        allowed = "kernel_shap, exact_shapley or lime, which explain groups"
        raise ConfigError.of("--method with --superpixels", type(explainer).__name__, allowed)
    return [
        (test.inputs[i : i + 1], test.labels[i : i + 1], {"groups": groups})
        for i, groups in enumerate(_segments(test, superpixels, cells))
    ]


def _segments(test: "Records", superpixels: str, cells: int | None) -> list["Tensor"]:
    """Return superpixels by colour of each image."""
    from perdure.explain import segment_groups
    from perdure.explain.groups import SEGMENTATIONS

    method = next((each for each in SEGMENTATIONS if each == superpixels), None)
    if method is None:
        raise ConfigError.of("--superpixels", superpixels, SEGMENTATIONS)
    if test.inputs.ndim not in (3, 4):
        shown = tuple(test.inputs.shape[1:])
        raise ConfigError.of("--superpixels with inputs of shape", shown, "images")
    count = (cells or CELLS) ** 2
    return [segment_groups(image, count, method=method) for image in test.inputs]


def _explainer(method: str, **given: Any) -> "Explainer":
    """Return the explainer of this name with the fields that are not None."""
    from perdure.explain import find

    kind = find(method, field="--method")
    known = {each.name for each in fields(kind)}
    for name, value in given.items():
        if value is not None and name not in known:
            raise ConfigError.of(f"--{name}", value, f"not with {method}, which has no {name}")
    return kind(**{name: value for name, value in given.items() if value is not None})


def _rows(
    found: "list[Attribution]", test: "Records", superpixels: str | None, cells: int | None
) -> list[dict[str, Any]]:
    """Return one row for each record; superpixels count as one feature."""
    from perdure.explain import grid_groups

    groups: list[Tensor | None] = [None] * len(found)
    if superpixels is not None:
        groups = list(_segments(test, superpixels, cells))
    elif cells is not None:
        groups = [grid_groups(test.inputs.shape[1:], cells)]
    rows = [row for each, parts in zip(found, groups, strict=True) for row in _rows_of(each, parts)]
    tokens = None if test.inputs.is_floating_point() else test.inputs.tolist()
    for i, (row, record) in enumerate(zip(rows, test.ids.tolist(), strict=True)):
        row["record"] = record
        if tokens is not None:
            row["inputs"] = tokens[i]
    return rows


def _rows_of(found: "Attribution", groups: "Tensor | None") -> list[dict[str, Any]]:
    values = found.values if groups is None else found.by_group(groups)
    fidelity = getattr(found, "fidelity", None)
    return [
        {
            "class": int(found.targets[i]),
            "base": float(found.base[i]),
            "output": None if found.outputs is None else float(found.outputs[i]),
            "fidelity": None if fidelity is None else float(fidelity[i]),
            "values": values[i].tolist(),
        }
        for i in range(len(values))
    ]


def _text(row: dict[str, Any]) -> str:
    """Return the features of largest contribution, one a line."""
    import torch

    values = torch.tensor(row["values"]).flatten()
    inputs_are_tokens = len(values) == len(row.get("inputs", ()))
    lines = [f"record {row['record']}, class {row['class']}, base {row['base']:.4g}"]
    for place in values.abs().argsort(descending=True)[:SHOWN].tolist():
        value = f"{float(values[place]):+.4g}"
        token = f" (value {row['inputs'][place]})" if inputs_are_tokens else ""
        lines.append(f"  feature {place:5}{token} {value}")
    return "\n".join([*lines, ""])
