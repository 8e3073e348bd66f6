"""The learner and its one loop. Every strategy, client and privacy mode goes through here."""

import math
from collections.abc import Callable, Iterable, Sequence, Set
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Literal

import torch
from torch import Tensor, nn
from torch.optim import Optimizer
from torch.optim.lr_scheduler import LRScheduler

from perdure.contract.context import contexts, spec_of
from perdure.contract.forward import Forward
from perdure.contract.plan import Plan
from perdure.contract.state import State
from perdure.contract.strategy import Strategy
from perdure.curator.local_curator import LocalCurator
from perdure.data.experience import Experience, Stream
from perdure.data.records import Batch
from perdure.errors import ConfigError, StrategyError
from perdure.learner.checkpoint import (
    Position,
    Snapshot,
    Store,
    flatten_optimizer,
    load_optimizer,
    numbered,
)
from perdure.learner.noise_digest import NoiseDigestInputs, learning_rates, noise_digest
from perdure.learner.sanity_checks import (
    refuse_outputs,
    refuse_runaway,
    refuse_second_ledger,
    require_state,
)
from perdure.metrics import accuracy
from perdure.planning.exposure import Exposure, exposure, pool_size, split_steps
from perdure.privacy.private_sum import PrivateSum
from perdure.privacy.settings import Privacy
from perdure.queries.batch_gradients import with_penalty
from perdure.types import Params
from perdure.utils.denormals import flushed
from perdure.utils.seeding import derive

if TYPE_CHECKING:
    from perdure.adversarial.base import Attack
    from perdure.data.augmentation import Views

Callback = Callable[[str, "Learner"], None]
"""Called at every named point of the loop; the names are `POINTS`."""

POINTS = (
    "experience.begin",
    "block.begin",
    "step.sampled",
    "step.gradient",
    "step.done",
    "block.end",
    "experience.consolidated",
    "experience.end",
    "evaluated",
    "checkpoint.begin",
    "checkpoint.end",
    "ledger.before-append",
    "ledger.appended",
    "ledger.head-written",
    "noise.drawn",
)
"""Where a callback is called, and where the tests stop a run to see that it resumes to the same
bits.
"""


