"""Audit with canaries, which measure how much the mechanism of a learner reveals.

A canary is a record whose whole gradient is in one coordinate of a *probe*, a parameter that no
other record uses. It passes the same sampler, clipping, noise and optimiser step as the real
records, in the same loop, so that its coordinate of every released gradient shows the real effect
of the mechanism on one record. The model learns nothing from canaries, and no score depends on a
real record.
"""

import copy
import math
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from perdure.auditing.bounds import Method, log_likelihood_ratio, lower_bound
from perdure.contract.context import Context, Spec
from perdure.contract.forward import Forward
from perdure.contract.plan import Plan
from perdure.contract.state import State
from perdure.contract.strategy import Strategy
from perdure.data.experience import Experience, Stream
from perdure.data.records import Batch, Records
from perdure.data.row_view import joined_rows
from perdure.errors import ConfigError
from perdure.learner.learner import Learner
from perdure.learner.model_history import forget
from perdure.privacy.adaptive_clipping import Adaptive
from perdure.tasks import Task
from perdure.types import Params
from perdure.utils.seeding import derive, generator

if TYPE_CHECKING:
    from perdure.contract.curator import Curator

LOUDNESS = 10.0
"""Gradient norm of a canary before clipping, in units of the clip norm; above 1, so that clipping
is tested too.
"""

RELEASED = "audit.released"
"""Name of a tensor in the state of `Audited`: the probe's part of the last released gradient."""


FACTS = ("privacy_cost", "couples_records", "not_vmappable_because", "own_loss_because")
"""Declarations of a strategy that an audited one takes over."""


@dataclass(frozen=True, kw_only=True)
class AuditResult:
    """Result of an audit: a lower bound on epsilon beside the claimed epsilon.

    Args:
        lower_bound: lower bound on the true epsilon, which holds with probability `confidence`.
        claimed: epsilon in the ledger, for a record of the partition of the canaries.
        confidence: probability that a correct mechanism is not flagged.
        delta: delta of both epsilons.
        canaries: number of all canaries, in the data and not in it.
        method: kind of bound, see `perdure.auditing.bounds`.
        partition: partition of the canaries.
        sampling_rate: probability that a record of this partition is in a step (the lowest over all
            steps).
        steps: number of steps that could draw such a record.
    """

    lower_bound: float
    claimed: float
    confidence: float
    delta: float
    canaries: int
    method: Method
    partition: str
    sampling_rate: float
    steps: int

    @property
    def flagged(self) -> bool:
        """True if the mechanism was found to reveal more than is claimed."""
        return self.lower_bound > self.claimed

    def __str__(self) -> str:
        found = f"{math.floor(100 * self.lower_bound) / 100:.2f}"
        claimed = f"{math.ceil(100 * self.claimed - 1e-9) / 100:.2f}"
        verdict = (
            "CONTRADICTED: this mechanism reveals more than its epsilon claims; do not release "
            "its results"
            if self.flagged
            else "not contradicted: the audit found no sign that the mechanism reveals more than "
            "it claims"
        )
        sampled = (
            "no sampling"
            if self.sampling_rate == 1
            else f"Poisson sampling at rate {self.sampling_rate:g}"
        )
        delta = f"{self.delta:g}".replace("e-0", "e-")
        return (
            f"epsilon is at least {found} with {100 * self.confidence:g} % confidence; "
            f"claimed: {claimed} "
            f"(record, add/remove, delta {delta})\n{verdict}\n{self.canaries} canaries, each "
            f"in {self.partition} with "
            f"probability 1/2; {self.steps} steps, {sampled}; {self.method} bound; simulated noise"
        )


