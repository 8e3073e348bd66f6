"""A perdure strategy as a plugin of an Avalanche training loop.

`perdure.avalanche.plugin.as_plugin` makes one.

Avalanche draws the batches, runs the model and steps the optimiser. A learner stands beside it
without a loop of its own: it holds records, memory and state, and answers what the strategy's hooks
ask.
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
from perdure.curator.sampling import beside
from perdure.data.records import Batch
from perdure.errors import ConfigError, PrivacyError, StrategyError
from perdure.learner.learner import Learner
from perdure.queries.batch_gradients import with_penalty
from perdure.types import Params
from perdure.utils.modules import evaluating


class StrategyPlugin:
    """See `perdure.avalanche.plugin.as_plugin`.

    Avalanche finds callbacks by name, so this needs no base class of Avalanche's.
    """

    supports_distributed = False

    def __init__(self, strategy: Strategy, *, benchmark: Any = None, seed: int = 0) -> None:
        self.strategy = strategy
        self._benchmark = benchmark
        self._seed = seed
        self._learner: Learner | None = None
        self._plan = Plan()
        self._beside = False
        self._pool: Batch | None = None
        self._penalty: Tensor | None = None
        self._references: tuple[Params, ...] = ()
        self._gradient: Params = {}
        self._before: Params = {}

    def __repr__(self) -> str:
        return f"as_plugin({self.strategy!r})"

    @property
    def state(self) -> State:
        """What the strategy remembers."""
        return self.learner.state

    @property
    def learner(self) -> Learner:
        """What holds records, memory and state.

        Raises:
            ConfigError: before the first experience.
        """
        if self._learner is None:
            raise ConfigError(
                "the plugin has met no experience yet; call train() of the Avalanche strategy first"
            )
        return self._learner

    # ------------------------------------------------------------------ an experience

    def after_train_dataset_adaptation(self, template: Any, **_: Any) -> None:
        """Open the experience.

        Hand Avalanche the rows of a plan that does not draw from the experience alone.
        """
        learner = self._learner = self._learner or self._prepared(template)
        index = template.experience.logging().current_experience
        if index != learner.position.experience:
            expected = f"{learner.position.experience}: each once, in order"
            raise ConfigError.of("experience", index, expected)
        self._plan = plan = learner.plan(learner.stream[index])
        learner.begin(index)
        self._beside = plan.memory is not None and plan.memory.use != "pooled"
        self._pool = None
        if plan.pool != "experience" or (plan.memory and plan.memory.use == "pooled"):
            rows = learner.curator.raw("Avalanche draws the batches")
            self._pool = rows.take(~rows.from_memory) if self._beside else rows
            template.adapted_dataset = _dataset(self._pool, self._tasks)

    def before_training_exp(self, template: Any, **_: Any) -> None:
        """Skip the epochs of a plan that takes no gradient."""
        shapes = {
            name: value.shape
            for name, value in template.model.named_parameters()
            if value.requires_grad
        }
        if shapes != {name: value.shape for name, value in self.learner.params.items()}:
            raise ConfigError.of(
                "model",
                type(template.model).__name__,
                "one whose parameters stay: no growing heads",
            )
        if not self._plan.train:
            template.stop_training()

    def after_training_exp(self, template: Any, **_: Any) -> None:
        """Offer the records to memory and consolidate."""
        with evaluating(template.model):
            self.learner.finish()

    # ------------------------------------------------------------------ a step

    def before_forward(self, template: Any, **_: Any) -> None:
        """Put what memory brings back beside Avalanche's rows, and ask for reference gradients."""
        learner = self.learner
        self._batch = self._rows(template)
        if self._beside:
            drawn = learner.curator.sample(learner.position.step)
            self._rehearse(template, drawn.take(drawn.from_memory))
        if learner._uses["references"]:
            self._references = self.strategy.references(
                learner.curator, learner._trained, learner.state
            )

    def before_backward(self, template: Any, **_: Any) -> None:
        """Give the strategy's own loss in place of the criterion's, and show the penalty."""
        learner = self.learner
        if self.strategy.uses("losses"):
            given = _Given(template.model, template.mb_x, template.mb_output)
            template.loss = learner._losses(given, self._batch).mean()
        if learner._uses["penalty"]:
            self._penalty = self.strategy.penalty(learner.params, learner.state)
        if self._penalty is not None:
            template.loss = template.loss + self._penalty.detach()

    def after_backward(self, template: Any, **_: Any) -> None:
        """Add the penalty's gradient and project, as the learner does."""
        learner = self.learner
        gradient = {
            n: torch.zeros_like(p) if p.grad is None else p.grad
            for n, p in learner._trained.items()
        }
        if learner._observes:
            learner.curator.observe(self._batch, learner._remember)
        if learner._uses["after_step"]:
            self._gradient = {name: value.clone() for name, value in gradient.items()}
        total = with_penalty(gradient, self._penalty, learner._trained)
        if learner._uses["project"]:
            total = self.strategy.project(total, self._references, learner.state)
        for name, param in learner.params.items():
            param.grad = total.get(name)
        self._penalty = None

    def before_update(self, template: Any, **_: Any) -> None:
        """Keep the parameters for a strategy that follows the path."""
        if self.learner._uses["after_step"]:
            self._before = {
                name: param.detach().clone() for name, param in self.learner._trained.items()
            }

    def after_update(self, template: Any, **_: Any) -> None:
        """Follow the path."""
        learner = self.learner
        if learner._uses["after_step"]:
            after = {name: param.detach() for name, param in learner._trained.items()}
            learner.state = self.strategy.after_step(
                self._before, after, self._gradient, learner.state
            )
        learner.position.step += 1

    # ------------------------------------------------------------------ evaluation

    def after_eval_forward(self, template: Any, **_: Any) -> None:
        """Put the strategy's prediction in place of the model's output."""
        learner = self._learner
        if learner is None:
            return
        after = learner.position.experience - (not learner.position.begun)
        index = (
            template.experience.logging().current_experience
            if learner.stream.scenario == "task"
            else max(0, after)
        )
        given = _Given(template.model, template.mb_x, template.mb_output)
        template.mb_output = self.strategy.predict(
            given, template.mb_x, learner.context(index), learner.state
        )

    # ------------------------------------------------------------------ inside

    def _prepared(self, template: Any) -> Learner:
        _check(template, self.strategy)
        benchmark = self._benchmark or getattr(
            template.experience.logging().origin_stream, "benchmark", None
        )
        if benchmark is None:
            raise ConfigError(
                "the experience does not know its benchmark; say as_plugin(strategy, "
                "benchmark=benchmark)"
            )
        stream = from_avalanche(benchmark)
        for part, experience in zip(benchmark.streams["train"], stream, strict=True):
            if {int(label) for label in part.dataset.targets.uniques} != set(experience.classes):
                raise ConfigError(
                    "tasks count their classes from zero; allowed: labels of one head over "
                    "all classes"
                )

        def optimizer(_: object) -> Any:
            if learner.position.begun:  # a plan that starts afresh
                template.make_optimizer(reset_optimizer_state=True)
            return template.optimizer

        learner = Learner(
            model=template.model,
            strategy=self.strategy,
            optimizer=optimizer,
            epochs=template.train_epochs,
            batch_size=template.train_mb_size,
            seed=self._seed,
            device=template.device,
        )
        learner.prepare(stream)
        self._tasks = torch.tensor(task_labels(benchmark), device=template.device)
        return learner

    def _rows(self, template: Any) -> Batch:
        """The mini-batch as Avalanche drew it.

        Of the experience's own rows it does not say which records they are: each has an id of its
        own in the step.
        """
        x = template.mb_x
        y = template.mb_y
        if self._pool is not None:
            return replace(self._pool.take(template.mbatch[2]), inputs=x)
        return Batch(
            inputs=x,
            labels=y,
            ids=-1 - torch.arange(len(y), device=y.device),
            tasks=torch.full_like(y, self.learner.position.experience),
            from_memory=torch.zeros_like(y, dtype=torch.bool),
            valid=torch.ones_like(y, dtype=torch.bool),
        )

    def _rehearse(self, template: Any, back: Batch) -> None:
        new = self._batch
        curator = self.learner.curator
        if len(back):
            self._batch = beside(new, back)
            labels = [self._tasks[self._batch.tasks]] if len(template.mbatch) > 2 else []
            template.mbatch = [self._batch.inputs, self._batch.labels, *labels]
        curator.context = replace(curator.context, memory_share=len(back) / (len(new) + len(back)))


