"""A perdure strategy as a plugin of an Avalanche training loop (`perdure.avalanche.as_plugin`).

Avalanche draws the batches, runs the model and steps the optimiser. A `Session` holds records,
memory and state, and calls the hooks of the strategy.
"""

from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn

from perdure.avalanche.benchmarks import from_avalanche, task_labels
from perdure.contract.forward import Forward
from perdure.contract.plan import Plan
from perdure.contract.state import State
from perdure.contract.strategy import Strategy
from perdure.curator.sampling import concat_new_and_stored
from perdure.data.experience import Experience
from perdure.data.records import Batch
from perdure.errors import ConfigError, PrivacyError, StrategyError
from perdure.learner.session import Session
from perdure.types import Params
from perdure.utils.finite_outputs import finite_outputs
from perdure.utils.modules import evaluating, trainable_parameters


class StrategyPlugin:
    """Avalanche plugin that runs a strategy; made by `perdure.avalanche.as_plugin`.

    Avalanche finds callbacks by name, so this class needs no base class of Avalanche.

    Args:
        strategy: the strategy.
        benchmark: the Avalanche benchmark; needed only if the experiences have no reference to it.
        seed: seed for the random choices of the memory.
    """

    supports_distributed = False

    def __init__(self, strategy: Strategy, *, benchmark: Any = None, seed: int = 0) -> None:
        self.strategy = strategy
        self._benchmark = benchmark
        self._seed = seed
        self._session: Session | None = None
        self._plan = Plan()
        self._memory_apart = False
        self._pool: Batch | None = None
        self._references: tuple[Params, ...] = ()

    def __repr__(self) -> str:
        return f"as_plugin({self.strategy!r})"

    @property
    def state(self) -> State:
        """Tensors that the strategy keeps between steps and experiences."""
        return self.session.state

    @property
    def session(self) -> Session:
        """Session with records, memory and state of the strategy.

        Raises:
            ConfigError: if no experience was trained yet.
        """
        if self._session is None:
            raise ConfigError(
                "the plugin was not trained on any experience yet; call train() of the Avalanche "
                "strategy first"
            )
        return self._session

    @property
    def batch(self) -> Batch:
        """Rows of the current mini-batch: first Avalanche's rows, then rows of memory."""
        return self._batch

    # ------------------------------------------------------------------ an experience

    def after_train_dataset_adaptation(self, template: Any, **_: Any) -> None:
        """Open the experience; if the plan uses a pool of its own, give its rows to Avalanche.

        Raises:
            ConfigError: if experiences are out of order.
        """
        session = self._session = self._session or self._open_session(template)
        index = template.experience.logging().current_experience
        if index != session.position.experience:
            expected = (
                f"{session.position.experience}, because each experience is trained once and in "
                "order"
            )
            raise ConfigError.of("experience", index, expected)
        plan = self._plan = session.training.of(session.stream[index])
        if session.open(index) and plan.restart:
            template.make_optimizer(reset_optimizer_state=True)
        pooled = plan.memory is not None and plan.memory.use == "pooled"
        self._memory_apart = plan.memory is not None and not pooled
        self._pool = None
        if plan.pool != "experience" or pooled:
            _refuse_others_with_rows(template, self.strategy, session.stream[index])
            rows = session.curator.raw("Avalanche draws the batches")
            self._pool = rows.take(~rows.from_memory) if self._memory_apart else rows
            template.adapted_dataset = _dataset(self._pool, self._tasks)

    def before_training_exp(self, template: Any, **_: Any) -> None:
        """Begin the only round, and skip the epochs if the plan uses no gradient.

        Raises:
            ConfigError: if parameters of the model changed their shape.
        """
        own = trainable_parameters(template.model)
        shapes = {name: value.shape for name, value in own.items()}
        if shapes != {name: value.shape for name, value in self.session.params.items()}:
            name = type(template.model).__name__
            raise ConfigError.of(
                "model",
                name,
                "a model whose parameters do not change their shapes (no growing head)",
            )
        self.session.begin_round()
        if not self._plan.train:
            template.stop_training()

    def after_training_exp(self, template: Any, **_: Any) -> None:
        """Offer the records to memory, and consolidate the experience."""
        with evaluating(template.model):
            self.session.consolidate()

    # ------------------------------------------------------------------ a step

    def before_forward(self, template: Any, **_: Any) -> None:
        """Add stored rows to Avalanche's mini-batch, and ask for reference gradients."""
        session = self.session
        self._batch = self._rows(template)
        if self._memory_apart:
            drawn = session.held.sample(session.position.step)
            self._rehearse(template, drawn.take(drawn.from_memory))
        self._references = session.references()

    def before_backward(self, template: Any, **_: Any) -> None:
        """Replace the criterion's loss by the strategy's own loss, and add the penalty to it."""
        session = self.session
        if session.uses["losses"]:
            given = _Given(template.model, template.mb_x, template.mb_output)
            template.loss = session.losses(given, self._batch).mean()
        with torch.no_grad():
            penalty = session.penalty()
        if penalty is not None:
            template.loss = template.loss + penalty

    def after_backward(self, template: Any, **_: Any) -> None:
        """Add the gradient of the penalty and apply the projection, as a learner does."""
        session = self.session
        gradient = {
            n: torch.zeros_like(p) if p.grad is None else p.grad for n, p in session.trained.items()
        }
        session.observe(self._batch)
        session.set_gradients(gradient, self._references)
        for name, param in session.params.items():
            if name not in session.trained:
                param.grad = None

    def after_update(self, template: Any, **_: Any) -> None:
        """Update the strategy's state after the optimiser's step."""
        self.session.follow_step()

    # ------------------------------------------------------------------ evaluation

    def after_eval_forward(self, template: Any, **_: Any) -> None:
        """Replace the model's output by the strategy's prediction."""
        session = self._session
        if session is None:
            return
        index = max(0, session.position.experience - (not session.position.begun))
        if session.stream.scenario == "task":
            index = template.experience.logging().current_experience
        given = _Given(template.model, template.mb_x, template.mb_output)
        context = session.context(index)
        outputs = self.strategy.predict(given, template.mb_x, context, session.state)
        template.mb_output = finite_outputs(outputs)

    # ------------------------------------------------------------------ inside

    def _open_session(self, template: Any) -> Session:
        _check(template, self.strategy)
        benchmark = self._benchmark or getattr(
            template.experience.logging().origin_stream, "benchmark", None
        )
        if benchmark is None:
            raise ConfigError(
                "the experience has no reference to its benchmark; call as_plugin(strategy, "
                "benchmark=benchmark)"
            )
        stream = from_avalanche(benchmark)
        for part, experience in zip(benchmark.streams["train"], stream, strict=True):
            if {int(label) for label in part.dataset.targets.uniques} != set(experience.classes):
                raise ConfigError(
                    "the labels of each task start at 0, so tasks share outputs; allowed: labels "
                    "that are unique over all tasks, for one head over all classes"
                )

        session = Session(
            model=template.model,
            strategy=self.strategy,
            stream=stream,
            epochs=template.train_epochs,
            batch_size=template.train_mb_size,
            seed=self._seed,
            device=template.device,
            warm_start=True,  # Avalanche has the loop, and decides what it trains
        )
        self._tasks = torch.tensor(task_labels(benchmark), device=template.device)
        return session

    def _rows(self, template: Any) -> Batch:
        """Build the batch for the rows that Avalanche drew.

        Avalanche does not say which records the new rows are, so each gets an id that is unique in
        the step.
        """
        x = template.mb_x
        y = template.mb_y
        if self._pool is not None:
            return replace(self._pool.take(template.mbatch[2]), inputs=x)
        return Batch(
            inputs=x,
            labels=y,
            ids=-1 - torch.arange(len(y), device=y.device),
            tasks=torch.full_like(y, self.session.position.experience),
            from_memory=torch.zeros_like(y, dtype=torch.bool),
            valid=torch.ones_like(y, dtype=torch.bool),
        )

    def _rehearse(self, template: Any, back: Batch) -> None:
        new = self._batch
        if len(back):
            self._batch = concat_new_and_stored(new, back)
            labels = [self._tasks[self._batch.tasks]] if len(template.mbatch) > 2 else []
            template.mbatch = [self._batch.inputs, self._batch.labels, *labels]
        self.session.held.set_memory_share(len(back) / (len(new) + len(back)))


