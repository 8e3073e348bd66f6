"""Checks of a run before its first training, for `perdure run` and `perdure config` alike.

They load the data, make the stream and the clients, and prepare a learner of every arm, which
calibrates its noise and examines the model. Nothing is trained, released or written.
"""

from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, field, fields, replace
from pathlib import Path
from tempfile import TemporaryDirectory

from perdure.data.experience import Stream, declared_size_of
from perdure.data.record_identity import refuse_records_in_two_partitions
from perdure.data.value_checks import check_streams
from perdure.errors import ConfigError
from perdure.experiment.arm import ArmRun, open_stream
from perdure.experiment.config import Arm, Config
from perdure.experiment.explain_config import ExplainConfig
from perdure.experiment.from_tables import placed
from perdure.experiment.metrics_log import MetricsLog
from perdure.experiment.results import client_streams, explained_arm
from perdure.learner.arguments import check_stream
from perdure.learner.learner import Learner
from perdure.learner.private_setup import released_before
from perdure.planning.training_plan import Participation


def checked_stream(config: Config, *, begun: Collection[str] = ()) -> Stream:
    """Refuse a config that cannot be trained on this machine, and return its first seed's stream.

    Args:
        config: config of a run.
        begun: trials that an earlier process has begun, so that their arms were checked, and their
            noise is calibrated.

    Raises:
        PerdureError: as the training would, with the same message.
    """
    first = config.of_seed(config.all_seeds[0])
    stream = open_stream(first)
    if config.federation is None:
        parties = [_Party(number=0, stream=stream)]
    else:
        parties = _parties(first, stream)
        for seed in config.all_seeds[1:]:
            other = config.of_seed(seed)
            client_streams(other, open_stream(other))
    for arm in config.arms:
        if config.trial(arm, config.all_seeds[0]) not in begun:
            _refuse_arm(first, arm, stream, parties)
    return stream


@dataclass(frozen=True, kw_only=True)
class _Party:
    """A party whose learners are prepared.

    Args:
        number: number of the client; 0 for the only party.
        stream: its own stream.
        local_work: rounds, local epochs and local steps of a federation; empty without one.
        participation: rounds in which a private client trains; None for all.
    """

    number: int
    stream: Stream
    local_work: Mapping[str, int] = field(default_factory=dict)
    participation: Participation | None = None


def _parties(config: Config, stream: Stream) -> list[_Party]:
    """Refuse a federation that cannot begin, and return the smallest and the largest client.

    The sampling rates of all others are between theirs. Clients that never train are left out.
    """
    from perdure.experiment.federation_config import refuse_few_clients
    from perdure.experiment.served_federation import federation_of
    from perdure.federated.client_streams import participation, without_gaps
    from perdure.federated.flower_adapter import refuse_missing_engine

    chosen = config.federation
    assert chosen is not None
    refuse_missing_engine(chosen.engine)
    federation = federation_of(chosen, config.seed)
    streams = client_streams(config, stream)
    try:
        for index in range(len(stream)):
            holds = [own[index].train.declared_size > 0 for own in streams]
            asked = len(federation.cohort(index, 0, holds.__getitem__))
            options = chosen.aggregator_options
            refuse_few_clients(chosen.aggregator, options, chosen.pre_aggregators, asked)
    except ConfigError as error:
        known = [each.name for each in fields(chosen)]
        raise ConfigError(placed(str(error), "federation", known)) from None
    own = [without_gaps(each, client) for client, each in enumerate(streams)]
    private = any(arm.private for arm in config.arms)
    if private:
        refuse_records_in_two_partitions(own)
    check_streams(own, training=private)
    rounds = participation(federation, streams)
    training = [k for k in range(len(own)) if rounds is None or any(rounds(k).taken)]
    by_size = sorted(training, key=lambda client: declared_size_of(own[client].experiences))
    return [
        _Party(
            number=client,
            stream=own[client],
            local_work=federation.local_work,
            participation=rounds(client) if rounds else None,
        )
        for client in sorted({by_size[0], by_size[-1]})
    ]


def _refuse_arm(config: Config, arm: Arm, stream: Stream, parties: Sequence[_Party]) -> None:
    """Refuse an arm whose learners cannot be prepared."""
    with TemporaryDirectory() as empty:
        log = MetricsLog(Path(empty) / "metrics.jsonl")
        run = ArmRun(config, arm, stream, Path(empty), log)
        for party in parties:
            check_stream(party.stream)
            check_streams([party.stream], training=arm.private)
            learner = run.learner(stream, party.number)
            _prepare(learner, party)
        if config.explain and (config.explain.drift or arm == explained_arm(config)):
            _try_explanation(learner, config.explain, stream)


def _try_explanation(learner: Learner, chosen: ExplainConfig, stream: Stream) -> None:
    """Refuse an explainer that fails on the untrained model of an arm, for one test record."""
    test = next((stage.test for stage in stream.stages if len(stage.test)), None)
    if test is None:
        return
    row = test.inputs[:1].to(learner.device)
    try:
        chosen.explainer.try_on(learner.model, row, chosen.background(row))
    except ConfigError as error:
        known = [*ExplainConfig.OWN, *(each.name for each in fields(chosen.explainer))]
        raise ConfigError(placed(str(error), "explain", known)) from None


def _prepare(learner: Learner, party: _Party) -> None:
    """Prepare a learner that is not trained, and close it.

    Its key is simulated, because secret noise needs a folder, and a ledger there.
    """
    learner.callbacks = ()
    privacy = learner.privacy
    if privacy is not None and privacy.seed is None:
        for experience in party.stream:
            for spent in experience.train.spent:
                released_before(spent, experience.train.partition, simulated=False)
        learner.privacy = replace(privacy, seed=0)
    if privacy is not None:
        learner.participation = party.participation
    if party.local_work:
        from perdure.federated.local_work import set_local_work

        set_local_work(learner, party.local_work)
    try:
        learner.prepare(party.stream)
    finally:
        learner.close()