class _Given(Forward):
    """The model, whose output at one input is known already."""

    def __init__(self, module: nn.Module, x: Tensor, output: Tensor) -> None:
        super().__init__(module)
        self._x = x
        self._output = output

    def __call__(self, x: Tensor) -> Tensor:
        return self._output if x is self._x else super().__call__(x)


def _check(template: Any, strategy: Strategy) -> None:
    """Refuse what the plugin would carry out wrongly."""
    if any(
        type(part).__module__.startswith("opacus.") for part in (template.model, template.optimizer)
    ):
        raise PrivacyError(
            "a plugin carries no differential privacy, since Avalanche draws no Poisson sample; "
            "train the benchmark with Learner(privacy=...) on from_avalanche(benchmark)"
        )
    criterion = template._criterion
    if strategy.uses("losses") and not _plain(criterion):
        allowed = "CrossEntropyLoss() without weight, label smoothing or another reduction"
        raise ConfigError.of(
            "criterion", criterion, f"{allowed}: {strategy.name} has a loss of its own"
        )
    others = [part.strategy for part in template.plugins if isinstance(part, StrategyPlugin)]
    rivals = [other.name for other in others if other.uses("losses") and strategy.uses("losses")]
    if len(rivals) > 1:
        raise StrategyError(
            f"{' and '.join(rivals)} both override losses(); at most one may: drop one of them"
        )


