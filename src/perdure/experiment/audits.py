"""Audits of a run: canaries in its private arms, and membership inference.

Membership inference attacks the models of a finished run.
"""

from dataclasses import replace
from pathlib import Path
from tempfile import TemporaryDirectory

import torch
from torch import Tensor

from perdure.auditing.bounds import Method
from perdure.auditing.canaries import AuditResult, audit, first_free_id
from perdure.auditing.membership import MembershipResult, Predictor, lira
from perdure.data.experience import Stream
from perdure.data.records import Records
from perdure.data.row_view import joined_rows
from perdure.errors import ConfigError
from perdure.experiment.arm import ArmRun, Progress, open_stream, silent
from perdure.experiment.config import Config, read
from perdure.experiment.metrics_log import MetricsLog
from perdure.experiment.run import load
from perdure.utils.seeding import generator

Population = tuple[Records, Tensor, Records]
"""Records under attack, a mask (n,) of the members among them, and the known other members."""


def attack_run(
    folder: Path,
    *,
    shadows: int = 8,
    experience: int = 0,
    progress: Progress = silent,
) -> dict[str, MembershipResult]:
    """Attack the final model of every arm with LiRA, for the records of one experience.

    The attacker has the config, a mix of test records (non-members) and equally many training
    records (members), and all other training records. He trains shadow models on the whole stream
    with his own noise, and then decides for each record of the mix if it was in training. Private
    arms and others are attacked, so that they can be compared. In a run with several seeds, only
    the models of the first seed are attacked.

    Args:
        folder: folder of a finished run.
        shadows: number of shadow models per arm; even, and at least 4.
        experience: index of the experience whose records are attacked.
        progress: called as progress(arm name, share done, state in words).

    Raises:
        ConfigError: if the run has no such experience.
        RunError: if the run is not finished.
    """
    config = read(folder / "config.toml")
    whole = config
    config = whole.of_seed(whole.all_seeds[0])
    stream = open_stream(config)
    if not 0 <= experience < len(stream):
        raise ConfigError.of("experience", experience, f"0 to {len(stream) - 1}")
    records, members, known = population(stream, experience, config.seed)
    results = {}
    for number, arm in enumerate(config.arms):
        name = whole.trial(arm, config.seed)
        target = load(folder, name).predictor(experience, after=len(stream) - 1)
        done = [0]

        def train(half: Records, seed: int, arm: int = number, done: list[int] = done) -> Predictor:
            done[0] += 1
            state = f"shadow model {done[0]}/{shadows}"
            progress(config.arms[arm].name, done[0] / (shadows + 1), state)
            return shadow(config, arm, mixed(stream, experience, known, half), experience, seed)

        results[name] = lira(target, train, records, members, shadows=shadows, seed=config.seed)
        progress(name, 1.0, "")
    return results


def population(stream: Stream, experience: int, seed: int) -> Population:
    """Choose the records that `attack_run` attacks: equally many training and test records."""
    train = stream[experience].train
    test = stream[experience].test
    order = torch.randperm(len(train), generator=generator(seed, "attacked"))
    size = min(len(train) // 2, len(test))
    inside = train.take(order[:size])
    known = train.take(order[size:])
    outside = test.take(torch.arange(size))
    return joined(inside, outside, first_free_id(stream)), torch.arange(2 * size) < size, known


def joined(one: Records, other: Records, first_id: int) -> Records:
    """Join two sets of records under the first one's partition.

    Records of `other` get new ids from `first_id` on.
    """
    ids = first_id + torch.arange(len(other))
    return Records(
        inputs=joined_rows([one.inputs, other.inputs]),
        labels=torch.cat([one.labels, other.labels]),
        ids=torch.cat([one.ids, ids]),
        partition=one.partition,
        domain=one.domain,
        task=one.task,
        spent=one.spent,
    )


def mixed(stream: Stream, experience: int, known: Records, half: Records) -> Stream:
    """Return the stream of a shadow model: one experience has other training records.

    They are the known members and the chosen half of the records under attack.
    """
    whole = Records(
        inputs=joined_rows([known.inputs, half.inputs]),
        labels=torch.cat([known.labels, half.labels]),
        ids=torch.cat([known.ids, half.ids]),
        partition=known.partition,
        declared_size=stream[experience].train.declared_size,
        domain=known.domain,
        task=known.task,
        spent=known.spent,
    )
    parts = [replace(e, train=whole) if e.index == experience else e for e in stream]
    return replace(stream, experiences=tuple(parts))


def shadow(config: Config, arm: int, stream: Stream, experience: int, seed: int) -> Predictor:
    """Train a shadow model of the LiRA attack, without clients and with simulated noise."""
    mine = replace(
        config,
        seed=seed % 2**31,
        federation=None,
        privacy=replace(config.privacy, seed=seed % 2**31) if config.privacy else None,
    )
    with TemporaryDirectory() as name:
        learner = ArmRun(
            mine, mine.arms[arm], stream, Path(name), MetricsLog(Path(name, "metrics.jsonl"))
        ).learner(stream)
        learner.callbacks = ()
        learner.fit(stream)
    return learner.predictor(experience, after=len(stream) - 1)


def audit_run(
    config: Config, *, canaries: int = 1000, confidence: float = 0.99, method: Method = "gaussian"
) -> dict[str, AuditResult]:
    """Audit every private arm of a config, and return the results by name of the arm.

    In a federation, only the learner of the first client is audited, and it trains alone.

    Args:
        config: config of the run.
        canaries: total number of canaries; each is in the data with probability 1/2.
        confidence: probability that a correct mechanism is not flagged.
        method: kind of bound, see `perdure.auditing.bounds`.

    Raises:
        ConfigError: if no arm is private.
    """
    from perdure.experiment.results import client_streams

    private = [arm for arm in config.arms if arm.private]
    if not private:
        raise ConfigError.of(
            "arms", [arm.name for arm in config.arms], "at least one with private = true"
        )
    config = config.of_seed(config.all_seeds[0])
    stream = open_stream(config)
    mine = client_streams(config, stream)[0] if config.federation else stream
    # an empty folder, because an arm would use the files of an earlier run
    with TemporaryDirectory() as name:
        log = MetricsLog(Path(name, "metrics.jsonl"))
        learners = {
            arm.name: ArmRun(config, arm, stream, Path(name), log).learner(mine) for arm in private
        }
        return {
            arm: audit(learner, mine, canaries=canaries, confidence=confidence, method=method)
            for arm, learner in learners.items()
        }
