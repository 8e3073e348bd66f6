"""Repeat a private experiment without one record, with the releases of the first run.

The second run gets exactly the released answers of the first run, so both go through the same
states, and a number per record decides which records are in a step. Then the runs may differ in one
way only: in the exact sums before noise, by no more than was charged. Every other difference is an
output that a record influenced without a release. After "Re:cord-play" (arXiv 2602.17454).

A replay finds errors for the data, model and settings of its runs, and proves nothing about others.
"""

import math
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from dataclasses import asdict, dataclass, replace
from typing import TYPE_CHECKING, TypeVar

from torch import Tensor, nn

from perdure.data.experience import Stream
from perdure.errors import ConfigError
from perdure.learner.learner import Learner
from perdure.testing.fixtures import equal
from perdure.testing.frozen_mechanism import Tape, frozen

if TYPE_CHECKING:
    from flwr.app import Message

    from perdure.federated import Federation

Outputs = Mapping[str, object]
"""All outputs of a run, by name."""
ALONE = "alone"
DROPOUTS = (
    nn.Dropout,
    nn.Dropout1d,
    nn.Dropout2d,
    nn.Dropout3d,
    nn.AlphaDropout,
    nn.FeatureAlphaDropout,
)
Data = TypeVar("Data")


@dataclass(frozen=True, kw_only=True)
class ReleaseChange:
    """Largest change of one kind of release between the two runs of `replay`.

    Args:
        place: `alone` for a single learner, or the name of the client.
        release: kind of release: gradient, count, reference, or release:NAME.
        times: number of releases of this kind.
        ratio: largest change of an exact sum, divided by the charged sensitivity; infinite if the
            record changed a step that did not draw it.
    """

    place: str
    release: str
    times: int
    ratio: float


@dataclass(frozen=True, kw_only=True)
class ReplayResult:
    """Result of `replay`: a private run that was repeated without one record.

    Args:
        releases: largest change of each kind of release, per learner or client.
        unexplained: outputs that differ although all released answers were the same.
        unpaid: noise draws that no ledger entry covers, or that would reuse noise for another sum.
    """

    releases: tuple[ReleaseChange, ...]
    unexplained: tuple[str, ...]
    unpaid: tuple[str, ...]

    @property
    def largest(self) -> float:
        """Largest ratio of a change to its charged sensitivity; 0 if nothing was released."""
        return max((row.ratio for row in self.releases), default=0.0)

    @property
    def holds(self) -> bool:
        """True if every change is explained by a release, and no larger than charged."""
        return self.largest <= 1 and not self.unexplained and not self.unpaid


class ReplayRun:
    """One of the two runs of a replay: its releases, and all its other outputs.

    >>> first = ReplayRun(record=3)
    >>> first.attach(learner).fit(stream)
    >>> second = ReplayRun(record=3, earlier=first)
    >>> second.attach(other_learner).fit(neighbour)
    >>> compared(first, second)

    Args:
        record: id of the record in which the two data sets differ.
        earlier: the first run, whose releases this run gets; None for the first run.
        alone: True if the first run has no other record, so that random numbers may depend on the
            position of a row.
    """

    def __init__(
        self, *, record: int, earlier: "ReplayRun | None" = None, alone: bool = False
    ) -> None:
        self.record = record
        self.earlier = earlier
        self.alone = alone
        self.tapes: dict[str, Tape] = {}
        self.learners: dict[str, Learner] = {}
        self.outputs: dict[str, object] = {}
        self.stopped = ""
        self._points: dict[str, list[str]] = {}
        self._messages = 0

    def attach(self, learner: Learner, place: str = ALONE) -> Learner:
        """Record the run of a learner that is not prepared yet; return the same learner.

        Raises:
            ConfigError: if random numbers inside a step depend on a row's position in the batch.
        """
        if not self.alone:
            refuse_draws_by_place(learner)
        given = self.earlier.tapes[place].draws if self.earlier else None
        tape = self.tapes.setdefault(place, Tape(record=self.record, given=given))
        points = self._points.setdefault(place, [])

        def trace(point: str, learner: Learner) -> None:
            # a copy for evaluation has no callbacks, and is not a learner of the run
            self.learners[place] = learner
            here = learner.position
            points.append(f"{point} in experience {here.experience}, step {here.step}")

        learner.make_private_sum = frozen(learner.make_private_sum, tape)
        learner.callbacks = [*learner.callbacks, trace]
        return learner

    def listen(self, message: "Message") -> None:
        """Record a message of a federation as an output."""
        from flwr.app import Array

        name = f"message {self._messages}"
        self._messages += 1
        if message.has_error():
            self.outputs[f"{name}, its error"] = message.error.reason
            return
        for part, record in message.content.items():
            for field_name, value in record.items():
                kept: object = value
                if isinstance(value, Array):
                    kept = (value.dtype, value.shape, value.data)
                self.outputs[f"{name}, {part}.{field_name}"] = kept

    def finish(self) -> None:
        """Record everything that the learners hold at the end, except their private rows."""
        for place, learner in self.learners.items():
            # a second run that stopped in `prepare` has no session
            with suppress(ConfigError):
                self.outputs |= {f"{place}: {n}": v for n, v in outputs_of(learner).items()}
            for number, point in enumerate(self._points[place]):
                self.outputs[f"{place}: point {number}"] = point


