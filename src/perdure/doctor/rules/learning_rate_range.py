"""Rule: the learning rate is far too high or too low for the model and its optimiser."""

import math
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from perdure.doctor.case import Case
from perdure.doctor.finding import Cause, Finding, Remedy
from perdure.doctor.rules.base import Rule
from perdure.doctor.trials import Rows, batches_of, trial
from perdure.tasks import SingleLabel

FACTORS = (0.01, 0.1, 1.0, 10.0, 100.0, 1000.0)
"""Factors for the learning rate that are tried."""
LOWER = (0.0001, 0.001, 0.01, 0.1, 1.0)
"""Factors that are tried instead if the given rate is too high, or may be."""
SEEN = 1e-6
"""Smallest frequency of a class in a constant guess, because the logarithm of 0 is infinite."""
MOST = 1e7
"""Largest factor; higher ones are tried as long as the last one is the best."""
ROWS = 512
"""Most records of the first experience that are used."""
MEASURED = 256
"""Most records on which the loss is measured."""
LOWEST = 10.0
"""Largest rise of the loss, relative to the best fall, that is shown."""


@dataclass(frozen=True, kw_only=True)
class LearningRateRange(Rule):
    """Find a learning rate at which the loss rises, or hardly falls, in a range test.

    Copies of the model are trained for at most `steps` steps on records of the first experience, or
    on random ones, at the learning rate times 0.01, 0.1, 1, 10, 100 and 1000, or times lower
    numbers if the loss rises. Under privacy the gradients are clipped, and have simulated noise as
    large as in training. The progress of a rate is the relative fall of the loss on fixed records.

    Symptom: the progress of the given rate is below `share` of the best one. The rate is too high
    if the best one is lower, or if the loss rises by `share` of itself. It is too low if the best
    one is higher, and if its progress, times the planned number of steps over those of the trial,
    is below `share` of the best one, too.

    A second symptom is for models of many classes whose first experience has few of them: there, a
    model that has exploded still makes progress, because it no longer predicts the other classes.
    The rate is too high, too, if the loss stays above `guess` times the loss of a constant guess,
    the frequencies of the labels, while it falls below `learnt` times that loss at a tenth of the
    rate or less.

    Remedy: the lowest rate, on the right side, with at least `good` of the best progress.

    Source: Smith 2017, "Cyclical learning rates", range test; own measurement of the shares: on two
    classes of ten, Adam ends at 1.00 to 1.13 times the loss of a guess if training fails, and below
    0.3 times it in sound trainings.

    Args:
        share: share of the best progress below which there is a finding.
        good: share of the best progress that the proposed rate has at least.
        guess: loss relative to a constant guess, above which a model has learnt nothing.
        learnt: loss relative to a constant guess, below which a model has learnt.
        steps: largest number of steps of a trial.
        rows: largest number of records in a batch of a trial.
    """

    name: ClassVar[str] = "learning rate range"
    cause: ClassVar[Cause] = "learning rate"
    source: ClassVar[str] = "Smith 2017, learning rate range test; own measurement"
    explained_by: ClassVar[tuple[str, ...]] = (
        "cannot overfit",
        "dead units",
        "exploding gradient",
        "frozen parameters",
        "initial variance",
        "private step size",
        "saturated activation",
        "softmax twice",
        "unscaled input",
        "vanishing gradient",
        "weak signal",
    )
    trains: ClassVar[bool] = True

    share: float = 0.1
    good: float = 0.8
    guess: float = 0.9
    learnt: float = 0.5
    steps: int = 60
    rows: int = 32

    def examine(self, case: Case) -> Finding | None:
        """Train copies of the model at several learning rates."""
        rate = case.learning_rate
        if rate is None or not case.trained_numbers:
            return None
        inputs, targets = self._records(case)
        batches = batches_of(inputs, targets, rows=min(self.rows, len(inputs)), seed=case.seed)
        measured = (inputs[:MEASURED], targets[:MEASURED])
        steps = min(self.steps, case.steps)
        ends: dict[float, float] = {}

        def progress(factor: float) -> float:
            losses = trial(
                case,
                batches,
                case.make_optimizer,
                steps=steps,
                factor=factor,
                private=case.privacy is not None,
                measured=measured,
            )
            ends[factor] = losses[-1]
            return (losses[0] - losses[-1]) / abs(losses[0] or 1.0)

        own = progress(1.0)
        guess = _loss_of_a_guess(case, *measured)
        # a rate at which the loss has fallen, but to that of a guess, cannot be too low
        high = own < -self.share or (own >= self.share and ends[1.0] >= self.guess * guess)
        found = {
            each: own if each == 1.0 else progress(each) for each in (LOWER if high else FACTORS)
        }
        while 1.0 < max(found) < MOST and found[max(found)] == max(found.values()):
            higher = 10.0 * max(found)
            found[higher] = progress(higher)
        beside_guess = {each: ends[each] / guess for each in found}
        return self._judged(case, rate, found, steps) or self._stuck(rate, found, beside_guess)

    def _records(self, case: Case) -> Rows:
        """Return inputs and targets of the first experience that may be read, or random ones."""
        records = case.some_records(0, ROWS)
        if records is None:
            return case.random_inputs(8 * self.rows), case.random_targets(8 * self.rows)
        return records.inputs, records.labels

    def _judged(
        self, case: Case, rate: float, progress: dict[float, float], steps: int
    ) -> Finding | None:
        """Compare the progress of the given rate with that of others."""
        own = progress[1.0]
        best = max(progress, key=progress.__getitem__)
        top = progress[best]
        if top <= 0 or own >= self.share * top:
            return None
        low = best > 1.0
        if low and max(own, 0.0) * case.steps / steps >= self.share * top:
            return None  # slow, but the training is long enough
        better = self._better(rate, progress, low=low)
        told = "rises" if own < 0 else "hardly falls"
        return self._finding(
            f"the loss {told} in {steps} steps at learning rate {rate:g}, which is too "
            f"{'low' if low else 'high'}",
            better,
            measured=max(own / top, -LOWEST),
            threshold=self.share,
            shown={each: max(fall / top, -LOWEST) for each, fall in progress.items()},
            shown_name="fall of the loss, relative to the best",
        )

    def _stuck(
        self, rate: float, progress: dict[float, float], beside_guess: dict[float, float]
    ) -> Finding | None:
        """Compare the loss at the given rate, and at much lower ones, with that of a guess."""
        own = beside_guess[1.0]
        lower = [loss for each, loss in beside_guess.items() if each <= 0.1]
        if not (own >= self.guess and min(lower) < self.learnt):
            return None
        return self._finding(
            f"at learning rate {rate:g} the loss ends at {own:.2f} times that of a constant guess, "
            "so the rate is too high",
            self._better(rate, progress, low=False),
            measured=own,
            threshold=self.guess,
            shown={each: min(loss, LOWEST) for each, loss in beside_guess.items()},
            shown_name="loss, relative to that of a constant guess,",
        )

    def _better(self, rate: float, progress: dict[float, float], *, low: bool) -> float:
        """Return the lowest rate on the right side with good progress."""
        side = {each: fall for each, fall in progress.items() if (each > 1.0) == low}
        top = max(side.values())
        chosen = min(each for each, fall in side.items() if fall >= self.good * top)
        return float(f"{rate * chosen:.3g}")

    def _finding(
        self,
        evidence: str,
        better: float,
        *,
        measured: float,
        threshold: float,
        shown: dict[float, float],
        shown_name: str,
    ) -> Finding:
        factors = ", ".join(f"{factor:g}" for factor in shown)
        return self.finding(
            f"{evidence}; it falls well at {better:g}",
            measured=measured,
            threshold=threshold,
            remedy=Remedy(
                advice=f"learning_rate = {better:g}", changes={"training.learning_rate": better}
            ),
            series=list(shown.values()),
            series_name=f"{shown_name} at the learning rate times {factors}",
        )


def _loss_of_a_guess(case: Case, inputs: Tensor, targets: Tensor) -> float:
    """Loss of outputs that are the frequencies of the labels; for cross-entropy, their entropy.

    Infinity if the task has no single labels, or if all labels are equal: then a loss says nothing
    about guessing.
    """
    if not isinstance(case.task, SingleLabel):
        return math.inf
    width = case.outputs(inputs[:1]).shape[-1]
    known = targets[(targets >= 0) & (targets < width)]
    frequencies = torch.bincount(known, minlength=width) / max(1, len(known))
    if int(frequencies.count_nonzero()) < 2:
        return math.inf
    outputs = frequencies.clamp(min=SEEN).log().expand(len(targets), width)
    return float(case.mean_loss(outputs, targets))
