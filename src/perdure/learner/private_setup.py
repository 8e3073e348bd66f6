"""Preparation of a private session: check model and strategy, calibrate noise, open the ledger."""

import warnings
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

from torch import nn

from perdure.data.experience import Stream
from perdure.data.record_identity import refuse_records_in_two_partitions
from perdure.data.records import Records, Spent
from perdure.data.scenarios.places import OF_NAMELESS
from perdure.errors import BudgetError, DataError, GuardError, PrivacyError
from perdure.learner.folder_claims import (
    LEDGER,
    checkpoint_anchors,
    draws_anchors,
    refuse_lost_key,
)
from perdure.learner.gradient_inspection import inspect_gradients
from perdure.learner.inspection import Inspection, Verdict
from perdure.learner.known_verdicts import VERDICTS, key_of
from perdure.learner.model_history import Carried, History
from perdure.learner.optimizers import MakeOptimizer, called
from perdure.planning.budget import LOST, elsewhere, planned, scheduled, targets
from perdure.planning.kept_noise import KeptNoise
from perdure.planning.training_plan import TrainingPlan, charge_of
from perdure.privacy.accounting.charges import bounding, merged
from perdure.privacy.answers import Answers
from perdure.privacy.guard.independence import Independence, foreign_rules
from perdure.privacy.guard.loss_checks import quiet_training
from perdure.privacy.guard.model_checks import check_model, check_optimizer
from perdure.privacy.ledger.account import WARM_START, Account
from perdure.privacy.ledger.anchors import private_copy, state_copy, state_draws
from perdure.privacy.ledger.entries import Entry, weakest
from perdure.privacy.ledger.ledger import Ledger
from perdure.privacy.ledger.storage import Anchor, head_path, load, sha256
from perdure.privacy.noise.draw_log import DrawLog
from perdure.privacy.noise.key import NoiseKey, noise_key
from perdure.privacy.private_sum import MakePrivateSum, PrivateSum, Schedule
from perdure.privacy.settings import Privacy
from perdure.types import Params
from perdure.utils.chunking import row_slices
from perdure.utils.folder_lock import FolderLock


def open_private_sum(
    training: TrainingPlan,
    *,
    folder: Path | None,
    client: int,
    owner: str,
    trace: Callable[[str], None],
    independence: Independence,
    lock: FolderLock | None = None,
    history: History | None = None,
    make: MakePrivateSum = PrivateSum,
    helps: bool = False,
) -> PrivateSum:
    """Calibrate the noise, open the ledger, and make the private sum of a session.

    Args:
        training: stream, strategy, privacy and length of every experience.
        folder: folder for ledger and key; None for none.
        client: number of the party, 0 if there is only one.
        owner: name of the party in the ledger.
        trace: function that is called with the name of every stage of a ledger write or noise draw.
        independence: reason why records are known to be independent, as `inspect` found.
        lock: lock of the folder, which is held while the ledger is written.
        history: earlier cost of a warm-started model, which is carried over into the ledger.
        make: function that makes the private sum; an audit gives its own.
        helps: True in a process that gets all answers from process 0, which has folder and key.

    Raises:
        BudgetError: if the plan does not fit the budget.
        LedgerError: if the ledger or its key is missing, or if the ledger is shorter or other than
            the folder's checkpoints, its `private/` or the user's state directory record.
    """
    privacy = training.privacy
    assert privacy is not None
    carried = carried_over(folder, history or {}, training.stream)
    training = replace(
        training,
        carried={partition: before.charges for partition, before in carried.items()},
        carried_at_most=bounding(before.charges for before in carried.values()),
    )
    kept = KeptNoise(folder)
    schedule = kept.recall(training) or scheduled(training)
    anchors = checkpoint_anchors(folder) if folder else []
    key = NoiseKey.unused() if helps else _own_key(folder, privacy, client, anchors)
    copies = (private_copy(folder), state_copy(key)) if folder else ()
    ledger = Ledger.open(
        folder / LEDGER if folder else None,
        key=key,
        trace=trace,
        owner=owner,
        delta=privacy.delta,
        anchors=anchors,
        copies=[copy for copy in copies if copy is not None],
        lock=lock,
    )
    warn_of_delta(privacy.delta, declared_records(training.stream))
    try:
        charge_before(ledger, training, schedule, carried)
    except BudgetError:  # also if the stored noise does not belong to this plan
        schedule = scheduled(training)
        charge_before(ledger, training, schedule, carried)
    kept.keep(training, schedule)
    outside = state_draws(key) if folder else None
    draws = DrawLog(
        folder / "private" / "draws.jsonl" if folder else None,
        key,
        copies=[outside] if outside else [],
        anchors=draws_anchors(folder) if folder else [],
        lock=lock,
    )
    return make(
        privacy=privacy,
        schedule=schedule,
        ledger=ledger,
        key=key,
        draws=draws,
        answers=Answers(folder / "private" / "answers" if folder else None, key),
        independence=independence,
    )