class _Given(Forward):
    """Model that returns outputs which Avalanche has already computed for one input."""

    def __init__(self, module: nn.Module, x: Tensor, output: Tensor) -> None:
        super().__init__(module)
        self._x = x
        self._output = output

    def __call__(self, x: Tensor) -> Tensor:
        return self._output if x is self._x else super().__call__(x)


def _check(template: Any, strategy: Strategy) -> None:
    """Refuse settings of an Avalanche template that the plugin does not support."""
    if any(
        type(part).__module__.startswith("opacus.") for part in (template.model, template.optimizer)
    ):
        raise PrivacyError(
            "a plugin has no differential privacy, because Avalanche does no Poisson sampling; "
            "train the benchmark with Learner(privacy=...) on from_avalanche(benchmark)"
        )
    _refuse_heads_of_tasks(template.model)
    criterion = template._criterion
    if strategy.uses("losses") and not _plain(criterion):
        allowed = "CrossEntropyLoss() without weight, label smoothing or another reduction"
        raise ConfigError.of(
            "criterion", criterion, f"{allowed}, because {strategy.name} has its own loss"
        )
    others = [part.strategy for part in template.plugins if isinstance(part, StrategyPlugin)]
    rivals = [other.name for other in others if other.uses("losses") and strategy.uses("losses")]
    if len(rivals) > 1:
        raise StrategyError(
            f"{' and '.join(rivals)} both override losses(); allowed: at most one such strategy; "
            "remove one of them"
        )


