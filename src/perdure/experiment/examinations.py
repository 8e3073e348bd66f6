"""Examinations of a config by the doctor, before a run."""

from collections.abc import Sequence
from dataclasses import replace

from perdure.data.experience import Stream
from perdure.doctor import Case, Finding, Rule
from perdure.doctor.case import public_part
from perdure.doctor.examination import examined
from perdure.experiment.arm import open_stream
from perdure.experiment.config import Arm, Config
from perdure.experiment.federation_table import length_of
from perdure.experiment.starts import model_of

TRAINING = "training."
PRIVATE_TRAINING = "private_training."


def examine_run(
    config: Config, *, trials: bool = True, rules: Sequence[str | Rule] | None = None
) -> dict[str, tuple[Finding, ...]]:
    """Examine every arm of a config, with the first seed.

    Guarantee: if an arm is private, no training record is read for any arm.

    Args:
        config: config of the run.
        trials: False to leave out the rules that train copies of the model, which take seconds.
        rules: names of rules, or rules with thresholds of your own; None for all rules.

    Returns:
        Findings in the order of repair, by the name of the arm.

    Raises:
        ConfigError: if the data cannot be split as configured.
        DataError: if the data are missing or damaged.
    """
    first = config.of_seed(config.all_seeds[0])
    stream = open_stream(first)
    return {
        arm.name: examine_arm(first, arm, stream, trials=trials, rules=rules) for arm in config.arms
    }


def examine_arm(
    config: Config,
    arm: Arm,
    stream: Stream,
    *,
    trials: bool = True,
    rules: Sequence[str | Rule] | None = None,
) -> tuple[Finding, ...]:
    """Examine one arm of a config.

    Args:
        config: config of one seed.
        arm: arm of the config.
        stream: stream of the config.
        trials: False to leave out the rules that train copies of the model.
        rules: names of rules, or rules; None for all.
    """
    chosen = config.private_training if arm.private else None
    training = chosen or config.training
    loss = arm.loss or training.loss
    mine = _of_one_client(stream, config)
    if any(each.private for each in config.arms) and not arm.private:
        mine = public_part(mine)  # records of a private arm are private in every arm
    epochs, iterations = length_of(config.federation, training.epochs, training.iterations)
    case = Case(
        model=model_of(config, stream),
        stream=mine,
        loss=loss.loss if loss else None,
        optimizer=training.factory(),
        privacy=config.privacy if arm.private else None,
        strategy=arm.strategy,
        batch_size=training.batch_size,
        epochs=epochs,
        iterations=iterations,
        micro_batch_size=training.micro_batch_size,
        explainer=config.explain.explainer if config.explain else None,
        seed=config.seed,
        device=config.device,
    )
    found = examined(case, trials=trials, chosen=rules)
    return tuple(map(_of_private_training, found)) if own_training(config, arm) else found


def _of_one_client(stream: Stream, config: Config) -> Stream:
    """Return the stream with the declared sizes of a client; the same one without a federation."""
    if config.federation is None:
        return stream
    clients = config.federation.clients
    parts = [
        replace(each, train=each.train.declared(max(1, each.train.declared_size // clients)))
        for each in stream
    ]
    return replace(stream, experiences=tuple(parts))


def own_training(config: Config, arm: Arm) -> bool:
    """Return True if a remedy for an arm changes `[private_training]` instead of `[training]`."""
    mixed = not all(each.private for each in config.arms)
    return arm.private and (config.private_training is not None or mixed)


def _of_private_training(finding: Finding) -> Finding:
    changes = {
        PRIVATE_TRAINING + path.removeprefix(TRAINING) if path.startswith(TRAINING) else path: value
        for path, value in finding.remedy.changes.items()
    }
    return replace(finding, remedy=replace(finding.remedy, changes=changes))
