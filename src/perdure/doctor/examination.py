"""Examination of a training before it begins."""

from collections.abc import Sequence

import torch
from torch import nn
from torch.optim import Optimizer

from perdure.contract.strategy import Strategy
from perdure.data.experience import Stream
from perdure.doctor.case import Case, Loss
from perdure.doctor.finding import Finding, in_order
from perdure.doctor.rules import Rule, find, names
from perdure.errors import ConfigError, PerdureError
from perdure.explain import Explainer
from perdure.learner.optimizers import MakeOptimizer, first_line
from perdure.privacy.settings import Privacy
from perdure.tasks.losses import Loss as TaskLoss


def examine(
    model: nn.Module,
    stream: Stream,
    loss: Loss | TaskLoss | None = None,
    optimizer: MakeOptimizer | Optimizer | None = None,
    privacy: Privacy | None = None,
    *,
    strategy: Strategy | None = None,
    batch_size: int = 128,
    epochs: int | None = None,
    iterations: int | None = None,
    micro_batch_size: int | None = None,
    explainer: Explainer | None = None,
    seed: int = 0,
    device: str | torch.device = "cpu",
    trials: bool = True,
    rules: Sequence[str | Rule] | None = None,
) -> tuple[Finding, ...]:
    """Look for known mistakes in a training before it begins.

    >>> for finding in examine(model, stream, optimizer=partial(torch.optim.SGD, lr=0.1)):
    ...     print(finding)

    Guarantee: without privacy, findings depend on a sample of training records. Under privacy no
    training record is read: findings depend on the model, declared facts, synthetic records, and
    the test records, which are public.

    Args:
        model: model before training; it is not changed.
        stream: experiences in the order of training.
        loss: loss of the learner (see `perdure.tasks.losses`), or of a training loop of your own,
            as a function of outputs and targets; None for the loss of the stream's task.
        optimizer: optimiser of the model's parameters, or function from parameters to one; None to
            leave out the rules that need it.
        privacy: settings of differential privacy; None for training without privacy.
        strategy: strategy against forgetting; None for naive training.
        batch_size: number of new records per step.
        epochs: number of passes over the records of an experience; give this or `iterations`.
        iterations: number of steps in an experience.
        micro_batch_size: number of rows in one pass through the model.
        explainer: explainer of the trained model; None for none.
        seed: seed of synthetic records and of trial trainings.
        device: device of the model and the records in training.
        trials: False to leave out the rules that train copies of the model, which take seconds.
        rules: names of rules, or rules with thresholds of your own; None for all rules.

    Returns:
        Findings in the order of repair, because a fault of one kind often causes those after it.

    Raises:
        ConfigError: if an argument is not allowed, if a rule cannot be imported, or if the model
            or the loss fails on the records.
        PrivacyError: under privacy, if a test record is a training record.
    """
    case = Case(
        model=model,
        stream=stream,
        loss=loss,
        optimizer=optimizer,
        privacy=privacy,
        strategy=strategy,
        batch_size=batch_size,
        epochs=epochs,
        iterations=iterations,
        micro_batch_size=micro_batch_size,
        explainer=explainer,
        seed=seed,
        device=device,
    )
    return examined(case, trials=trials, chosen=rules)


def examined(
    case: Case, *, trials: bool = True, chosen: Sequence[str | Rule] | None = None
) -> tuple[Finding, ...]:
    """Apply rules to a case.

    Args:
        case: facts about the training.
        trials: False to leave out the rules that train copies of the model.
        chosen: names of rules, or rules; None for all.

    Returns:
        Findings in the order of repair, without those that another finding explains.
    """
    made = [
        find(each, field="rules")() if isinstance(each, str) else each
        for each in (names() if chosen is None else chosen)
    ]
    found = [_applied(rule, case) for rule in made if trials or not rule.trains]
    return tuple(in_order([finding for finding in found if finding is not None]))


def _applied(rule: Rule, case: Case) -> Finding | None:
    """Apply one rule; code of the user that fails in it, such as the loss, is refused by name."""
    try:
        return rule.examine(case)
    except PerdureError:
        raise
    except Exception as error:
        raise ConfigError(
            f"the rule {rule.name!r} cannot be applied, because model, loss or optimiser fail on "
            f"the stream's records ({type(error).__name__}: {first_line(error)}); correct them, or "
            "the records"
        ) from error
