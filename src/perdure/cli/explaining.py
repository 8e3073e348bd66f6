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
    from collections.abc import Callable, Sequence

    from torch import Tensor

    from perdure.data import Records
    from perdure.explain import Attribution, Background, Explainer
    from perdure.learner import Learner

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
        float, typer.Option(help="Value of absent features; for texts the token of an absent one.")
    ] = 0.0,
    kept: Annotated[
        list[int] | None,
        typer.Option(help="Token of texts that is always present; may be given several times."),
    ] = None,
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
        from perdure.experiment.run import load
        from perdure.explain import constant_background, grid_groups

        _require_free(out, overwrite=overwrite)
        grid = None if superpixels else cells
        explainer = _explainer(method, samples=samples, cells=grid, layer=layer)
        predict, test = _asked(load(run, arm, seed=seed), experience, records)
        try:
            background = constant_background(test.inputs, baseline, kept=kept or ())
        except ConfigError as error:
            raise ConfigError(f"--{error}") from None
        segments = _segments(explainer, test, superpixels, cells) if superpixels else None
        found = _explained(explainer, predict, test, background, segments)
        one = None if cells is None else grid_groups(test.inputs.shape[1:], cells)
        rows = _rows(found, test, [one] if segments is None else segments)
        _write(out, repr(explainer), found, test, rows)
    wide_console().print(f"written: {out}", markup=False, highlight=False)


def _asked(
    learner: "Learner", experience: int, records: int
) -> "tuple[Callable[[Tensor], Tensor], Records]":
    """Return the trained model, and the test records of an experience, which counts from 1."""
    import torch

    from perdure.tasks import SingleLabel, refuse_other_tasks

    stream = learner.stream
    refuse_other_tasks(stream.task, (SingleLabel,), "explain", "it asks for a class")
    if not 1 <= experience <= len(stream.stages):
        raise ConfigError.of("--experience", experience, f"1 to {len(stream.stages)}")
    stage = stream.stages[experience - 1]
    test = stage.test.take(torch.arange(min(records, len(stage.test)))).to(learner.device)
    return learner.predictor(stage.last, after=len(stream) - 1), test


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
    picture = out / "explanations.png"
    picture.unlink(missing_ok=True)  # earlier results may be of images, and these not
    if test.inputs.ndim in (3, 4):
        from perdure.explain import heat_maps

        titles = [f"class {label}" for label in test.labels.tolist()]
        values = torch.cat([each.values for each in found])
        figure = heat_maps(test.inputs, [(method.partition("(")[0], values)], titles)
        figure.savefig(picture, dpi=150)


def _require_free(out: Path, *, overwrite: bool) -> None:
    """Refuse a file, and a folder that has results already."""
    if out.exists() and not out.is_dir():
        raise ConfigError.of("--out", str(out), "a folder; a file has this name")
    if (out / "explanations.json").exists() and not overwrite:
        allowed = "a folder without explanations; give another --out, or --overwrite"
        raise ConfigError.of("--out", str(out), allowed)


def _explained(
    explainer: "Explainer",
    predict: "Callable[[Tensor], Tensor]",
    test: "Records",
    background: "Background",
    segments: "list[Tensor] | None",
) -> "list[Attribution]":
    """Explain all records in one call, or with superpixels by colour one record a call."""
    if segments is None:
        return [explainer.explain(predict, test.inputs, background, targets=test.labels)]
    explain_groups: Any = explainer.explain  # `_segments` refuses explainers without groups
    import torch

    rows = zip(torch.split(test.inputs, 1), torch.split(test.labels, 1), segments, strict=True)
    return [
        explain_groups(predict, row, background, targets=label, groups=groups)
        for row, label, groups in rows
    ]


def _segments(
    explainer: "Explainer", test: "Records", superpixels: str, cells: int | None
) -> list["Tensor"]:
    """Return superpixels by colour of each image."""
    from perdure.explain import segment_groups
    from perdure.explain.groups import SEGMENTATIONS

    if "groups" not in signature(explainer.explain).parameters:
        allowed = "kernel_shap, exact_shapley or lime, which explain groups"
        raise ConfigError.of("--method with --superpixels", type(explainer).__name__, allowed)
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
    found: "list[Attribution]", test: "Records", groups: "Sequence[Tensor | None]"
) -> list[dict[str, Any]]:
    """Return one row for each record; a group counts as one feature."""
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
    """Return the features of largest contribution, one a line; tokens with their numbers."""
    import torch

    values = torch.tensor(row["values"]).flatten()
    tokens = row.get("inputs")
    head = f"record {row['record']}, class {row['class']}, base {row['base']:.4g}"
    if row["fidelity"] is not None:
        head += f", fidelity {row['fidelity']:.3f}"
    lines = [head]
    for place in values.abs().argsort(descending=True)[:SHOWN].tolist():
        token = "" if tokens is None else f", token {tokens[place]:6}"
        lines.append(f"  feature {place:5}{token} {float(values[place]):+.4g}")
    return "\n".join([*lines, ""])