@dataclass(kw_only=True)
class Learner:
    """Trains one model on a stream, one experience after another.

    >>> optimizer = partial(torch.optim.Adam, lr=1e-3)
    >>> learner = Learner(model=model, strategy=EWC(strength=100.0), optimizer=optimizer)
    >>> matrix = learner.fit(stream)       # (T, T) accuracy in percent

    Args:
        model: a `perdure.models.classifier.Classifier`, or any module with a full-width head and
            `features`.
        strategy: how forgetting is fought.
        optimizer: from parameters to any torch optimiser that needs one gradient a step.
        scheduler: from the optimiser to a scheduler that is stepped after every step; None for a
            constant rate.
        epochs, iterations: length of an experience; give one.
        blocks: pieces an experience is done in; each is charged to the ledger as one, and ends with
            a checkpoint (in a federation: with a round).
        batch_size: new records a step.
        micro_batch_size: rows of one pass through the model, to bound memory; what is learnt and
            charged does not change, up to rounding.
        seed: of everything but private noise.
        device: where records and model live.
        privacy: None, or record-level differential privacy.
        adversary: an attack applied to every batch before its gradient (adversarial training).
        views: random versions of every record, averaged inside its loss (augmentation).
        precision: of the passes through the model while training; parameters, norms and sums stay
            in float32.
        reset_optimizer: begin every experience with a fresh optimiser.
        callbacks: called as callback(point, learner).
        client: number of the party, 0 when there is only one.
        owner: its name in the ledger.
        folder: where checkpoints, ledger and keys are kept; None to keep nothing on disk.
    """

    model: nn.Module
    strategy: Strategy
    optimizer: Callable[[Iterable[nn.Parameter]], Optimizer]
    scheduler: Callable[[Optimizer], LRScheduler] | None = None
    epochs: int | None = None
    iterations: int | None = None
    blocks: int = 1
    batch_size: int = 128
    micro_batch_size: int | None = None
    seed: int = 0
    device: str | torch.device = "cpu"
    privacy: Privacy | None = None
    adversary: "Attack | None" = None
    views: "Views | None" = None
    precision: Literal["float32", "bfloat16"] = "float32"
    reset_optimizer: bool = False
    callbacks: Sequence[Callback] = ()
    client: int = 0
    owner: str = "curator"
    folder: Path | None = None
    matrix: list[list[float]] = field(default_factory=list)

    def __post_init__(self) -> None:
        if (self.epochs is None) == (self.iterations is None):
            given = f"epochs={self.epochs}, iterations={self.iterations}"
            raise ConfigError.of(
                "length of an experience", given, "exactly one of epochs and iterations"
            )
        for name in ("epochs", "iterations", "blocks", "batch_size", "micro_batch_size"):
            value = getattr(self, name)
            if value is not None and value < 1:
                raise ConfigError.of(name, value, "1 or more")
        if self.precision not in ("float32", "bfloat16"):
            raise ConfigError.of("precision", self.precision, ("float32", "bfloat16"))
        if self.views and self.adversary:
            raise ConfigError.of(
                "views", self.views, "none with an adversary, which perturbs the record itself"
            )
        if type(self.model).__module__.startswith("opacus."):
            from perdure.privacy.opacus.migration import unwrapped

            self.model = unwrapped(self.model, known=not self.privacy or bool(self.privacy.spent))
        self.model.to(self.device)
        self._leaves = [param for param in self.model.parameters() if param.requires_grad]
        self.params: Params = {n: p for n, p in self.model.named_parameters() if p.requires_grad}
        self.forward = Forward(self.model)
        self.position = Position()
        self.state = State()
        self.mechanism: PrivateSum | None = None
        self._initial = {name: value.clone() for name, value in self.model.state_dict().items()}

    # ------------------------------------------------------------------ a whole stream

    def fit(self, stream: Stream) -> Tensor:
        """Train on every experience in turn and return the accuracy matrix (T, T) in percent.

        Row i is measured after experience i, on the test records of every experience. With a
        `folder`, a run that was stopped goes on where it was, to the bit-identical end; a stream
        that has grown since goes on with what is new.
        """
        self.prepare(stream)
        self.resume()
        for index in range(self.position.experience, len(stream)):
            self.begin(index)
            for block in self.remaining_blocks():
                self.train(block)
                self.save()
            self.finish()
            self.matrix.append(self.evaluate(stream))
            self._notify("evaluated")
            self.save()
        # of a stream that grew
        rows = [row + [math.nan] * (len(stream) - len(row)) for row in self.matrix]
        return torch.tensor(rows, dtype=torch.float64)

    def prepare(self, stream: Stream) -> None:
        """Lay out state, curator and, under privacy, the calibrated plan of the whole stream.

        Raises:
            ConfigError: for a model whose outputs are not one for every class.
            PrivacyError: for a private learner that has trained and keeps no folder: its ledger
                would begin anew.
        """
        if self.privacy and not self.folder:
            refuse_second_ledger(self.position)
        self.stream = stream.to(self.device)
        self.context = contexts(self.stream, self.device)
        self.position = Position()
        self.matrix = []
        initial = {name: value.detach().clone() for name, value in self.params.items()}
        refuse_outputs(self.model, self.stream)
        spec = spec_of(self.model, initial, stream, private=self.privacy is not None)
        self.state = require_state("init", self.strategy, self.strategy.init(spec))
        if self.privacy:
            from perdure.learner.private_setup import private_mechanism

            self.mechanism = private_mechanism(self, self._notify)
        self.curator = LocalCurator(
            seed=self.seed,
            client=self.client,
            batch_size=self.batch_size,
            mechanism=self.mechanism,
            micro_batch_size=self.micro_batch_size,
        )
        self._new_optimizer()

    # ------------------------------------------------------------------ one experience

    def begin(self, index: int) -> None:
        """Open experience `index`.

        Called again after a resume in its middle, it only reopens the records.
        """
        experience = self.stream[index]
        plan = self.plan(experience)
        if not self.position.begun or self.position.experience != index:
            self.position = Position(experience=index, begun=True)
            self._start_afresh(plan)
        context = self.context(index, declared_size=experience.train.declared_size)
        self.curator.open(self.stream.experiences[: index + 1], plan, context, self.forward)
        self._select(plan)
        self._notify("experience.begin")

    def plan(self, experience: Experience) -> Plan:
        """Plan of the experience by the strategy."""
        return self.strategy.plan(experience)

    def exposure(self, experiences: Sequence[Experience], left: Set[str] = frozenset()) -> Exposure:
        """Exposure in the last of `experiences`, without the partitions `left`."""
        rate, bands = (
            (self.privacy.sampling_rate, self.privacy.bands) if self.privacy else (None, None)
        )
        plan = self.plan(experiences[-1])
        return exposure(
            experiences, plan, batch_size=self.batch_size, rate=rate, bands=bands, left=left
        )

    def steps_of(self, experiences: Sequence[Experience], left: Set[str] = frozenset()) -> int:
        """Optimiser steps in the last of `experiences`; a function of declared sizes only."""
        plan = self.plan(experiences[-1])
        if self.iterations is not None or not plan.train:
            return (self.iterations or 0) if plan.train else 0
        size, _ = pool_size(experiences, plan, left)
        rate = self.privacy.sampling_rate if self.privacy else None
        return math.ceil(
            (self.epochs or 1) * (1 / rate if rate else max(1.0, size / self.batch_size))
        )

    def steps(self, index: int) -> int:
        """Optimiser steps in experience `index`."""
        left = self.mechanism.schedule.left_in(index) if self.mechanism else frozenset()
        return self.steps_of(self.stream.experiences[: index + 1], left)

    def block(self, number: int, of: int) -> range:
        """Steps of piece `number` when the current experience is done in `of` pieces."""
        return split_steps(self.steps(self.position.experience), of)[number]

    def remaining_blocks(self) -> list[range]:
        """Blocks of the current experience that are not done yet."""
        all_blocks = split_steps(self.steps(self.position.experience), self.blocks)
        return [block for block in all_blocks if block.stop > self.position.step]

    @flushed()
    def train(self, steps: range) -> None:
        """THE loop: sample, perturb, gradient, penalty, project, step, follow.

        Args:
            steps: a block of the current experience; charged to the ledger as one.
        """
        curator = self.curator
        strategy = self.strategy
        params = self._trained
        self._notify("block.begin")
        curator.reserve(steps, self._start())
        self.model.train()
        for step in steps:
            self._seed_layers(step)
            drawn = batch = curator.sample(step)
            self._notify("step.sampled")
            if self.adversary:
                batch = self._perturbed(batch, step)
            if self.views:
                batch = self.views.attach(batch, self._seed_of("views", step))
            references = (
                strategy.references(curator, params, self.state) if self._uses["references"] else ()
            )
            gradient = curator.gradient(self._losses, params, batch, step)
            self._notify("step.gradient")
            if self._observes:
                curator.observe(drawn, self._remember)
            penalty = strategy.penalty(self.params, self.state) if self._uses["penalty"] else None
            total = with_penalty(gradient, penalty, params)
            if self._uses["project"]:
                total = strategy.project(total, references, self.state)
            self._step(total, gradient)
            self.position.step = step + 1
            self._notify("step.done")
        self._notify("block.end")

    @flushed()
    def finish(self) -> None:
        """Consolidate, offer the records to memory and go to the next experience.

        Raises:
            RunawayError: where training ran away, and parameters are no numbers any more.
        """
        refuse_runaway(self.params, self.strategy, self.position.experience)
        self.model.eval()
        self.curator.store(self._remember)
        detached = {name: value.detach().clone() for name, value in self.params.items()}
        new = self.strategy.after_experience(self.curator, detached, self.state)
        self.state = self.strategy.derive(require_state("after_experience", self.strategy, new))
        self._notify("experience.consolidated")
        self.curator.close()
        self.position = Position(experience=self.position.experience + 1)
        self._notify("experience.end")

    # ------------------------------------------------------------------ evaluation

    def predictor(self, index: int, *, after: int) -> Callable[[Tensor], Tensor]:
        """Logits of inputs of experience `index` as predicted after experience `after`."""
        seen_from = index if self.stream.scenario == "task" else after
        context = self.context(seen_from)
        self.model.eval()
        return lambda x: self.strategy.predict(self.forward, x, context, self.state)

    def evaluate(self, stream: Stream, batch_size: int = 2048) -> list[float]:
        """Accuracy in percent on the test records of every experience; `prepare` comes first."""
        after = max(0, self.position.experience - 1)
        with torch.no_grad():
            return [
                accuracy(
                    self.predictor(e.index, after=after), e.test.inputs, e.test.labels, batch_size
                )
                for e in stream.to(self.device)
            ]

    # ------------------------------------------------------------------ stopping and going on

    def snapshot(self) -> Snapshot:
        """Copy of everything needed to go on; memory rows apart, because they are private."""
        moments, facts = flatten_optimizer(self._optimizer)
        live = {f"model.{n}": t for n, t in self.model.state_dict().items()}
        live |= {f"state.{n}": t for n, t in self.state.items()} | moments
        tensors = {name: value.detach().clone() for name, value in live.items()}
        private, memory = self.curator.snapshot()
        facts |= {
            "position": vars(self.position),
            "matrix": self.matrix,
            "memory": memory,
            "scheduler": self._scheduler.state_dict() if self._scheduler else None,
            "clip_norm": self.mechanism.clip_norm if self.mechanism else None,
        }
        return Snapshot(tensors=tensors, private=private, facts=facts)

    def restore(self, snapshot: Snapshot) -> None:
        """Go back to where `snapshot` was taken; call `prepare` first."""
        cut = {
            n.removeprefix("model."): t
            for n, t in snapshot.tensors.items()
            if n.startswith("model.")
        }
        self.model.load_state_dict(cut)
        states = {
            n.removeprefix("state."): t
            for n, t in snapshot.tensors.items()
            if n.startswith("state.")
        }
        self.state = self.state.replace(
            {name: value.to(self.device) for name, value in states.items()}
        )
        facts = snapshot.facts
        self.position = Position(**facts["position"])
        self.matrix = [list(row) for row in facts["matrix"]]
        self.curator.restore(snapshot.private, facts["memory"], self.device)
        if self.mechanism:
            self.mechanism.clip_norm = facts["clip_norm"]
        self._select(self.plan(self.stream[min(self.position.experience, len(self.stream) - 1)]))
        load_optimizer(self._optimizer, snapshot.tensors, facts)
        if self._scheduler and facts["scheduler"]:
            self._scheduler.load_state_dict(numbered(facts["scheduler"]))

    def save(self) -> None:
        """Write a checkpoint, when there is a folder."""
        if self.folder:
            self._notify("checkpoint.begin")
            store = Store(self.folder)
            store.save(max([*store.numbers(), 0]) + 1, self.snapshot())
            self._notify("checkpoint.end")

    def resume(self) -> bool:
        """Go on from the last checkpoint in the folder, if there is one."""
        snapshot = Store(self.folder).load() if self.folder else None
        if snapshot:
            self.restore(snapshot)
        return snapshot is not None

    # ------------------------------------------------------------------ inside

    def _losses(self, forward: Forward, batch: Batch) -> Tensor:
        def losses(rows: Batch) -> Tensor:
            return self.strategy.losses(forward, rows, self.curator.context, self.state)

        with torch.autocast(
            batch.inputs.device.type, torch.bfloat16, enabled=self.precision == "bfloat16"
        ):
            return (self.views.losses(losses, batch) if self.views else losses(batch)).float()

    def _remember(self, forward: Forward, batch: Batch) -> Params:
        return self.strategy.remember(forward, batch, self.state)

    def _step(self, total: Params, gradient: Params) -> None:
        before = (
            {n: p.detach().clone() for n, p in self._trained.items()}
            if self._uses["after_step"]
            else {}
        )
        if before:
            # an optimiser may write into .grad
            gradient = {name: value.clone() for name, value in gradient.items()}
        for name, param in self._trained.items():
            param.grad = total[name]
        self._optimizer.step()
        if self._scheduler:
            self._scheduler.step()
        if before:
            after = {name: param.detach() for name, param in self._trained.items()}
            noise = self.curator.noise_variance
            self.state = self.strategy.after_step(before, after, gradient, self.state, noise)

    def _perturbed(self, batch: Batch, step: int) -> Batch:
        """Each record's own worst case at the present parameters.

        It is found on an unhooked copy of the model.
        """
        fixed = Forward(self.model, {name: value.detach() for name, value in self.params.items()})
        place = torch.Generator().manual_seed(self._seed_of("adversary", step))

        def losses(x: Tensor) -> Tensor:
            return self._losses(fixed, Batch.from_tensors(batch.tensors() | {"inputs": x}))

        assert self.adversary is not None
        inputs = self.adversary.perturb(losses, batch.inputs, generator=place)
        return Batch.from_tensors(batch.tensors() | {"inputs": inputs})

    def _select(self, plan: Plan) -> None:
        prefixes = plan.trainable
        self._trained = {
            n: p for n, p in self.params.items() if prefixes is None or n.startswith(prefixes)
        }
        if not self._trained:
            raise StrategyError(
                f"no parameter begins with {prefixes}; the model trains {', '.join(self.params)}"
            )
        for param in self.params.values():
            param.grad = None  # the optimiser must not go on with what an earlier experience left
        hooks = ("references", "penalty", "project", "after_step")
        self._uses = {hook: self.strategy.uses(hook) for hook in hooks}
        self._uses["penalty"] &= plan.applies_penalty
        self._observes = plan.memory is not None and plan.memory.update == "step"
        self._stochastic = any(
            isinstance(m, nn.modules.dropout._DropoutNd) for m in self.model.modules()
        )

    def _start_afresh(self, plan: Plan) -> None:
        if plan.restart:
            self.model.load_state_dict(self._initial)
        if plan.restart or self.reset_optimizer:
            self._new_optimizer()

    def _new_optimizer(self) -> None:
        self._optimizer = self.optimizer(self._leaves)
        self._scheduler = self.scheduler(self._optimizer) if self.scheduler else None

    def _seed_layers(self, step: int) -> None:
        """Dropout draws from torch's global generator: give it a place of its own in every step."""
        if self._stochastic:
            torch.manual_seed(self._seed_of("layers", step))

    def _seed_of(self, what: str, step: int) -> int:
        """Seed of what records draw at random in a step.

        Secret under privacy (see `PrivateSum.secret`).
        """
        seed = self.mechanism.secret(what, step) if self.mechanism else self.seed
        return derive(seed, what, self.client, self.position.experience, step)

    def _start(self) -> str:
        """Digest of all that determines the next steps apart from the records.

        Only needed under privacy.
        """
        if self.mechanism is None:
            return ""
        rates = []
        if self.scheduler:
            steps = sum(self.steps(index) for index in range(self.position.experience + 1))
            rates = learning_rates(self.optimizer, self.scheduler, steps)
        inputs = NoiseDigestInputs(
            snapshot=self.snapshot(),
            strategy=self.strategy,
            plan=self.plan(self.stream[self.position.experience]),
            exposures=self.curator.exposures,
            model=self.model,
            params=self.params,
            trained=self._trained,
            state=self.state,
            losses=self._losses,
            synthetic=self.curator.synthetic,
            optimizer=self._optimizer,
            scheduler=self._scheduler,
            rates=rates,
            adversary=self.adversary,
            views=self.views,
            seed=self.seed,
            precision=self.precision,
            micro_batch_size=self.micro_batch_size,
            device=str(self.device),
            stream=self.stream,
        )
        return noise_digest(inputs)

    def _notify(self, point: str) -> None:
        for callback in self.callbacks:
            callback(point, self)