def _own_key(folder: Path | None, privacy: Privacy, client: int, anchors: list[Anchor]) -> NoiseKey:
    """Return the noise key of the party.

    Raises:
        LedgerError: if a checkpoint refers to a secret key that is missing.
    """
    if folder and privacy.seed is None:
        refuse_lost_key(folder, anchors)
    return noise_key(folder, privacy.seed, client)


def charge_before(
    ledger: Ledger, training: TrainingPlan, schedule: Schedule, carried: History
) -> None:
    """Write to the ledger, before training: partitions, earlier costs, and the plan if it fits.

    Raises:
        BudgetError: if the plan does not fit the budget.
        LedgerError: if the ledger has a partition with another size or rule.
    """
    privacy = training.privacy
    assert privacy is not None
    for partition, before in carried.items():
        if before.size:
            ledger.declare(partition, before.size, before.rule)
    for experience in training.stream:
        records = experience.train
        ledger.declare(
            records.partition, records.declared_size, rule_of(records), records.public_facts
        )
    own = dict.fromkeys(experience.train.partition for experience in training.stream)
    spent = [
        elsewhere(charge, partition, ledger.simulated)
        for partition in own
        for charge in merged(privacy.spent)
    ]
    spent += [
        released_before(each, partition, ledger.simulated)
        for partition in own
        for each in training.spent_by_records(partition)
    ]
    if lost := training.lost:
        spent += [
            elsewhere(charge, partition, ledger.simulated, LOST, lost.independence)
            for partition in own
            for charge in lost.charges.get(partition, ())
        ]
    earlier = carried_entries(carried, ledger.simulated)
    for entry in earlier:
        if own.keys().isdisjoint(entry.scope):
            ledger.charge(entry)
    if privacy.epsilons and privacy.diagnostics == "released":
        plan = planned(training, schedule)
        known = {name: plan[name] for name in ledger.partitions if name in plan}
        ledger.grant(known, epsilon=targets(training, known), delta=privacy.delta)
    # After the grant, which contains them: a partition may be newer than an earlier grant.
    for entry in [*spent, *earlier]:
        ledger.charge(entry)


def released_before(spent: Spent, partition: str, simulated: bool) -> Entry:
    """Ledger entry for an earlier release of a partition's records, which the records carry.

    Raises:
        PrivacyError: if that release was simulated and this ledger is not.
    """
    if spent.simulated and not simulated:
        raise PrivacyError(
            f"records of {partition!r} carry a release with simulated noise, and this run's noise "
            "is secret; release their constants without a seed, or give Privacy(seed=...) too"
        )
    entry = elsewhere(charge_of(spent), partition, simulated, independence="by construction")
    return replace(entry, start=spent.entry)


def carried_over(folder: Path | None, history: History, stream: Stream) -> dict[str, Carried]:
    """Return the earlier charges of a warm-started model, from the folder's ledger and `history`.

    A resumed run finds them in its ledger, whatever its model carries. A partition that was added
    after the warm start may contain any of the records that were exposed then.
    """
    path = folder / LEDGER if folder else None
    bodies = load(path, None)[1] if path and head_path(path).exists() else []
    account = Account.replay(bodies, where=str(path)) if bodies else Account()
    found: dict[str, Carried] = {}
    for entry in account.entries:
        for partition in entry.scope if entry.purpose == WARM_START else ():
            charge = entry.charge([partition])
            assert charge is not None
            said = Carried(
                charges=(charge,), independence=entry.independence, rule=account.rules[partition]
            )
            found[partition] = found[partition].and_also(said) if partition in found else said
    worst = Carried(
        charges=bounding(each.charges for each in found.values()),
        independence=weakest(each.independence for each in found.values()),
    )
    new = {e.train.partition: rule_of(e.train) for e in stream} if found else {}
    found |= {
        name: replace(worst, rule=rule) for name, rule in new.items() if name not in account.sizes
    }
    return {name: _joined(found.get(name), history.get(name)) for name in {**found, **history}}


def carried_entries(carried: History, simulated: bool) -> list[Entry]:
    """Return the ledger entries for the earlier charges of a warm-started model."""
    return [
        elsewhere(charge, partition, simulated, WARM_START, before.independence)
        for partition, before in carried.items()
        for charge in before.charges
    ]


def _joined(written: Carried | None, given: Carried | None) -> Carried:
    """Combine the charges of one partition in a ledger and a model; equal charges count once."""
    if written is None or given is None:
        joined = written or given
        assert joined is not None
        return joined
    more = tuple(charge for charge in given.charges if charge not in written.charges)
    return written.and_also(replace(given, charges=more))


def rule_of(records: Records) -> str:
    """Digest of the rule that assigned records to their partition; "" if it is not known."""
    return sha256(records.placed_by) if records.placed_by else ""


def lasting_rule_of(records: Records) -> str:
    """Return `rule_of` if the rule gives a record the same partition in later data sets, too.

    The result is "" for a data set without a name: another one without a name, such as one with
    other targets for the same records, may assign a record to another partition.
    """
    return "" if OF_NAMELESS in records.placed_by else rule_of(records)


