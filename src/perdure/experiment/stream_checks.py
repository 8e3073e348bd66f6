"""Checks of a run's stream, before anything is trained."""

from perdure.data.experience import Stream
from perdure.errors import ConfigError
from perdure.experiment.config import Config
from perdure.learner.group_measures import refuse_groups
from perdure.tasks import SingleLabel, refuse_other_tasks


def refuse_unmeasurable(config: Config, stream: Stream) -> None:
    """Refuse an attack, explanations or groups that the records of a stream do not allow.

    Raises:
        ConfigError: names the table of the config.
        DataError: if test records do not have the attribute of the groups.
    """
    asked = {
        "[attack]": config.attack,
        "[certificate]": config.certificate,
        "[explain]": config.explain,
    }
    name = next((table for table, given in asked.items() if given), "")
    if name:
        refuse_other_tasks(stream.task, (SingleLabel,), name, "it asks for the class of a record")
    if config.fairness:
        refuse_groups(stream, config.fairness)
    if config.explain and len(stream.input_shape) < 2 and not config.explain.drift:
        allowed = (
            f"drift = true, or no [explain] table, because inputs of shape {stream.input_shape} "
            "are not images, which are drawn"
        )
        raise ConfigError.of("explain.method", config.explain.method, allowed)
    if config.explain:
        try:
            config.explain.explainer.unknowns(stream.input_shape)
        except ConfigError as error:
            raise ConfigError(f"explain.{error}") from None