def audit(
    learner: Learner,
    stream: Stream,
    *,
    canaries: int = 1000,
    confidence: float = 0.99,
    method: Method = "gaussian",
    experience: int = 0,
) -> AuditResult:
    """Train a copy of `learner` with canaries, and compute a lower bound on its epsilon.

    Canaries are planted records; each is in the data with probability 1/2.

    Guarantee: a correct mechanism is flagged with probability at most 1 - confidence (under the
    assumptions of `method`). The result depends only on canaries, noise and the random numbers of
    sampling, never on a real record.

    The copy works in memory with simulated noise. The ledger, key and checkpoints of `learner` do
    not change. Noise multiplier, sampling rate, steps and claimed epsilon are the same as without
    canaries, because they follow from declared sizes. Releases after an experience are part of the
    claimed epsilon, but are not attacked.

    Args:
        learner: untrained learner with `privacy`. The copy has the same class, so a subclass with
            its own mechanism is audited, too.
        stream: stream to train on.
        canaries: total number of canaries. Without sampling, the bound for a true epsilon of 4 is
            within about 0.5 with 1,000 canaries and within 0.2 with 10,000, at 95 % confidence.
            With few steps at a low sampling rate the bound is lower.
        confidence: probability that a correct mechanism is not flagged.
        method: kind of bound, see `perdure.auditing.bounds`.
        experience: index of the experience to whose partition the canaries are added.

    Raises:
        ConfigError: if the learner has no privacy, has correlated noise or adaptive clipping (the
            score needs independent noise of one known size in every step), if the stream has no
            such experience, or if there are fewer than 10 canaries.
    """
    privacy = learner.privacy
    if privacy is None:
        raise ConfigError.of(
            "learner.privacy", None, "Privacy(...), because an audit needs a claimed epsilon"
        )
    if privacy.bands is not None or isinstance(privacy.clipping, Adaptive):
        given = f"bands={privacy.bands}, clipping={privacy.clipping}"
        allowed = "independent noise (bands=None) and a fixed clip norm"
        raise ConfigError.of("learner.privacy", given, allowed)
    if canaries < 10:
        raise ConfigError.of("canaries", canaries, "10 or more; use 1000 for a useful bound")
    if not 0 <= experience < len(stream):
        raise ConfigError.of("experience", experience, f"0 to {len(stream) - 1}")
    included = torch.rand(canaries, generator=generator(learner.seed, "audit")) < 0.5
    partition = stream[experience].train.partition
    first = first_free_id(stream)
    ear = Listener(partition, canaries)
    trial = replace(
        learner,
        model=Probed(forget(copy.deepcopy(learner.model)), canaries),
        folder=None,
        callbacks=(ear,),
        show_progress=False,
        matrix=[],
        strategy=Audited(
            inner=learner.strategy,
            first=first,
            canaries=canaries,
            loudness=LOUDNESS * privacy.clip_norm,
        ),
        privacy=replace(
            privacy,
            diagnostics="released",
            seed=derive(learner.seed, "audit noise") if privacy.seed is None else privacy.seed,
        ),
    )
    trial.fit(with_canaries(stream, experience, first + torch.nonzero(included).flatten()))
    assert trial.private_sum is not None
    return AuditResult(
        lower_bound=lower_bound(
            ear.scores, included, delta=privacy.delta, confidence=confidence, method=method
        ),
        claimed=trial.private_sum.ledger.epsilon([partition], delta=privacy.delta),
        confidence=confidence,
        delta=privacy.delta,
        canaries=canaries,
        method=method,
        partition=partition,
        sampling_rate=min(ear.rates),
        steps=len(ear.rates),
    )


def first_free_id(stream: Stream) -> int:
    """Return the smallest id above all ids of training and test records."""
    parts = [part.ids for each in stream for part in (each.train, each.test) if len(part)]
    return max(int(ids.max()) for ids in parts) + 1 if parts else 0


def with_canaries(stream: Stream, experience: int, ids: Tensor) -> Stream:
    """Return a stream in which one experience also has blank records; declared sizes do not change.

    Args:
        stream: stream of the real records.
        experience: index of the experience that gets the blank records.
        ids: (k,) ids of the blank records.
    """
    chosen = stream[experience]
    mixed = replace(chosen, train=joined(chosen, ids.to(chosen.train.ids.device)))
    return replace(stream, experiences=tuple(mixed if e is chosen else e for e in stream))


