"""Run all checks of the strategy contract, in order."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass

import torch

from perdure.contract.strategy import Strategy
from perdure.errors import ConformanceError
from perdure.testing.fixtures import Builder, NotApplicable, StrategyFixture
from perdure.testing.hook_checks import bounds, pure, rows, vmap
from perdure.testing.privacy_checks import private
from perdure.testing.run_checks import alone, declared, federated, resume
from perdure.types import Scenario
from perdure.utils.seeding import seed_globally, undisturbed

CHECKS: Mapping[str, Callable[[StrategyFixture], str | None]] = {
    "declared": declared,
    "alone": alone,
    "pure": pure,
    "rows": rows,
    "bounds": bounds,
    "vmap": vmap,
    "private": private,
    "resume": resume,
    "federated": federated,
}
"""Name to check, in the order in which they run.

A check raises ConformanceError, or returns the reason why a part of it does not apply.
"""
ON_CUDA = ("alone", "rows", "vmap", "private")


@dataclass(frozen=True, kw_only=True)
class Report:
    """Result of `check_strategy` for a strategy that passed.

    Args:
        strategy: repr of the strategy.
        scenario: scenario of the stream.
        passed: names of the checks that ran.
        skipped: from the name of a check to the reason why it, or a part of it, does not apply.
    """

    strategy: str
    scenario: Scenario
    passed: tuple[str, ...]
    skipped: Mapping[str, str]

    def __str__(self) -> str:
        lines = [
            f"{self.strategy}, {self.scenario}-incremental",
            f"  passed: {', '.join(self.passed)}",
        ]
        return "\n".join(
            lines + [f"  not applicable: {name}: {why}" for name, why in self.skipped.items()]
        )


def check_strategy(
    strategy: Strategy, *, scenario: Scenario = "class", model: Builder | None = None
) -> Report:
    """Run a strategy alone, federated, private and under `vmap`, on small synthetic streams.

    The checks run in this order, and the first failure is raised:

        declared    a frozen, hashable dataclass of hyper-parameters; a model that is the same every
                    time
        alone       a whole stream: the state keeps the names, shapes, types and devices from
                    `init`; numbers are finite; no probability for a class that may not be
        predicted;
                    no penalty if the plan says so
        pure        a hook changes neither parameters nor state nor rows nor the strategy, and
        returns
                    the same twice; `derive` writes to `local` names only
        rows        loss, prediction, stored tensors and the rows of every query of a record: the
        same
                    alone, in the batch, and among other or fewer rows
        bounds      one record changes the clipped gradient, and the sum of every query, by at most
                    the clip norm
        vmap        hooks on tensors give the same for stacked parameters and states as for each
                    alone
        private     records are used only through releases of a curator; the releases are those that
                    `privacy_cost` declares, the plan reserves and the ledger contains; with other
                    records but the same releases, the model and the state are bit-identical
        resume      after a stop in the middle, a save and a load, the run ends with the same bits,
                    without and with privacy
        federated   the only client of a federation ends like the learner alone, bit-identically;
                    states of two clients are combined as declared

    If there is a CUDA device, the checks in `ON_CUDA` run also on it.

    Args:
        strategy: strategy to check; a copy of it is used.
        scenario: scenario of the streams.
        model: function from a stream (inputs of 4 numbers in [0, 1], 6 classes) to a model, the
            same in every call; None for the strategy's `small_model` if it has one, or else a small
            perceptron.

    Raises:
        ConformanceError: if a check fails; the message has the check, the result, the allowed
            result and the fix.
    """
    fixture = StrategyFixture(strategy=strategy, scenario=scenario, model=model)
    passed = list[str]()
    skipped = dict[str, str]()
    for name, check in CHECKS.items():
        _run(name, check, fixture, passed, skipped)
    if not torch.cuda.is_available():
        skipped["cuda"] = "this machine has no CUDA device"
        return Report(
            strategy=repr(strategy), scenario=scenario, passed=tuple(passed), skipped=skipped
        )
    there = StrategyFixture(strategy=strategy, scenario=scenario, model=model, device="cuda")
    for name in ON_CUDA:
        _run(f"{name} on cuda", CHECKS[name], there, passed, skipped)
    return Report(strategy=repr(strategy), scenario=scenario, passed=tuple(passed), skipped=skipped)


def _run(
    name: str,
    check: Callable[[StrategyFixture], str | None],
    fixture: StrategyFixture,
    passed: list[str],
    skipped: dict[str, str],
) -> None:
    with undisturbed():
        seed_globally(0)
        try:
            reason = check(fixture)
        except NotApplicable as reason_of_all:
            skipped[name] = str(reason_of_all)
            return
        except ConformanceError as error:
            raise ConformanceError(f"{fixture.name} fails the check {name!r}: {error}") from error
        except Exception as error:  # any error of a user's strategy
            told = (
                f"{type(error).__name__}: "
                f"{str(error).splitlines()[0] if str(error) else 'no message'}"
            )
            raise ConformanceError(
                f"{fixture.name} fails the check {name!r}: it raised {told}; allowed: no error "
                f"on a small {fixture.scenario}-incremental stream; see the traceback above for "
                "the line of the error"
            ) from error
    passed.append(name)
    if reason:
        skipped[f"{name}, a part"] = reason
