"""Restarts of a run with the remedies of its findings, one cause at a time."""

import math
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
from perdure.experiment.paired_statistics import estimate
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
        best: folder of the best run: most trainings that did not diverge, then the highest average
            accuracy, as the mean over the arms.
        restarts: cause, remedies and measurements of each restart.
        refused: findings whose remedies were not applied or were withdrawn, from rule to reason.
    """

    folders: tuple[Path, ...]
    best: Path
    restarts: tuple[Restart, ...] = ()
    refused: Mapping[str, str] = field(default_factory=dict)


@dataclass(frozen=True, kw_only=True)
class _Run:
    """Finished run: its folder, config, result, and findings that the result lacks."""

    folder: Path
    text: str
    result: Result
    further: tuple[Finding, ...] = ()

    @property
    def score(self) -> tuple[int, float]:
        """Number of trainings that did not diverge, and their mean accuracy, or minus the error."""
        values = self.accuracies.values()
        return len(values), self.sign * math.fsum(values) / max(1, len(values))

    @property
    def accuracies(self) -> dict[tuple[str, int], float]:
        """Average accuracy of every training that did not diverge, by arm and seed."""
        return {
            (arm["name"], trial["seed"]): trial["average_accuracy"]
            for arm in self.result["arms"]
            for trial in arm["seeds"]
            if trial["average_accuracy"] is not None
        }

    @property
    def sign(self) -> int:
        """-1 if the metric of the task is an error."""
        return 1 if self.result["task"]["higher_is_better"] else -1


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
    NAME-healed-2, and so on; no model of an earlier run is changed. It ends when no finding has a
    remedy that changes the config, or after the last restart. A stopped call continues.

    A finding in one arm changes the setting of all arms. A restart that lowers the average accuracy
    below the best run's is worse: by more than one standard error of the paired differences of the
    seeds, or with one seed by more than one point, or 1 % of an error. Its remedies are withdrawn,
    and the next restart starts from the run before it. The accuracy of the best run is slightly too
    high, because the same test records chose it.

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
    further = tuple(each for found in known.values() for each in found)
    current = best = _Run(folder=folders[0], text=text, result=result, further=further)
    plan = _next(current, done)
    while plan.cause and len(done) < restarts:
        assert isinstance(plan.config, str)
        name = f"{folders[0].name}-healed" + (f"-{len(done) + 1}" if done else "")
        told(f"restart {len(done) + 1}, {plan.cause}: {changes_in_words(plan.changes)}")
        text = _restarted(plan.config, name, config, folders, total_epsilon)
        folders.append(folders[0].with_name(name))
        result = run(parse(text, source=name), text, folders[-1], progress, examine="full")
        new = _Run(folder=folders[-1], text=text, result=result)
        done.append(_compared(plan, current, new, best))
        _record(folders[1:], done)
        if done[-1]["worse"]:
            told(f"restart {len(done)} {done[-1]['worse']}; its remedies are withdrawn")
        else:
            current = replace(new, result=read_result(new.folder))
        best = max(best, new, key=lambda each: each.score)
        plan = _next(current, done)
    refused = {**plan.refused, **_withdrawn(done)}
    return Healing(folders=tuple(folders), best=best.folder, restarts=tuple(done), refused=refused)


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


def _next(current: _Run, done: Sequence[Restart]) -> Healed:
    """Return the config with the next remedies of a run's findings, without withdrawn ones."""
    rows = [row for arm in current.result["arms"] for row in arm.get("findings", ())]
    known = [*map(finding_of, rows), *current.further]
    left = _withdrawn(done)
    tried = [restart["changes"] for restart in done if restart["worse"]]
    kept = [
        finding
        for finding in known
        # another rule may propose a setting that was withdrawn
        if finding.rule not in left and dict(finding.remedy.changes) not in tried
    ]
    return healed(current.text, kept, source=current.folder.name)


def _withdrawn(done: Sequence[Restart]) -> dict[str, str]:
    """Return the rules whose remedies made a restart worse, with the reason."""
    return {
        rule: restart["worse"] for restart in done if restart["worse"] for rule in restart["rules"]
    }


def _compared(plan: Healed, before: _Run, after: _Run, best: _Run) -> Restart:
    old = {arm["name"]: arm["average_accuracy"] for arm in before.result["arms"]}
    return {
        "run": after.folder.name,
        "start": before.folder.name,
        "cause": plan.cause,
        "rules": list(plan.rules),
        "changes": dict(plan.changes),
        "worse": _worse(best, after),
        "arms": {
            arm["name"]: {"before": old[arm["name"]], "after": arm["average_accuracy"]}
            for arm in after.result["arms"]
        },
    }


def _worse(best: _Run, after: _Run) -> str:
    """Return the reason why a run is worse than the best one so far; "" if it is not."""
    old, new = best.accuracies, after.accuracies
    if len(new) < len(old):
        return f"made it worse: {len(old) - len(new)} more trainings diverged"
    if len(new) > len(old) or not old.keys() & new.keys():
        return ""
    changes: dict[int, list[float]] = {}
    for arm, seed in sorted(old.keys() & new.keys()):
        changes.setdefault(seed, []).append(best.sign * (new[arm, seed] - old[arm, seed]))
    means = {seed: math.fsum(values) / len(values) for seed, values in changes.items()}
    change = estimate(means, confidence=0.95)
    # accuracies are in percent; an error has a unit of its own
    point = 1.0 if best.sign > 0 else abs(best.score[1]) / 100
    if change.mean >= -(point if change.standard_error is None else change.standard_error):
        return ""
    return f"made it worse: {abs(best.score[1]):.3g} -> {abs(after.score[1]):.3g}"


def _record(folders: Sequence[Path], done: Sequence[Restart]) -> None:
    """Write all restarts into the result of each of them."""
    for folder in folders:
        write_json(folder / "result.json", {**read_result(folder), "healing": list(done)})


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