def joined(experience: Experience, ids: Tensor) -> Records:
    """Training records of the experience, with one blank record for each id.

    The declared size does not change.
    """
    train = experience.train
    n = len(ids)
    blank = train.task.synthetic(train.labels, experience.classes, torch.zeros_like(ids))
    return replace(
        train,
        inputs=joined_rows([train.inputs, train.inputs.new_zeros(n, *train.inputs.shape[1:])]),
        labels=torch.cat([train.labels, blank]),
        ids=torch.cat([train.ids, ids]),
    )


class Probed(nn.Module):
    """Model together with a probe.

    The probe has one number per canary, which the model's output does not use.
    """

    def __init__(self, model: nn.Module, canaries: int) -> None:
        super().__init__()
        self.model = model
        self.feature_size = getattr(model, "feature_size", 0)
        self.probe = nn.Embedding.from_pretrained(  # type: ignore[no-untyped-call]
            torch.zeros(canaries, 1), freeze=False
        )

    def forward(self, x: Tensor) -> Tensor:
        """Compute the logits of the model."""
        logits: Tensor = self.model(x)
        return logits

    def __getattr__(self, name: str) -> Any:
        """Look up other attributes, such as `features`, in the model."""
        try:
            return super().__getattr__(name)
        except AttributeError:
            return getattr(super().__getattr__("model"), name)


class Listener:
    """Callback that scores every canary by its coordinate of each released gradient.

    Args:
        partition: partition of the canaries; steps that do not use it are skipped.
        canaries: number of canaries.
    """

    def __init__(self, partition: str, canaries: int) -> None:
        self.partition = partition
        self.scores = torch.zeros(canaries, dtype=torch.float64)
        self.rates: list[float] = []

    def __call__(self, point: str, learner: Learner) -> None:
        """Add the log likelihood ratios of a step to the scores."""
        exposure = learner.curator.exposure if point == "step.done" else None
        if exposure is None or self.partition not in exposure.scope:
            return
        assert learner.private_sum is not None
        rate = exposure.scope[self.partition]
        expected = exposure.rate * exposure.pool_size
        released = learner.state[RELEASED].cpu() * expected / learner.curator.clip_norm
        ratios = log_likelihood_ratio(
            released, rate=rate, noise_multiplier=learner.private_sum.noise_multiplier
        )
        self.scores += ratios
        self.rates.append(rate)