def outputs_of(learner: Learner) -> dict[str, object]:
    """Parameters, state, optimiser, public facts and ledger entries of a learner, by name."""
    snapshot = learner.snapshot()
    found: dict[str, object] = dict(snapshot.tensors) | {
        f"fact {name}": value for name, value in snapshot.facts.items()
    }
    if learner.private_sum is not None:
        ledger = learner.private_sum.ledger
        found["ledger sizes"] = dict(ledger.sizes)
        found |= {f"ledger entry {i}": asdict(entry) for i, entry in enumerate(ledger.entries)}
    return found


def replay(
    make_learner: Callable[[int], Learner],
    streams: Sequence[Stream],
    neighbours: Sequence[Stream] | None = None,
    *,
    record: int,
    federation: "Federation | None" = None,
    outputs: Callable[[Learner], Outputs] | None = None,
    alone: bool = False,
) -> ReplayResult:
    """Run an experiment twice, on `streams` and on `neighbours`, and compare the runs.

    The second run gets the released answers of the first run, so only exact sums may differ.

    >>> replay(make_learner, [stream], record=3)
    >>> replay(make_learner, [stream], record=3, alone=True)  # one record, and none

    Args:
        make_learner: function from a client's number to a new private learner without a folder.
        streams: one stream per client, or one stream if there is no federation.
        neighbours: the same streams without the record; None to remove the record from `streams`.
        record: id of the record that only the first run has.
        federation: settings of the federation; None for a single learner.
        outputs: function from the final learner to other outputs to compare.
        alone: remove all other records from both runs, so that the second run has no record. Then
            views, adversaries and dropout are allowed.

    Returns:
        Changes of releases relative to the charged sensitivity, outputs that differ without a
        changed release, and noise draws that no ledger entry covers.

    Raises:
        ConfigError: if a learner is not private, or has views, an adversary or dropout without
            `alone=True`, or if `neighbours` is given together with `alone`.
        PerdureError: any error of the first run.
    """
    if alone and neighbours is not None:
        raise ConfigError.of(
            "neighbours",
            "streams",
            "None with alone=True, because alone=True makes the neighbours itself",
        )
    if alone:
        streams = [with_records(stream, lambda ids: ids == record) for stream in streams]
    others = neighbours or [without_record(stream, record) for stream in streams]

    def experiment(run: ReplayRun, data: Sequence[Stream]) -> None:
        if federation is None:
            final = run.attach(make_learner(0))
            final.fit(data[0])
        else:
            from perdure.federated import run_federation

            server = run_federation(
                lambda number: run.attach(make_learner(number), f"client {number}"),
                data,
                federation,
                listen=run.listen,
            )
            final = server.learner
            run.outputs |= {f"server: {n}": v for n, v in outputs_of(final).items()}
        if outputs:
            run.outputs |= {f"output {name}": value for name, value in outputs(final).items()}

    return replayed(experiment, streams, others, record=record, alone=alone)


def replayed(
    experiment: Callable[[ReplayRun, Data], None],
    data: Data,
    neighbour: Data,
    *,
    record: int,
    alone: bool = False,
) -> ReplayResult:
    """Run any experiment on two data sets that differ in one record, and compare the two runs.

    Args:
        experiment: function that attaches its learners to the run, trains them, and adds its other
            outputs to the run's `outputs`.
        data: argument of the first run.
        neighbour: argument of the second run.
        record: id of the record in which the two data sets differ.
        alone: True if neither data set has another record.
    """
    first = ReplayRun(record=record, alone=alone)
    experiment(first, data)
    first.finish()
    if not any(tape.ledger for tape in first.tapes.values()):
        raise ConfigError.of(
            "privacy", None, "Privacy(...), because only a private run can be replayed"
        )
    second = ReplayRun(record=record, earlier=first, alone=alone)
    try:
        experiment(second, neighbour)
    except Exception as error:
        # the first run succeeded, so an error here is an output that depends on the record
        second.stopped = str(error) or type(error).__name__
    second.finish()
    return compared(first, second)


