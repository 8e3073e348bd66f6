"""The command `perdure attack`: robust accuracy of a finished run's models, with its card."""

from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from perdure.cli.consoles import wide_console
from perdure.cli.local_modules import local_modules
from perdure.errors import ConfigError

if TYPE_CHECKING:
    from rich.console import Console

    from perdure.adversarial import Attack


def attack(
    run: Path,
    arm: Annotated[
        str | None, typer.Argument(help="Name of an arm; default: all arms of the run.")
    ] = None,
    norm: Annotated[str, typer.Option(help="Norm of the ball: linf, l2 or l1.")] = "linf",
    eps: Annotated[
        float | None,
        typer.Option("--eps", help="Radius of the ball; required."),
    ] = None,
    steps: Annotated[int, typer.Option(help="Gradient steps of PGD.")] = 20,
    restarts: Annotated[int, typer.Option(help="Random starts of PGD.")] = 1,
    autoattack: Annotated[
        bool, typer.Option("--autoattack", help="Attack with AutoAttack instead of PGD.")
    ] = False,
    bounds: Annotated[
        tuple[float, float] | None,
        typer.Option(help="Smallest and largest input; default: 0 1 if test inputs lie there."),
    ] = None,
    check: Annotated[
        bool,
        typer.Option("--check", help="Look for hidden gradients."),
    ] = False,
    records: Annotated[
        int | None, typer.Option(help="Test records of each experience; default: all.")
    ] = None,
    seed: Annotated[int | None, typer.Option(help="Seed of the models; default: all.")] = None,
    json: Annotated[
        Path | None, typer.Option("--json", help="Write all cards to this file.")
    ] = None,
) -> None:
    """Attack the models of a finished run, and print the accuracy that is left.

    RUN is the folder of the run. Each test record is moved within a ball of radius --eps so that
    the model errs; a record must survive two losses, whose gradient large logits cannot hide. The
    number is an upper bound: a stronger attack may find more. AutoAttack needs `pip install
    'perdure[robust]'`.
    """
    if eps is None:
        raise ConfigError.of("--eps", None, "a radius in units of the inputs, as --eps 0.1")
    with local_modules():
        from perdure.experiment.robust_runs import attack_models, unit_bounds
        from perdure.utils.atomic_files import write_json

        chosen = _attack(norm, eps, steps, restarts, autoattack)
        chosen = replace(chosen, bounds=bounds) if bounds else unit_bounds(run, chosen)
        console = wide_console()
        found = attack_models(
            run,
            chosen,
            arm=arm,
            seed=seed,
            records=records,
            checks=check,
            progress=lambda trial: console.print(f"attacking {trial}", style="dim"),
        )
    _show(found, console)
    if json is not None:
        write_json(json, _rows(found))
        console.print(f"written: {json}", markup=False, highlight=False)


def _show(found: list[Any], console: "Console") -> None:
    """Print the table of all models, the checks of each, and the threat model."""
    console.print(_table(found))
    for model in found:
        if model.checked is not None:
            left = model.experiences[model.checked].robust_accuracy
            told = f"{model.trial}, experience {model.checked + 1}, of which {left:.1f} % are left:"
            console.print(told, highlight=False, markup=False)
        for sign in model.checks:
            console.print(f"  {sign}", highlight=False, markup=False)
    console.print(f"threat model: {found[0].experiences[0].threat()}", highlight=False)


def _rows(found: list[Any]) -> dict[str, list[dict[str, Any]]]:
    """Return the cards of every model, by its name."""
    return {
        model.trial: [
            {"experience": number, **card.row()} for number, card in enumerate(model.experiences)
        ]
        for model in found
    }


def _attack(norm: str, eps: float, steps: int, restarts: int, autoattack: bool) -> "Attack":
    from perdure.adversarial import PGD, AutoAttack

    if autoattack:
        return AutoAttack(epsilon=eps, norm=norm)  # type: ignore[arg-type]
    return PGD(epsilon=eps, norm=norm, steps=steps, restarts=restarts)  # type: ignore[arg-type]


def _table(found: list[Any]) -> Any:
    from rich.table import Table

    count = len(found[0].experiences)
    table = Table("model", "clean %", "robust %", "no gradient %")
    for number in range(count if count > 1 else 0):
        table.add_column(f"exp. {number + 1}", justify="right")
    for model in found:
        blind = sum(card.zero_gradients for card in model.experiences) / count
        means = (model.clean_accuracy, model.robust_accuracy, blind)
        each = [card.robust_accuracy for card in model.experiences] if count > 1 else []
        table.add_row(model.trial, *(f"{value:.1f}" for value in (*means, *each)))
    return table
