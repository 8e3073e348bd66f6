"""Generative replay: train a generator, and rehearse samples of the previous generator.

Shin, Lee, Kim and Kim, Continual Learning with Deep Generative Replay, NeurIPS 2017, section 3 and
algorithm 1; the generator is the variational autoencoder of Kingma and Welling, Auto-Encoding
Variational Bayes, ICLR 2014, appendix B and C.1; weights and scale are from van de Ven, Tuytelaars
and Tolias, Three types of incremental learning, Nature Machine Intelligence 2022.

    loss_i  = 1/t (CE(x_i, y_i) + vae(x_i)) + (1 - 1/t) (distil(x~_i) + vae(x~_i))
    vae(x)  = 1/d (sum over the d pixels of BCE(decode(m + s e), x)
                   + 1/2 sum_k (m_k^2 + s_k^2 - 1 - log s_k^2))
    x~_i    = sigmoid(teacher's decode(z_i)),    (m, log s^2) = encode(x),    e, z_i standard normal
    distil  = CE(x~, the teacher's most probable class),
              or with a temperature sum_c -q_c log p_c as in LwF

t is the number of the experience. The first experience has no teacher. The teacher's probabilities
are over the classes that `perdure.strategies.lwf.answered` returns; in task-incremental streams
they are over the classes of each earlier task, and the losses are averaged.

Every row has one generated row x~_i of its own, so its loss does not depend on other rows. e and
z_i are functions of the record's id and of the step (`perdure.utils`). Classifier and generator are
trained by one loss but share no parameter, so without privacy they are trained independently, as in
the paper.

State: `teacher`, the model at the end of the last experience, generator included, and the number of
`steps`. Memory cost: once the parameters, a generator in addition to the classifier, and one
generated row for every row of a step. Privacy cost: only the gradient. The generator is trained by
the same released gradients as the classifier, so its samples are post-processing. No record is
stored, and no record is used again after its experience. Classifier and generator are clipped
together. The generator's loss is in nats per pixel, so its gradient is much smaller: with a clip
norm of 1 the noise hides it. Use a much smaller clip norm. Without privacy, a generator may
reproduce its training records.
"""

import math
from dataclasses import dataclass
from typing import TYPE_CHECKING, ClassVar, Self

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from perdure.contract import (
    Context,
    Forward,
    Plan,
    Spec,
    State,
    Strategy,
    cross_entropy_of,
    task_losses,
)
from perdure.data import Batch
from perdure.errors import ConfigError, StrategyError
from perdure.models import generative, mlp
from perdure.strategies.lwf import answered
from perdure.tasks import MASKED
from perdure.types import Params
from perdure.utils import derive, normals, row_slices

if TYPE_CHECKING:
    from perdure.contract import Curator
    from perdure.data import Experience


