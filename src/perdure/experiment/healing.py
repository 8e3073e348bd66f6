"""Restarts of a run with the remedies of its findings, one cause at a time."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path

from perdure.doctor import Finding
from perdure.errors import ConfigError
from perdure.experiment.arm import Progress, silent
from perdure.experiment.config import Config, parse, table_of
from perdure.experiment.examinations import examine_run
from perdure.experiment.finding_rows import finding_of
from perdure.experiment.overrides import changes_in_words, toml_text
from perdure.experiment.remedies import Healed, healed
from perdure.experiment.result_schema import Restart, Result, read_result
from perdure.experiment.run import run
from perdure.experiment.spent_charges import charge_table, own_charges
from perdure.experiment.trained_models import trials
from perdure.privacy.accounting.charges import History
from perdure.utils.atomic_files import write_json
from perdure.utils.checked_arguments import checked_arguments
from perdure.utils.checked_fields import CheckedFields

RESTARTS = 3
"""Default of the largest number of restarts."""
Shown = Callable[[str], None]
"""Function that is called with a line for the user."""


@dataclass(frozen=True, kw_only=True)
class Healing(CheckedFields):
    """Outcome of `heal`.

    Args:
        folders: folder of the first run, and of each restart, in order.
        restarts: cause, remedies and measurements of each restart.
        refused: findings of the last run whose remedies were not applied, from rule to reason.
    """

    folders: tuple[Path, ...]
    restarts: tuple[Restart, ...] = ()
    refused: Mapping[str, str] = field(default_factory=dict)


@checked_arguments
def heal(
    text: str,
    folder: Path | str,
    *,
    source: str = "",
    restarts: int = RESTARTS,
    total_epsilon: float | None = None,
    progress: Progress = silent,
    told: Shown = lambda line: None,
) -> Healing:
    """Run a config, and run it again with the remedies of its findings, one cause at a time.

    A restart is a run of its own, in the folder NAME-healed beside the first one, then
    NAME-healed-2, and so on; no model or folder of an earlier run is changed. It ends when no
    finding has a remedy that changes the config, or after the last restart. A stopped call
    continues.

    Guarantee: under privacy every restart uses the records again. The charges of all earlier runs
    are in the ledger of a restart (`[[privacy.spent]]`), and its epsilon is capped at
    `total_epsilon`, which covers all runs together; a restart that does not fit is refused.

    Args:
        text: TOML text of the config.
        folder: folder of the first run.
        source: name of the config's file, for messages.
        restarts: largest number of restarts.
        total_epsilon: budget of all runs together, for a config with a private arm.
        progress: function that is called as progress(arm name, share done, state in words).
        told: function that is called with a line about each restart.

    Raises:
        BudgetError: if a restart does not fit into `total_epsilon`.
        ConfigError: if the config is not valid, if it has a private arm without `total_epsilon`, or
            more than one private model, or if the first run may exceed `total_epsilon`.
        LedgerError: if the ledger of an earlier run is missing.
        RunError: if a folder has a run of another config.
    """
    config = parse(text, source=source)
    _check(config, restarts, total_epsilon)
    folders = [Path(folder)]
    done: list[Restart] = []
    finished = (folders[0] / "result.json").exists()
    result = run(config, text, folders[0], progress, examine="full")
    # a run that was finished before may have been examined in part only
    known = examine_run(config) if finished else {}
    plan = _next(text, result, source, [each for found in known.values() for each in found])
    while plan.cause and len(done) < restarts:
        assert isinstance(plan.config, str)
        name = f"{folders[0].name}-healed" + (f"-{len(done) + 1}" if done else "")
        told(f"restart {len(done) + 1}, {plan.cause}: {changes_in_words(plan.changes)}")
        text = _restarted(plan.config, name, config, folders, total_epsilon)
        folders.append(folders[0].with_name(name))
        after = run(parse(text, source=name), text, folders[-1], progress, examine="full")
        done.append(_compared(name, plan, result, after))
        write_json(folders[-1] / "result.json", {**after, "healing": done})
        result = read_result(folders[-1])
        plan = _next(text, result, name)
    return Healing(folders=tuple(folders), restarts=tuple(done), refused=plan.refused)


def _check(config: Config, restarts: int, total_epsilon: float | None) -> None:
    if restarts < 1:
        raise ConfigError.of("restarts", restarts, "whole numbers from 1")
    private = any(arm.private for arm in config.arms)
    if total_epsilon is not None and not private:
        raise ConfigError.of("total_epsilon", total_epsilon, "None, because no arm is private")
    if private and total_epsilon is None:
        raise ConfigError(
            "total_epsilon is missing: every restart uses the private records again and is charged "
            "to their ledger; allowed: a budget of all runs together; give --total-epsilon E, or "
            "leave out --heal"
        )
    if config.privacy is None or not private:
        return
    _check_budget(config, total_epsilon)
    if config.federation is not None:
        raise ConfigError.of(
            "--heal", "a federation with privacy", "one learner, whose ledger counts all its runs"
        )


def _check_budget(config: Config, total_epsilon: float | None) -> None:
    """Refuse a total budget that the first run or the models of one restart can exceed."""
    assert config.privacy is not None
    # refuse a number out of range before the first run spends anything
    own = config.privacy.epsilons
    replace(config.privacy, epsilon=total_epsilon)
    if own and total_epsilon is not None and max(own) > total_epsilon:
        allowed = f"privacy.epsilon = {max(own):g} of the first run, or more"
        raise ConfigError.of("total_epsilon", total_epsilon, allowed)
    models = [name for name, (arm, _) in trials(config).items() if arm.private]
    if len(models) > 1:
        raise ConfigError.of(
            "--heal",
            f"{len(models)} private models ({', '.join(models[:3])})",
            "one private arm with one seed, because each model of a restart has a ledger of its "
            "own, and together they would exceed the total budget",
        )


def _next(text: str, result: Result, source: str, further: Sequence[Finding] = ()) -> Healed:
    """Return the config with the next remedies of a run's findings, and of further ones."""
    rows = [row for arm in result["arms"] for row in arm.get("findings", ())]
    return healed(text, [*map(finding_of, rows), *further], source=source)


def _compared(name: str, plan: Healed, before: Result, after: Result) -> Restart:
    old = {arm["name"]: arm["average_accuracy"] for arm in before["arms"]}
    return {
        "run": name,
        "cause": plan.cause,
        "rules": list(plan.rules),
        "changes": dict(plan.changes),
        "arms": {
            arm["name"]: {"before": old[arm["name"]], "after": arm["average_accuracy"]}
            for arm in after["arms"]
        },
    }


# --------------------------------------------------------------------------- privacy


def _restarted(
    text: str,
    name: str,
    first: Config,
    folders: Sequence[Path],
    total_epsilon: float | None,
) -> str:
    """Return the config of a restart: its name, and under privacy the charges of earlier runs."""
    table = table_of(text)
    table["name"] = name
    if total_epsilon is not None:
        assert first.privacy is not None
        before = (*first.privacy.spent, *_charges(first, folders))
        table["privacy"] |= {"epsilon": total_epsilon, "spent": list(map(charge_table, before))}
    return toml_text(table)


def _charges(config: Config, folders: Sequence[Path]) -> History:
    """Return the charges of the worst record in all private models of all runs.

    The remedies depend on the findings of all arms, so the charges of all of them count.

    Raises:
        LedgerError: if the ledger of an earlier run is missing.
    """
    return own_charges(
        folder / "arms" / trial
        for folder in folders
        for trial, (arm, _) in trials(config).items()
        if arm.private
    )
