"""Rule: the learning rate is far too high or too low for the model and its optimiser."""

from dataclasses import dataclass
from typing import ClassVar

from perdure.doctor.case import Case
from perdure.doctor.finding import Cause, Finding, Remedy
from perdure.doctor.rules.base import Rule
from perdure.doctor.trials import Rows, batches_of, trial

FACTORS = (0.01, 0.1, 1.0, 10.0, 100.0, 1000.0)
"""Factors for the learning rate that are tried."""
LOWER = (0.0001, 0.001, 0.01, 0.1, 1.0)
"""Factors that are tried instead if the loss rises at the given rate."""
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

    Remedy: the lowest rate, on the right side, with at least `good` of the best progress.

    Source: Smith 2017, "Cyclical learning rates", range test; own measurement of the shares.

    Args:
        share: share of the best progress below which there is a finding.
        good: share of the best progress that the proposed rate has at least.
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
    steps: int = 60
    rows: int = 32

    def examine(self, case: Case) -> Finding | None:
        """Train copies of the model at several learning rates."""
        rate = case.learning_rate
        if rate is None or not case.trained_numbers:
            return None
        inputs, targets = self._records(case)
        batches = batches_of(inputs, targets, rows=min(self.rows, len(inputs)), seed=case.seed)
        steps = min(self.steps, case.steps)

        def progress(factor: float) -> float:
            losses = trial(
                case,
                batches,
                case.make_optimizer,
                steps=steps,
                factor=factor,
                private=case.privacy is not None,
                measured=(inputs[:MEASURED], targets[:MEASURED]),
            )
            return (losses[0] - losses[-1]) / abs(losses[0] or 1.0)

        own = progress(1.0)
        factors = LOWER if own < -self.share else FACTORS
        found = {each: own if each == 1.0 else progress(each) for each in factors}
        while 1.0 < max(found) < MOST and found[max(found)] == max(found.values()):
            higher = 10.0 * max(found)
            found[higher] = progress(higher)
        return self._judged(case, rate, found, steps)

    def _records(self, case: Case) -> Rows:
        """Return inputs and targets of the first experience that may be read, or random ones."""
        records = case.some_records(0, ROWS)
        if records is None:
            return case.random_inputs(8 * self.rows), case.random_targets(8 * self.rows)
        return records.inputs, records.labels

    def _judged(
        self, case: Case, rate: float, progress: dict[float, float], steps: int
    ) -> Finding | None:
        own = progress[1.0]
        best = max(progress, key=progress.__getitem__)
        if progress[best] <= 0 or own >= self.share * progress[best]:
            return None
        low = best > 1.0
        if low and max(own, 0.0) * case.steps / steps >= self.share * progress[best]:
            return None  # slow, but the training is long enough
        top = progress[best]
        side = [each for each in progress if (each > 1.0) == low]
        chosen = next(each for each in side if progress[each] >= self.good * top)
        better = float(f"{rate * chosen:.3g}")
        told = "rises" if own < 0 else "hardly falls"
        return self.finding(
            f"the loss {told} in {steps} steps at learning rate {rate:g}, which is too "
            f"{'low' if low else 'high'}; it falls well at {better:g}",
            measured=max(own / top, -LOWEST),
            threshold=self.share,
            remedy=Remedy(
                advice=f"learning_rate = {better:g}", changes={"training.learning_rate": better}
            ),
            series=[max(each / top, -LOWEST) for each in progress.values()],
            series_name="fall of the loss, relative to the best, at the learning rate times "
            + ", ".join(f"{factor:g}" for factor in progress),
        )