@dataclass(frozen=True, kw_only=True)
class GenerativeReplay(Strategy):
    """Rehearse samples of the previous generator, labelled by the previous classifier.

    It needs a model with a generator, by `perdure.models.generative` or `model.name =
    "generative"`: with `encode`, `decode` and `latent`, and parameters under `encoder.` and
    `decoder.`. Inputs lie in [0, 1].

    Args:
        temperature: temperature of the probabilities of old and new classifier (T); None for the
            most probable class of the old classifier alone, as in Shin et al.
        seed: seed of the latent vectors and of the noise of the autoencoder.
    """

    temperature: float | None = None
    seed: int = 0
    tasks_because: ClassVar[str] = "it labels generated inputs with the most probable class"

    def __post_init__(self) -> None:
        if self.temperature is not None and not 0 < self.temperature < math.inf:
            raise ConfigError.of(
                "generative_replay.temperature", self.temperature, "a number above 0, or None"
            )

    @classmethod
    def example(cls) -> Self:
        """Return a small instance: distillation with a temperature of 2."""
        return cls(temperature=2.0)

    def small_model(self, *, input_shape: tuple[int, ...], num_classes: int) -> nn.Module:
        """Build a perceptron and a generator with two latent numbers."""
        classifier = mlp(input_shape=input_shape, num_classes=num_classes, hidden=(8,), seed=1)
        return generative(classifier, input_shape=input_shape, latent=2, hidden=(6,), seed=1)

    def init(self, spec: Spec) -> State:
        """Create the state with the teacher, which is used from the second experience on.

        Raises:
            StrategyError: if the model has no generator.
        """
        if not all(any(part in name for name in spec.params) for part in ("encoder.", "decoder.")):
            raise StrategyError(
                "GenerativeReplay needs a model with a generator; make it by "
                "perdure.models.generative(classifier, "
                'input_shape=...), or set model.name = "generative"'
            )
        steps = torch.zeros((), dtype=torch.int64, device=next(iter(spec.params.values())).device)
        return (
            State().declare_group("teacher", spec.teacher, "local").declare("steps", steps, "local")
        )

    def plan(self, experience: "Experience") -> Plan:
        """Return a plan to train on the records of the experience only.

        Raises:
            StrategyError: if test inputs, which are public, are outside [0, 1].
        """
        shown = experience.test.inputs
        lows = [float(shown[piece].amin()) for piece in row_slices(shown) if len(shown)]
        highs = [float(shown[piece].amax()) for piece in row_slices(shown) if len(shown)]
        if not all(0 <= low <= high <= 1 for low, high in zip(lows, highs, strict=True)):
            raise StrategyError(
                f"inputs are from {min(lows):.3g} to {max(highs):.3g}, but GenerativeReplay "
                "generates inputs in [0, 1]; scale the inputs to [0, 1], and standardise inside "
                "the model"
            )
        return Plan()

    def losses(self, forward: Forward, batch: Batch, context: Context, state: State) -> Tensor:
        """Return (n,) losses of each row and of one generated row.

        They are cross entropy and reconstruction of the row, and distillation and reconstruction of
        the generated row.
        """
        latent: int = forward.module.latent  # type: ignore[assignment]
        e, z, e_made = drawn(batch.ids, state["steps"], 3 * latent, self.seed).chunk(3, dim=1)
        new = task_losses(forward, batch, context) + vae_loss(forward, batch.inputs, e)
        if context.experience == 0:
            return new
        teacher = forward.at(state.group("teacher"))
        made = torch.sigmoid(teacher.method("decode")(z))
        old = distillation(forward(made), teacher(made), context, self.temperature)
        old = old + vae_loss(forward, made, e_made)
        return torch.lerp(old, new, 1 / (context.experience + 1))

    def after_step(
        self,
        before: Params,
        after: Params,
        gradient: Params,
        state: State,
        noise_variance: float = 0.0,
    ) -> State:
        """Count the step, so that every step draws other random numbers."""
        return state.replace({"steps": state["steps"] + 1})

    def after_experience(self, curator: "Curator", params: Params, state: State) -> State:
        """Store the current model, with its generator, as the next teacher."""
        return state.replace_group("teacher", params | curator.statistics)


def distillation(
    logits: Tensor, teacher: Tensor, context: Context, temperature: float | None
) -> Tensor:
    """Return (n,) distance of the student's probabilities from the teacher's, averaged over tasks.

    Args:
        logits: (n, C) logits of the student.
        teacher: (n, C) logits of the teacher.
        context: context with the classes that teacher and student predict.
        temperature: divisor of both logits; None for the most probable class of the teacher only.
    """

    def apart(logits: Tensor, teacher: Tensor) -> Tensor:
        if temperature is None:
            return cross_entropy_of(logits, teacher.argmax(1))
        targets = torch.softmax(teacher / temperature, dim=1)
        return -(targets * torch.log_softmax(logits / temperature, dim=1)).sum(1)

    each = [
        apart(torch.where(allowed, logits, MASKED), torch.where(known, teacher, MASKED))
        for known, allowed in answered(context)
    ]
    return torch.stack(each).mean(0)


def drawn(ids: Tensor, step: Tensor, count: int, seed: int) -> Tensor:
    """Return (n, count) standard normal numbers for the records with ids (n,) in a step ()."""
    places = torch.arange(count, device=ids.device)
    return normals(ids[:, None], derive(seed, "generative replay"), step, places)


def vae_loss(forward: Forward, x: Tensor, noise: Tensor) -> Tensor:
    """Return (n,) minus the evidence lower bound of each row, in nats per pixel, with one sample.

    Args:
        forward: model with a generator.
        x: (n, ...) inputs; values outside [0, 1] are clamped where they are the target.
        noise: (n, latent) standard normal numbers.
    """
    mean, log_variance = forward.method("encode")(x)
    logits = forward.method("decode")(mean + torch.exp(log_variance / 2) * noise)
    apart = F.binary_cross_entropy_with_logits(logits, x.clamp(0, 1), reduction="none").flatten(1)
    divergence = (mean.square() + log_variance.exp() - 1 - log_variance).sum(1) / 2
    loss: Tensor = (apart.sum(1) + divergence) / apart.shape[1]
    return loss
