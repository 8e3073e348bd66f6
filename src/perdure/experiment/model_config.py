"""Table `[model]` of a config: a built-in model, a builder of `perdure.models`, or a user's own."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any, ClassVar

from torch import nn

from perdure import models
from perdure.data.experience import Stream
from perdure.errors import ConfigError
from perdure.experiment.calls import arguments, of_module, parameters
from perdure.experiment.from_tables import build as build_table
from perdure.models import ModelConfig
from perdure.models.config import MODELS
from perdure.tasks import NextToken
from perdure.utils.checked_fields import CheckedFields
from perdure.utils.seeding import seeded

BUILDERS = ("decoder", "gru", "lstm", "transformer")
"""Functions of `perdure.models` that a config names; their arguments are keys of `[model]`."""
GIVEN = ("input_shape", "num_classes", "seed")
"""Arguments of model functions that perdure passes, from the stream and the run's seed."""
OWN = '"module:name" of a function or class that makes a torch.nn.Module'


@dataclass(frozen=True, kw_only=True)
class BuiltModel(CheckedFields):
    """Table `[model]` that names a function, which makes the model.

    The function is called with `options`, and with `input_shape`, `num_classes` and `seed` if it
    has parameters of these names. With records of next tokens, `vocabulary` and `every_position`
    of a builder of `perdure.models` follow from the task where they are left out.

    Args:
        name: name of a builder of `perdure.models`, or "module:name" of a function or class.
        options: further arguments of the function, which are keys of the same table.
    """

    TABLE: ClassVar[str] = "a table with name = NAME and the model's own fields"

    name: str
    options: Mapping[str, Any] = field(default_factory=dict)

    @classmethod
    def from_table(cls, table: Mapping[str, Any], where: str) -> "BuiltModel | ModelConfig":
        """Read a table `[model]`: a `ModelConfig` for a built-in model, or else a `BuiltModel`."""
        options = dict(table)
        name = options.pop("name", ModelConfig.name)
        if name in MODELS or not isinstance(name, str):
            return build_table(ModelConfig, table, where)
        function = _function(name, f"{where}.name")
        known = parameters(function)
        filled = {"vocabulary": 1} if name in BUILDERS and "vocabulary" in known else {}
        values = arguments(function, filled | options, where, without=GIVEN)
        return cls(name=name, options={key: values[key] for key in options})

    def make(self, stream: Stream, seed: int) -> nn.Module:
        """Make the model for a stream.

        Args:
            stream: stream that gives the shape of inputs and the number of classes.
            seed: seed of the initial parameters.

        Raises:
            ConfigError: if the function refuses its arguments, or returns no model.
        """
        function = _function(self.name, "model.name")
        known = parameters(function)
        facts = {"input_shape": stream.input_shape, "num_classes": stream.num_classes, "seed": seed}
        given = {key: value for key, value in facts.items() if key in known}
        if self.name in BUILDERS and isinstance(stream.task, NextToken):
            tokens = {"vocabulary": stream.num_classes, "every_position": True}
            given |= {key: value for key, value in tokens.items() if key in known}
        try:
            with seeded(seed):
                made: object = function(**given | dict(self.options))
        except TypeError as error:
            raise ConfigError(
                f"model {self.name!r} cannot be made of {sorted(given | dict(self.options))}: "
                f"{error}; allowed: the arguments of its function; correct the [model] table"
            ) from error
        if not isinstance(made, nn.Module):
            raise ConfigError.of("model.name", f"{self.name} of a {type(made).__name__}", OWN)
        return made


def make_model(config: BuiltModel | ModelConfig, stream: Stream, seed: int) -> nn.Module:
    """Make the model of a config for a stream; parameters depend on the seed only."""
    if isinstance(config, BuiltModel):
        return config.make(stream, seed)
    return models.build(
        config, input_shape=stream.input_shape, num_classes=stream.num_classes, seed=seed
    )


def _function(name: str, where: str) -> Callable[..., Any]:
    if ":" in name:
        return of_module(name, where, OWN)
    if name not in BUILDERS:
        raise ConfigError.of(where, name, f"{', '.join((*MODELS, *BUILDERS))}, or {OWN}")
    found: Callable[..., Any] = getattr(models, name)
    return found
