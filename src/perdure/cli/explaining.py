"""The command `perdure explain`: contributions of input features to answers of a run's model."""

from dataclasses import fields
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from perdure.cli.consoles import wide_console
from perdure.cli.local_modules import local_modules
from perdure.errors import ConfigError

if TYPE_CHECKING:
    from perdure.explain import Explainer

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
    layer: Annotated[
        str | None, typer.Option(help="Layer for grad_cam; default the last convolution.")
    ] = None,
    seed: Annotated[int | None, typer.Option(help="Seed of the model, of several.")] = None,
) -> None:
    """Explain answers of a finished run's model on public test records.

    RUN is the folder of the run. The right class of each record is explained, with zeros for absent
    features. The results are explanations.json, explanations.txt with the features of largest
    contribution, and for images explanations.png.
    """
    if records < 1:
        raise ConfigError.of("--records", records, "1 or more")
    with local_modules():
        import torch

        from perdure.experiment.run import load
        from perdure.tasks import SingleLabel, refuse_other_tasks
        from perdure.utils.atomic_files import write_atomically, write_json

        explainer = _explainer(method, samples=samples, cells=cells, layer=layer)
        learner = load(run, arm, seed=seed)
        stream = learner.stream
        refuse_other_tasks(stream.task, (SingleLabel,), "explain", "it asks for a class")
        stages = stream.stages
        if not 1 <= experience <= len(stages):
            raise ConfigError.of("--experience", experience, f"1 to {len(stages)}")
        stage = stages[experience - 1]
        test = stage.test.take(torch.arange(min(records, len(stage.test)))).to(learner.device)
        found = explainer.explain(
            learner.predictor(stage.last, after=len(stream) - 1),
            test.inputs,
            torch.zeros_like(test.inputs[:1]),
            targets=test.labels,
        )
        rows = _rows(found, test.ids.tolist(), cells)
        out.mkdir(parents=True, exist_ok=True)
        write_json(out / "explanations.json", {"method": repr(explainer), "records": rows})
        told = "\n".join(map(_text, rows))
        write_atomically(out / "explanations.txt", told.encode())
        if test.inputs.ndim in (3, 4):
            from perdure.explain import heat_maps

            titles = [f"class {label}" for label in test.labels.tolist()]
            figure = heat_maps(test.inputs, [(method, found.values)], titles)
            figure.savefig(out / "explanations.png", dpi=150)
    wide_console().print(f"written: {out}", markup=False, highlight=False)


def _explainer(method: str, **given: Any) -> "Explainer":
    """Return the explainer of this name with the fields that are not None."""
    from perdure.explain import find

    kind = find(method, field="--method")
    known = {each.name for each in fields(kind)}
    for name, value in given.items():
        if value is not None and name not in known:
            raise ConfigError.of(f"--{name}", value, f"not with {method}, which has no {name}")
    return kind(**{name: value for name, value in given.items() if value is not None})


def _rows(found: Any, ids: list[int], cells: int | None) -> list[dict[str, Any]]:
    """Return one row for each record; superpixels count as one feature."""
    from perdure.explain import grid_groups

    values = found.values
    if cells is not None:
        values = found.by_group(grid_groups(values.shape[1:], cells))
    fidelity = getattr(found, "fidelity", None)
    return [
        {
            "record": record,
            "class": int(found.targets[i]),
            "base": float(found.base[i]),
            "output": None if found.outputs is None else float(found.outputs[i]),
            "fidelity": None if fidelity is None else float(fidelity[i]),
            "values": values[i].tolist(),
        }
        for i, record in enumerate(ids)
    ]


def _text(row: dict[str, Any]) -> str:
    """Return the features of largest contribution, one a line."""
    import torch

    values = torch.tensor(row["values"]).flatten()
    lines = [f"record {row['record']}, class {row['class']}, base {row['base']:.4g}"]
    for place in values.abs().argsort(descending=True)[:SHOWN].tolist():
        lines.append(f"  feature {place:5} {float(values[place]):+.4g}")
    return "\n".join([*lines, ""])