@dataclass(frozen=True, kw_only=True)
class Audited(Strategy):
    """Strategy for an audit, with the losses of another strategy for real records.

    The loss of a canary depends only on its own coordinate of the probe.

        loss_i = loudness * probe[id_i - first]   for a canary; for others the inner strategy's loss

    State: the state of the inner strategy, and the probe's part of the last released gradient (m,).

    Args:
        inner: the inner strategy.
        first: id of the first canary.
        canaries: number of canaries, m.
        loudness: gradient norm before clipping.
    """

    inner: Strategy
    first: int
    canaries: int
    loudness: float

    def __post_init__(self) -> None:
        for fact in FACTS:
            object.__setattr__(self, fact, getattr(self.inner, fact))

    @property
    def name(self) -> str:
        """Name of the inner strategy."""
        return self.inner.name

    def refuse_task(self, task: Task) -> None:
        """Refuse the tasks that the inner strategy refuses."""
        self.inner.refuse_task(task)

    def uses(self, hook: str) -> bool:
        """Return True if the inner strategy overrides `hook`, and always for `after_step`."""
        return hook == "after_step" or self.inner.uses(hook)

    def small_model(self, *, input_shape: tuple[int, ...], num_classes: int) -> nn.Module | None:
        """Build the small model of the inner strategy, without a probe."""
        return self.inner.small_model(input_shape=input_shape, num_classes=num_classes)

    def init(self, spec: Spec) -> State:
        """Create the inner strategy's state, with the probe's part of the last release."""
        return self.inner.init(spec).declare(
            RELEASED, torch.zeros_like(spec.params["probe.weight"][:, 0]), "local"
        )

    def plan(self, experience: Experience) -> Plan:
        """Make the plan of the inner strategy, with the probe among the trained parameters.

        The names of the model's parameters get another prefix.
        """
        plan = self.inner.plan(experience)
        if plan.trainable is None:
            return plan
        return replace(
            plan, trainable=("probe.", *(f"model.{prefix}" for prefix in plan.trainable))
        )

    def begin_round(self, params: Params, state: State) -> State:
        """Call `begin_round` of the inner strategy."""
        return self.inner.begin_round(params, state)

    def losses(self, forward: Forward, batch: Batch, context: Context, state: State) -> Tensor:
        """Return (n,) losses of the inner strategy; a canary has the loss of the probe instead."""
        place = batch.ids - self.first
        canary = (place >= 0) & (place < self.canaries)
        probe = self.loudness * probed(forward, place.clamp(0, self.canaries - 1))
        return torch.where(canary, probe, self.inner.losses(forward, batch, context, state))

    def penalty(self, params: Params, state: State) -> Tensor | None:
        """Compute the penalty of the inner strategy."""
        return self.inner.penalty(params, state)

    def add_penalty_gradient(self, gradient: Params, params: Params, state: State) -> None:
        """Add the gradient of the inner strategy's penalty."""
        self.inner.add_penalty_gradient(gradient, params, state)

    def references(self, curator: "Curator", params: Params, state: State) -> tuple[Params, ...]:
        """Return the reference gradients of the inner strategy."""
        return self.inner.references(curator, params, state)

    def project(self, gradient: Params, references: tuple[Params, ...], state: State) -> Params:
        """Apply the projection of the inner strategy."""
        return self.inner.project(gradient, references, state)

    def after_step(
        self,
        before: Params,
        after: Params,
        gradient: Params,
        state: State,
        noise_variance: float = 0.0,
    ) -> State:
        """Store the probe's part of the release, and call the inner strategy's `after_step`."""
        heard = state.replace({RELEASED: gradient["probe.weight"][:, 0]})
        return self.inner.after_step(before, after, gradient, heard, noise_variance)

    def after_step_in_place(
        self,
        before: Params,
        after: Params,
        gradient: Params,
        state: State,
        noise_variance: float = 0.0,
    ) -> State:
        """Store the probe's part of the release, and then call the inner strategy's hook."""
        heard = state.replace({RELEASED: gradient["probe.weight"][:, 0]})
        return self.inner.after_step_in_place(before, after, gradient, heard, noise_variance)

    def remember(self, forward: Forward, batch: Batch, state: State) -> dict[str, Tensor]:
        """Compute the tensors that the inner strategy stores with each row."""
        return self.inner.remember(forward, batch, state)

    def after_experience(self, curator: "Curator", params: Params, state: State) -> State:
        """Call `after_experience` of the inner strategy."""
        return self.inner.after_experience(curator, params, state)

    def derive(self, state: State) -> State:
        """Compute the derived state of the inner strategy."""
        return self.inner.derive(state)

    def predict(self, forward: Forward, x: Tensor, context: Context, state: State) -> Tensor:
        """Compute the prediction of the inner strategy."""
        return self.inner.predict(forward, x, context, state)


def probed(forward: Forward, place: Tensor) -> Tensor:
    """Return (n,) values of the probe at the positions `place`.

    The values are outputs of a layer, so that every clipping method handles the probe.
    """
    probe = forward.module.get_submodule("probe")
    if forward.params is None:
        chosen: Tensor = probe(place[:, None])
    else:
        chosen = torch.func.functional_call(
            probe, {"weight": forward.params["probe.weight"]}, (place[:, None],)
        )
    return chosen[:, 0, 0]