def _refuse_heads_of_tasks(model: nn.Module) -> None:
    """Refuse a model that needs task labels in addition to inputs.

    Raises:
        ConfigError: names the part of the model.
    """
    from avalanche.models import MultiTaskModule

    for part in model.modules():
        if isinstance(part, MultiTaskModule):
            allowed = (
                "one head with an output for every class, such as nn.Linear(64, num_classes): a "
                "strategy masks the classes of other tasks by itself"
            )
            raise ConfigError.of("model", f"one with {type(part).__name__}", allowed)


def _refuse_others_with_rows(template: Any, strategy: Strategy, experience: Experience) -> None:
    """Refuse plugins that add rows to batches if the strategy draws from a pool of its own.

    Raises:
        ConfigError: names both.
    """
    for part in template.plugins:
        if isinstance(part, StrategyPlugin):
            if part.strategy is strategy:
                continue
            plan = part.strategy.plan(experience)
            brings = plan.memory is not None or plan.pool != "experience"
            name = part.strategy.name
        else:
            brings = hasattr(part, "storage_policy")
            name = type(part).__name__
        if brings:
            raise ConfigError.of(
                "plugins",
                f"{strategy.name} together with {name}",
                f"{strategy.name} without {name}, because {strategy.name} chooses the rows of a "
                "batch itself; remove one of them",
            )


def _plain(criterion: Any) -> bool:
    if type(criterion) is not nn.CrossEntropyLoss:
        return False
    return (
        criterion.weight is None and criterion.reduction == "mean" and not criterion.label_smoothing
    )


def _dataset(rows: Batch, labels: Tensor) -> Any:
    """Build an Avalanche data set of (input, label, position, task label) from rows."""
    from avalanche.benchmarks.utils import AvalancheDataset
    from avalanche.benchmarks.utils.data_attribute import DataAttribute, TaskLabels
    from torch.utils.data import TensorDataset

    labels = labels[rows.tasks]
    rows = rows.map(lambda t: t.cpu())
    marks = [DataAttribute(rows.labels.tolist(), "targets"), TaskLabels(labels.tolist())]
    return AvalancheDataset(
        [TensorDataset(rows.inputs, rows.labels, torch.arange(len(rows)))], data_attributes=marks
    )


def as_plugin(strategy: Strategy, *, benchmark: Any = None, seed: int = 0) -> StrategyPlugin:
    """Turn any strategy, also a `Combine`, into a plugin of an Avalanche `SupervisedTemplate`.

    >>> plugin = as_plugin(EWC(strength=100.0))
    >>> template = SupervisedTemplate(..., plugins=[plugin])  # doctest: +SKIP

    Avalanche still draws the batches, applies its train transforms, runs the model and makes the
    optimiser steps.

    - Loss: if the strategy has its own loss (Replay, LwF), this loss replaces the loss so far: that
      of the criterion, which must be `CrossEntropyLoss()`, and everything that earlier plugins
      added. So put this plugin first in the list. Other strategies leave the criterion unchanged.
      Penalties are added to the loss that Avalanche shows.
    - Memory: perdure holds the stored rows and adds them to the mini-batch, so they count in the
      training metrics of Avalanche, as with its own replay.
    - Prediction: in evaluation, `predict` of the strategy replaces the output. A class that may not
      be predicted yet has the logit -1e9, so the *loss* of Avalanche on later experiences is about
      1e9; the accuracy is right.
    - Pools: if the strategy trains on all experiences or on memory (Joint, GDumb, iCaRL), the
      plugin replaces the data set of the experience by these rows. If it trains from the initial
      parameters, model and optimiser state are reset; if it uses no gradients, the epochs are
      skipped.
    - Fisher information, memory and pooled rows use the stream of `from_avalanche`: all inputs are
      in memory, after the eval transforms.

    Guarantee: none. A plugin has no differential privacy, because Avalanche does no Poisson
    sampling.

    Args:
        strategy: a perdure strategy.
        benchmark: the Avalanche benchmark; needed only if the experiences have no reference to it.
        seed: seed for the random choices of the memory.

    Raises:
        ConfigError: when training begins, if experiences are not in order, if the labels of each
            task start at 0, if the head grows, asks for task labels or has no output for some
            class, if the criterion would be ignored, or if another plugin has a memory and the
            plan of the strategy has its own pool.
        DataError: when training begins, if the data have no targets.
        PrivacyError: if the model or optimiser belongs to Opacus.
    """
    return StrategyPlugin(strategy, benchmark=benchmark, seed=seed)
