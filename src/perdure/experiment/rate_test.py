"""Learning-rate range test on public records: the loss while the rate rises step by step."""

import math
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

from torch.optim import Optimizer
from torch.optim.lr_scheduler import ExponentialLR, LRScheduler

from perdure.data.experience import Stream
from perdure.errors import ConfigError, PrivacyError, RunawayError
from perdure.learner.learner import Learner
from perdure.utils.checked_arguments import checked_arguments

if TYPE_CHECKING:
    from matplotlib.figure import Figure

SMOOTHING = 0.9
"""Share of the old mean in the moving average of the losses."""
DIVERGED = 4.0
"""Multiple of the lowest loss at which the test ends."""
BELOW = 10.0
"""Divisor of the rate with the lowest loss, for the suggested rate."""
FEWEST_STEPS = 10


@dataclass(frozen=True, kw_only=True)
class RateTest:
    """Result of a learning-rate range test.

    Args:
        rates: learning rates, ascending, one for each step.
        losses: smoothed training loss at each rate, before its step.
        suggestion: a tenth of the rate with the lowest smoothed loss.
    """

    rates: tuple[float, ...]
    losses: tuple[float, ...]
    suggestion: float

    def plot(self) -> "Figure":
        """Draw the loss over the learning rate, with the suggestion.

        >>> lr_range_test(make, stream).plot().savefig("rates.svg")
        """
        from matplotlib.figure import Figure

        figure = Figure(figsize=(6.0, 3.5), layout="constrained")
        axes = figure.subplots()
        axes.semilogx(self.rates, self.losses)
        axes.axvline(self.suggestion, linestyle="--", label=f"suggestion {self.suggestion:.1e}")
        axes.set_xlabel("learning rate")
        axes.set_ylabel("smoothed training loss")
        axes.legend()
        return figure


@checked_arguments
def lr_range_test(
    make: Callable[[], Learner],
    stream: Stream,
    *,
    lowest: float = 1e-6,
    highest: float = 10.0,
    steps: int = 100,
) -> RateTest:
    """Train on the first experience with a rising learning rate, and suggest a rate.

        rate in step t = lowest * (highest / lowest)^(t / (steps - 1))

    The test ends early when the smoothed loss is four times its lowest value, NaN or infinite.

    Guarantee: none; the losses are those of the records, so a private learner is refused.

    Args:
        make: function that returns a new learner with a new model, in no folder. Its length of an
            experience, schedule, validation and callbacks are not used.
        stream: stream of public records; only its first experience is used.
        lowest: first learning rate, above 0.
        highest: learning rate of the last step.
        steps: number of steps, 10 or more.

    Raises:
        ConfigError: if an argument is not allowed, or the learner is not a new one.
        PrivacyError: if the learner is private.
        RunawayError: if the loss is never finite, or is lowest in the first steps.

    Source: Smith, Cyclical learning rates for training neural networks, WACV 2017, section 3.3.
    """
    _check(lowest, highest, steps)
    given = make()
    _refuse_used(given)
    factor = (highest / lowest) ** (1 / (steps - 1))
    losses: list[float] = []

    def rising(optimizer: Optimizer, /, *, steps: int) -> LRScheduler:
        for group in optimizer.param_groups:
            group["lr"] = group["initial_lr"] = lowest
        return ExponentialLR(optimizer, gamma=factor)

    def note(point: str, learner: Learner) -> None:
        if point == "step.gradient":
            shown = learner.curator.diagnostics
            losses.append(float(shown.loss) if shown else math.nan)

    learner = replace(
        given,
        epochs=None,
        iterations=steps,
        blocks=1,
        scheduler=rising,
        validation=None,
        callbacks=[note],
    )
    learner.prepare(stream)
    learner.begin(0)
    smooth: list[float] = []
    for step in range(steps):
        try:
            learner.train(range(step, step + 1))
        except RunawayError:  # the rate is too high, which ends the test
            break
        smooth.append(_smoothed(losses))
        if not smooth[-1] <= DIVERGED * min(smooth[0], *smooth):
            smooth.pop()
            break
    rates = tuple(lowest * factor**step for step in range(len(smooth)))
    return RateTest(rates=rates, losses=tuple(smooth), suggestion=_suggested(rates, smooth))


def _smoothed(losses: list[float]) -> float:
    """Return the moving average of the losses, corrected for its start (as in Adam)."""
    weights = [SMOOTHING ** (len(losses) - 1 - index) for index in range(len(losses))]
    return sum(w * loss for w, loss in zip(weights, losses, strict=True)) / sum(weights)


def _suggested(rates: tuple[float, ...], losses: list[float]) -> float:
    best = min(range(len(losses)), key=losses.__getitem__, default=0)
    if best == 0:
        raise RunawayError(
            "the training loss never falls below its first value, so no learning rate can be "
            "suggested; give a smaller lowest rate, more steps, or normalised inputs"
        )
    return rates[best] / BELOW


def _check(lowest: float, highest: float, steps: int) -> None:
    if not 0 < lowest < math.inf:
        raise ConfigError.of("lowest", lowest, "a learning rate above 0")
    if not lowest < highest < math.inf:
        raise ConfigError.of("highest", highest, f"a learning rate above lowest = {lowest}")
    if not isinstance(steps, int) or steps < FEWEST_STEPS:
        raise ConfigError.of("steps", steps, f"a whole number, {FEWEST_STEPS} or more")


def _refuse_used(learner: object) -> None:
    if not isinstance(learner, Learner):
        raise ConfigError.of("result of make", type(learner).__name__, "a perdure.Learner")
    if learner.privacy is not None:
        raise PrivacyError(
            "a learning-rate range test reads the losses of private records; run it on public "
            "records without privacy"
        )
    if learner.folder is not None:
        raise ConfigError.of("folder", str(learner.folder), "None for a range test")
    if learner.position.experience or learner.position.step:
        raise ConfigError(
            "make returned a learner that was trained before; allowed: a new learner with a new "
            "model; build both inside the function"
        )
