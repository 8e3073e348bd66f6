"""Rule: private gradients are almost only noise."""

import statistics
from dataclasses import dataclass
from typing import ClassVar

from perdure.doctor.finding import Cause, Finding, Remedy
from perdure.doctor.rules.base import Rule
from perdure.doctor.trace import Trace


@dataclass(frozen=True, kw_only=True)
class SignalBelowNoise(Rule):
    """Find private gradients whose signal has collapsed.

    Symptom: the mean energy of the released gradients is above that of their noise by less than
    `ratio`, and the public loss is not below its start and chance. Both come from released values
    and from the declared noise, at no privacy cost.

    Remedy: larger batches, fewer parameters (a frozen backbone, low-rank adapters), or a larger
    epsilon. The clip norm does not help: it scales signal and noise alike, unless few records are
    clipped.

    Source: pfl-research reports the ratio at each step; limits from runs on digits, where healthy
    private runs have means of 0.01 to 0.05.

    Args:
        ratio: ratio of the energies.
    """

    name: ClassVar[str] = "signal below noise"
    cause: ClassVar[Cause] = "privacy"
    source: ClassVar[str] = "pfl-research, signal-to-noise ratio of the Gaussian mechanism"
    explained_by: ClassVar[tuple[str, ...]] = (
        "dead units",
        "learning rate too high",
        "learning rate too low",
        "initial variance",
        "saturated activation",
    )

    ratio: float = 0.01

    def watch(self, trace: Trace) -> Finding | None:
        """Average the ratio over the measured steps."""
        ratios = trace.signal_to_noise
        if len(ratios) < 5 or trace.share < 0.5 or trace.is_learning:
            return None
        mean = statistics.mean(ratios)
        if mean >= self.ratio:
            return None
        return self.finding(
            f"the signal has {mean:.1g} of the energy of the noise, and the public loss has not "
            "fallen",
            measured=mean,
            threshold=self.ratio,
            remedy=Remedy(
                advice="raise training.batch_size, train fewer parameters, or raise privacy.epsilon"
            ),
            series=ratios,
            series_name="energy of the signal over that of the noise",
            experience=trace.experience,
            step=trace.done,
        )
