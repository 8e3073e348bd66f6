"""Start from the parameters of an earlier run: which tensors are copied, and what privacy needs."""

from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path

import torch
from torch import Tensor, nn

from perdure.data.experience import Stream
from perdure.errors import ConfigError, PrivacyError
from perdure.experiment.config import Config, read
from perdure.experiment.model_config import make_model
from perdure.experiment.start_config import StartConfig
from perdure.experiment.trained_models import (
    chosen_trial,
    tensors_of,
    training_of,
    trials,
    under,
)
from perdure.learner.model_history import mark

HEAD = "head."
"""Beginning of the names of the parameters of a head."""


def model_of(config: Config, stream: Stream) -> nn.Module:
    """Make the model of a config, with the parameters that it starts from."""
    model = make_model(config.model, stream, config.seed)
    start = config.start
    if start is None:
        return model
    return start_from(
        model,
        start.run,
        start.arm,
        seed=start.seed,
        new_head=start.new_head,
        public=start.public,
    )


def start_from(
    model: nn.Module,
    run: Path | str,
    arm: str | None = None,
    *,
    seed: int | None = None,
    new_head: bool = False,
    public: bool = False,
) -> nn.Module:
    """Copy the parameters of a finished run's model into a model, and return the model.

    >>> model = start_from(model, "runs/earlier", new_head=True)
    >>> learner = Learner(model=model, fine_tune="head", warm_start=True, ...)

    Guarantee: the model carries the training history of the run. A learner needs `warm_start=True`
    for it, and under privacy its ledger composes the earlier charges with its own. A run without
    privacy, or whose clients hold the ledgers, is refused there, unless its records are `public`.

    Args:
        model: model with parameters of the same names and shapes; it is changed in place.
        run: folder of the run.
        arm: name of an arm or trial; None where the run has one arm.
        seed: seed of the run's model; None where the run has one seed.
        new_head: keep the head of `model` and copy the rest.
        public: declare that the records of the run are public, so that nothing is carried.

    Raises:
        ConfigError: if a tensor is missing or has another shape, or if `public` is given for an arm
            with privacy.
        RunError: if no model or several models match, or if the model cannot be read.
    """
    folder = Path(run)
    known = trials(read(folder / "config.toml"))
    trial = chosen_trial(folder, known, arm, seed)
    private = known[trial][0].private
    if public and private:
        allowed = f"false for {trial} of {folder}, whose records are private"
        raise ConfigError.of("public", public, allowed)
    _copy(under("model.", tensors_of(folder, trial)), model, new_head=new_head)
    if not public:
        mark(model, training_of(folder, trial, private=private))
    return model


@torch.no_grad()
def _copy(given: Mapping[str, Tensor], model: nn.Module, *, new_head: bool) -> None:
    """Copy tensors into a model's parameters and buffers of the same names and shapes."""
    own = {
        name: value
        for name, value in model.state_dict().items()
        if not (new_head and name.startswith(HEAD))
    }
    if new_head and len(own) == len(model.state_dict()):
        allowed = f"false for a model without a head; it has {', '.join(own)}"
        raise ConfigError.of("new_head", new_head, allowed)
    for name, value in own.items():
        found = given.get(name)
        if found is None or found.shape != value.shape:
            shape = "no tensor" if found is None else f"shape {tuple(found.shape)}"
            fix = "; new_head = true keeps a new head" if name.startswith(HEAD) else ""
            allowed = f"{tuple(value.shape)}, as in the new model{fix}"
            raise ConfigError.of(f"start: {name} of the earlier run", shape, allowed)
    for name, value in own.items():
        value.copy_(given[name])


def started(config: Config, stream: Stream) -> Stream:
    """Return the stream with the public start in its facts, for the privacy statement.

    Raises:
        PrivacyError: if an arm is private, and the public run was trained on the same data set.
    """
    start = config.start
    if start is None or not start.public or not any(arm.private for arm in config.arms):
        return stream
    _refuse_same_data(config, start)
    fact = f"the model starts from {start.run}, whose training records are declared public"
    parts = (
        replace(e, train=replace(e.train, public_facts=(*e.train.public_facts, fact)))
        for e in stream
    )
    return replace(stream, experiences=tuple(parts))


def _refuse_same_data(config: Config, start: StartConfig) -> None:
    earlier = read(Path(start.run) / "config.toml").data
    if earlier.name == config.data.name:
        raise PrivacyError(
            f"start.public declares the records of {start.run} public, but they are from "
            f"{earlier.name}, whose records are private in this run; start from other data, or "
            "from a private arm, whose epsilon is then added"
        )