def inspect(inspection: Inspection) -> Verdict:
    """Refuse a model, stream or strategy that breaks the bound on one record's influence.

    The guard runs model and losses on synthetic records only.

    Returns:
        The reason why records are independent of each other.

    Raises:
        GuardError: names the part that breaks the bound on one record's influence, and the fix.
        DataError: if records are outside their declared domain.
    """
    training = inspection.training
    strategy = training.strategy
    stream = training.stream
    refuse_places(stream)
    refuse_records_in_two_partitions([stream])
    if strategy.couples_records:
        raise GuardError(
            f"{strategy.name} couples the records of a batch in its loss; use another strategy"
        )
    check_model(inspection.model)
    refuse_outside(stream)
    return reached(inspection)


def reached(inspection: Inspection) -> Verdict:
    """Return the verdict of the guard, from the cache or by running all tests.

    The model stays in training mode, with dropout off.

    Raises:
        GuardError: names the part that breaks the bound on one record's influence, and the fix.
    """
    key = key_of(inspection)
    verdict = VERDICTS.recall(key, inspection) if key is not None else None
    if verdict is not None:
        quiet_training(inspection.model)
        return verdict
    verdict = inspection.verdict()
    if not verdict.alone:
        inspect_gradients(
            inspection.path,
            inspection.rows,
            inspection.model,
            own_rules=foreign_rules(inspection.model) == (),
            tested=verdict.independence == "tested",
        )
    if key is not None:
        VERDICTS.keep(key, inspection, verdict)
    return verdict


def declared_records(stream: Stream) -> int:
    """Declared number of training records of a stream, each counted once.

    Experiences with the same partition have copies of its records or, within a stage, parts of
    them.
    """
    sizes: dict[str, dict[int, int]] = {}
    for experience in stream:
        stages = sizes.setdefault(experience.train.partition, {})
        so_far = stages.get(experience.stage, 0)
        stages[experience.stage] = so_far + experience.train.declared_size
    return sum(max(stages.values()) for stages in sizes.values())


def warn_of_delta(delta: float, records: int) -> None:
    """Warn if delta is so large that publishing a whole record would be allowed."""
    if delta * records >= 1:
        warnings.warn(
            f"privacy.delta = {delta:g} is not below 1 / {records}, the declared number of "
            "records, so a mechanism that publishes whole records would be allowed; give for "
            f"example delta={0.1 / records:.1g}",
            stacklevel=2,
        )


def refuse_no_size(stream: Stream) -> None:
    """Refuse an experience without records and without a declared size.

    Without a size there is no sampling rate. With a declared size, an experience may be empty.

    Raises:
        DataError: names the experience.
    """
    for experience in stream:
        if experience.train.declared_size < 1:
            raise DataError(
                f"experience {experience.index} has no training records and no declared size, "
                "which sampling rates need; leave it out of the stream, or declare a public size "
                "with train.declared(N)"
            )


def refuse_places(stream: Stream) -> None:
    """Refuse a stream in which a record, or its experience, depends on other records.

    Raises:
        GuardError: says how to build the stream instead.
    """
    for experience in stream:
        if made := experience.train.coupled_by:
            raise GuardError(
                f"training records of experience {experience.index} are made by {made}, which "
                "looked at all records, so one record more or less would change others or stand in "
                "several rows; allowed under privacy: the records as they are; balance classes by "
                "a loss with declared counts"
            )
    if any(experience.train.drawn_by_position for experience in stream):
        raise GuardError(
            f"in stream {stream.name} a hash of row numbers chose the training records, so "
            "removing one row would choose others; give the data set ids=..., which belong to the "
            "records, or a test part of its own in test=..."
        )
    if stream.assigned_by_record is None:
        raise GuardError(
            f"stream {stream.name} has assigned_by_record=None, so the rule that chose the "
            "experience of each record is not known; write Stream(..., assigned_by_record=True) "
            "if this rule uses only the record itself and public facts"
        )
    if not stream.assigned_by_record:
        by_position = any(experience.train.ids_by_position for experience in stream)
        fix = (
            "give the records ids of their own with Records(ids=...), such as a hash of a "
            "patient's number (int64 numbers that do not depend on other records), and build the "
            "stream"
            if by_position
            else "build the stream"
        )
        raise GuardError(
            f"in stream {stream.name} the experience or client of a record depends on other "
            f"records, so adding one record moves others; {fix} with exact=False and a "
            "declared_size, by_time with boundaries=..., or by_domain with declared domains"
        )


def refuse_outside(stream: Stream) -> None:
    """Refuse training records outside their declared domain, before a curator holds them.

    Raises:
        DataError: names the experience.
    """
    for experience in stream:
        records = experience.train
        domain = records.domain
        if domain is not None and any(
            bool(domain.outside(records.inputs[piece]).any())
            for piece in row_slices(records.inputs)
        ):
            raise DataError(
                f"experience {experience.index} has records outside the declared {records.domain}; "
                "clamp the inputs to the domain, or declare a wider domain"
            )


def refuse_optimizer(optimizer: MakeOptimizer, params: Params) -> None:
    """Refuse an optimiser that needs more than one gradient per step.

    Raises:
        GuardError: names the optimiser.
    """
    copies = [nn.Parameter(value.detach().clone()) for value in params.values()]
    check_optimizer(called(optimizer, copies))
