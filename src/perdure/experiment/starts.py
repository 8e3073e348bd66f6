"""Start from the parameters of an earlier run: which tensors are copied, and what privacy needs."""

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace
from pathlib import Path

import torch
from torch import Tensor, nn

from perdure.data.experience import Stream
from perdure.errors import ConfigError, PrivacyError, RunError
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
        public: declare that the records of the run, and of all runs from which it started, are
            public, so that nothing is carried.

    Raises:
        ConfigError: if a tensor is missing or has another shape, or if `public` is given for an arm
            with privacy, or for one that descends from such an arm.
        RunError: if no model or several models match, or if the model cannot be read, or, with
            `public`, if the folder of a run before it is missing.
    """
    start = StartConfig(run=str(run), arm=arm, seed=seed, public=public)
    found = next(_earlier(start))
    if public:
        for each in _earlier(start):
            each.refuse_private()
    folder = found.folder
    trial = found.trial
    _copy(under("model.", tensors_of(folder, trial)), model, new_head=new_head)
    if not public:
        mark(model, training_of(folder, trial, private=found.private))
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
    """Return the stream with the public starts in its facts, for the privacy statement.

    Raises:
        PrivacyError: if an arm is private, and records that are declared public by a start, the
            earlier run's own or those of a run before it, are from the same data set.
        RunError: if an arm is private, and the folder of a run before it is missing.
    """
    start = config.start
    if start is None or not any(arm.private for arm in config.arms):
        return stream
    public = [each for each in _earlier(start) if each.public]
    for each in public:
        each.refuse_private()
        each.refuse_same_data(config)
    facts = [
        f"the model starts from {each.folder}, whose training records are declared public"
        for each in public
    ]
    if not facts:
        return stream
    parts = (
        replace(e, train=replace(e.train, public_facts=(*e.train.public_facts, *facts)))
        for e in stream
    )
    return replace(stream, experiences=tuple(parts))


@dataclass(frozen=True, kw_only=True)
class _Earlier:
    """Trained model among those from which a model descends.

    Args:
        folder: folder of its run.
        trial: name of its trial.
        config: config of the run.
        private: True if it was trained with privacy.
        public: True if a start between it and the new model declares its records public.
    """

    folder: Path
    trial: str
    config: Config
    private: bool
    public: bool

    def refuse_private(self) -> None:
        """Refuse to declare private records public.

        Raises:
            ConfigError: names the run.
        """
        if self.private:
            allowed = f"false for {self.trial} of {self.folder}, whose records are private"
            raise ConfigError.of("public", True, allowed)

    def refuse_same_data(self, config: Config) -> None:
        """Refuse to declare the records public that are private in the run of a config.

        Raises:
            PrivacyError: names the run and the data set.
        """
        if self.config.data.name == config.data.name:
            raise PrivacyError(
                f"start.public declares the records of {self.folder} public, but they are from "
                f"{self.config.data.name}, whose records are private in this run; start from "
                "other data, or from a private arm, whose epsilon is then added"
            )


def _earlier(start: StartConfig | None) -> Iterator[_Earlier]:
    """Yield the models from which a model descends, the nearest first.

    A model that started from another one contains its training, so a declaration that its records
    are public is one about the records of both.

    Raises:
        RunError: if the config of a run cannot be read.
    """
    public = False
    seen: set[tuple[Path, str, bool]] = set()
    told = ""
    while start is not None:
        public = public or start.public
        folder = Path(start.run)
        if not (folder / "config.toml").is_file():
            raise RunError(
                f"{folder} has no config.toml, but {told or 'the config'} starts from it, so the "
                "records behind the start are not known; restore the folder, or start from "
                "another run"
            )
        config = read(folder / "config.toml")
        known = trials(config)
        trial = chosen_trial(folder, known, start.arm, start.seed)
        place = (folder.resolve(), trial, public)
        if place in seen:  # a folder that was written again later
            return
        seen.add(place)
        private = known[trial][0].private
        yield _Earlier(folder=folder, trial=trial, config=config, private=private, public=public)
        told = str(folder)
        start = config.start