def compared(first: ReplayRun, second: ReplayRun) -> ReplayResult:
    """Compare two finished runs."""
    rows = [
        row
        for place, tape in first.tapes.items()
        for row in changes(place, tape, second.tapes.get(place, Tape(record=first.record)))
    ]
    names = [*first.outputs, *(name for name in second.outputs if name not in first.outputs)]
    differing = [name for name in names if not same(first.outputs, second.outputs, name)]
    if second.stopped:
        differing.insert(0, f"an error: {second.stopped}")
    counts = [
        f"{place}: {len(tape.draws)} answers"
        for place, tape in first.tapes.items()
        if place in second.tapes and len(tape.draws) != len(second.tapes[place].draws)
    ]
    unpaid = [
        f"{place}: {text}"
        for run in (first, second)
        for place, tape in run.tapes.items()
        for text in tape.unpaid
    ]
    return ReplayResult(
        releases=tuple(rows),
        unexplained=tuple(differing + counts),
        unpaid=tuple(dict.fromkeys(unpaid)),
    )


def changes(place: str, tape: Tape, other: Tape) -> list[ReleaseChange]:
    """Largest change of every kind of release of one learner or client.

    Draws of correlated noise are bounded together, so their changes are added in squares.
    """
    ratios: dict[str, list[float]] = {}
    joint: dict[tuple[str, str], float] = {}
    for one, neighbour in zip(tape.draws, other.draws, strict=False):
        moved = one.moved(neighbour)
        beyond = math.inf if moved else 0.0
        ratio = moved / one.allowed if one.allowed else beyond
        if one.joint:
            squares = joint.get((one.release, one.joint), 0.0) + ratio**2
            joint[one.release, one.joint] = squares
            ratio = squares**0.5
        ratios.setdefault(one.release, []).append(ratio)
    return [
        ReleaseChange(place=place, release=name, times=len(found), ratio=max(found))
        for name, found in ratios.items()
    ]


def same(one: Outputs, other: Outputs, name: str) -> bool:
    """Return True if both runs have the output called `name` with equal values; NaN equals NaN."""
    if name not in one or name not in other:
        return False
    here = one[name]
    there = other[name]
    if isinstance(here, Tensor) and isinstance(there, Tensor):
        return equal(here, there)
    return repr(here) == repr(there)


def without_record(stream: Stream, record: int) -> Stream:
    """Return the stream without one record; all declared facts stay the same."""
    return with_records(stream, lambda ids: ids != record)


def with_records(stream: Stream, kept: Callable[[Tensor], Tensor]) -> Stream:
    """Return the stream with some of its training records; all declared facts stay the same.

    Args:
        stream: stream of the records.
    """
    parts = []
    for experience in stream:
        train = experience.train
        fewer = train.take(kept(train.ids))
        fewer = replace(fewer, declared_size=train.declared_size)
        parts.append(replace(experience, train=fewer))
    return replace(stream, experiences=tuple(parts))


def refuse_draws_by_place(learner: Learner) -> None:
    """Refuse a learner with random numbers that depend on a row's position in the batch.

    Removing one record moves the others to other positions. Their random numbers would then differ
    between the two runs. This is allowed, because the numbers are secret, but a replay could not
    distinguish it from an error.

    Raises:
        ConfigError: names the part with random numbers.
    """
    allowed = "none in a replay, because its random draws depend on a row's position in the batch"
    for name in ("views", "adversary"):
        if getattr(learner, name) is not None:
            raise ConfigError.of(name, type(getattr(learner, name)).__name__, allowed)
    for name, module in learner.model.named_modules():
        share = module.p if isinstance(module, DROPOUTS) else 0.0
        inside = getattr(module, "dropout", 0.0)
        share = share or (inside if isinstance(inside, float) else 0.0)
        if share:
            raise ConfigError.of(f"dropout of {name or 'the model'}", share, allowed)
