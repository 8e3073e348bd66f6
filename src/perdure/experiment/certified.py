"""Table `[certificate]` of a config: the certified twin of the accuracy matrix."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal, TypedDict

import torch

from perdure.adversarial.bounds import PerFeature, refuse_bounds
from perdure.adversarial.certificates import Certificate, Smoothing, certify_by_bounds
from perdure.adversarial.certificates.interval_bounds import refuse_misfits
from perdure.data.experience import Stage, Stream
from perdure.errors import ConfigError
from perdure.experiment.robustness import matrix_of
from perdure.learner.learner import Learner
from perdure.metrics import forgetting
from perdure.utils.checked_fields import CheckedFields
from perdure.utils.seeding import generator


@dataclass(frozen=True, kw_only=True)
class CertificateConfig(CheckedFields):
    """Certified accuracy after every experience, on public test records.

    Args:
        method: `interval_bounds` for a proof in linf, of models whose layers have a rule and that
            were trained for it; `smoothing` for votes over noise in L2.
        epsilon: radius of the ball, in units of the inputs.
        bounds: smallest and largest value of an input, for `interval_bounds`, each for all features
            or as a list with one number per feature; `none` in text for inputs without bounds.
        deviation: standard deviation of the noise of `smoothing`.
        samples: noisy copies of a record for `smoothing`.
        alpha: probability that the certificate of a record by `smoothing` is wrong.
        records: number of test records of each experience that are certified.
    """

    method: Literal["interval_bounds", "smoothing"]
    epsilon: float
    bounds: tuple[PerFeature, PerFeature] | Literal["none"] = (0.0, 1.0)
    deviation: float = 0.25
    samples: int = 1000
    alpha: float = 0.001
    records: int = 200

    def __post_init__(self) -> None:
        if not 0 < self.epsilon <= 1e6:
            raise ConfigError.of("epsilon", self.epsilon, "a number above 0, at most 1e6")
        if self.records < 1:
            raise ConfigError.of("records", self.records, "1 or more")
        refuse_bounds(None if isinstance(self.bounds, str) else self.bounds)
        self._smoothed(torch.nn.Identity())  # its checks

    def refuse_misfits(self, stream: Stream) -> None:
        """Refuse test records that cannot be certified, before any training.

        Raises:
            ConfigError: if a list of bounds does not have one number per feature, if the bounds
                exclude an input, or if the inputs are no floating-point numbers.
        """
        bounds = None if isinstance(self.bounds, str) or self.method == "smoothing" else self.bounds
        for stage in stream.stages:
            test = stage.test.take(slice(0, self.records))
            refuse_misfits(test.inputs, test.labels, self.epsilon, bounds)

    def certificate(self, learner: Learner, stage: Stage, last: int, seed: int) -> Certificate:
        """Certify the first test records of a stage.

        Args:
            learner: learner after experience `last`.
            stage: stage of its stream.
            last: index of the experience that was trained last.
            seed: seed of the noise.
        """
        test = stage.test.take(slice(0, self.records))
        predict = learner.predictor(stage.latest(last), after=last)
        if self.method == "smoothing":
            return self._smoothed(predict).certificate(
                test.inputs,
                test.labels,
                epsilon=self.epsilon,
                generator=generator(seed, "smoothing", stage.number),
            )
        bounds = None if isinstance(self.bounds, str) else self.bounds
        return certify_by_bounds(
            predict, test.inputs, test.labels, epsilon=self.epsilon, bounds=bounds
        )

    def _smoothed(self, predict: torch.nn.Module | object) -> Smoothing:
        return Smoothing(
            predict=predict,  # type: ignore[arg-type]
            deviation=self.deviation,
            samples=self.samples,
            alpha=self.alpha,
        )


class CertifiedNumbers(TypedDict):
    """Certified measures of a trained model, for a run's result; null without a certificate."""

    certified_accuracy: float | None
    certified_matrix: Sequence[Sequence[float | None]] | None
    certified_forgetting: float | None


def certified_after(
    learner: Learner, stream: Stream, chosen: CertificateConfig, index: int, seed: int
) -> list[float]:
    """Return the certified accuracy, in percent, on each stage that a learner has seen.

    Args:
        learner: learner after stage `index`.
        stream: stream of the run.
        chosen: certificate.
        index: number of the stage that was trained last.
        seed: seed of the noise.
    """
    stages = stream.to(learner.device).stages
    last = stages[index].last
    cards = [chosen.certificate(learner, stage, last, seed) for stage in stages[: index + 1]]
    return [card.certified_accuracy for card in cards]


def certified_numbers(rows: Sequence[Sequence[float]]) -> CertifiedNumbers:
    """Return the certified measures of an arm, from its rows after each stage; null for no rows."""
    if not rows:
        return {"certified_accuracy": None, "certified_matrix": None, "certified_forgetting": None}
    matrix, known = matrix_of(rows)
    return {
        "certified_accuracy": sum(rows[-1]) / len(rows[-1]),
        "certified_matrix": matrix,
        "certified_forgetting": forgetting(known) if len(rows) > 1 else None,
    }