def _plain(criterion: Any) -> bool:
    if type(criterion) is not nn.CrossEntropyLoss:
        return False
    return (
        criterion.weight is None and criterion.reduction == "mean" and not criterion.label_smoothing
    )


def _dataset(rows: Batch, labels: Tensor) -> Any:
    """Rows as an Avalanche data set of (input, label, position, task label)."""
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
    """Take any strategy, `Combine` included, as a plugin of an Avalanche `SupervisedTemplate`.

    >>> plugin = as_plugin(EWC(strength=100.0))
    >>> template = SupervisedTemplate(..., plugins=[plugin])  # doctest: +SKIP

    Avalanche goes on drawing the batches, with its train transforms, running the model and stepping
    the optimiser.

    - Loss: a strategy with a loss of its own (Replay, LwF) replaces the criterion's, which then has
      to be `CrossEntropyLoss()`, and what plugins before this one added; list it first. Else the
      criterion stays, as it is. Penalties are added to the loss that Avalanche shows.
    - Memory is perdure's: stored rows join the mini-batch, and so Avalanche's training metrics, as
      with its own replay.
    - Prediction: in evaluation the strategy's `predict` replaces the output. A class that may not
      be predicted yet has the logit -1e9, so Avalanche's *loss* on experiences not yet met is about
      1e9; its accuracy is right.
    - Pools: of a plan that draws from all experiences or from memory (Joint, GDumb, iCaRL),
      Avalanche is given the rows. A plan that starts afresh resets model and optimiser state; one
      without gradients skips the epochs.
    - Fisher information, memory and pooled rows come from `from_avalanche`: all resident, inputs as
      the eval transforms give them.

    Guarantee: none. A plugin carries no differential privacy, since Avalanche draws no Poisson
    sample.

    Args:
        strategy: of perdure.
        benchmark: needed only where the experiences do not know theirs.
        seed: of memory.

    Raises:
        ConfigError: when training begins, for experiences out of order, tasks that count their
            classes from zero, a head that grows or has no output for every class, or a criterion
            that would be ignored.
        PrivacyError: for a model or optimiser of Opacus.
    """

    return StrategyPlugin(strategy, benchmark=benchmark, seed=seed)
