"""Parts of a run's result, combined in the schema of `perdure.experiment.result_schema`.

The parts are privacy statements, federation, attack and explanations.
"""

import re
from collections.abc import Callable, Mapping
from dataclasses import asdict, fields, replace
from functools import partial
from itertools import groupby
from pathlib import Path
from typing import TYPE_CHECKING, Any, cast

import torch

from perdure.adversarial import OBJECTIVES
from perdure.data.client_splits import dirichlet, iid
from perdure.data.clients_by_attribute import by_attribute
from perdure.data.experience import Stream, declared_size_of
from perdure.data.groups import Groups
from perdure.errors import ConfigError
from perdure.experiment.attack_config import AttackConfig
from perdure.experiment.config import Arm, Config
from perdure.experiment.from_tables import placed
from perdure.experiment.result_schema import (
    SCHEMA,
    ArmResult,
    AttackResult,
    ClassResult,
    Epsilon,
    Explanations,
    GroupResult,
    Result,
    Spending,
)
from perdure.learner.folder_claims import refuse_missing_ledgers
from perdure.learner.group_measures import group_measures
from perdure.learner.learner import Learner
from perdure.metrics import ClassMeasures, class_measures
from perdure.privacy.ledger.account import Account, Statement
from perdure.privacy.ledger.merged import Merged, merge
from perdure.utils.atomic_files import save_tensors
from perdure.utils.chunking import by_pieces
from perdure.utils.environment import machine, versions

if TYPE_CHECKING:
    from perdure.federated.server import Server

EXPLAINED = "explanations.safetensors"


def summary(
    config: Config,
    stream: Stream,
    arms: list[ArmResult],
    merged: Merged | None,
    explanations: Explanations | None,
) -> Result:
    """Build the content of `result.json` from its parts.

    Args:
        config: config of the run.
        stream: stream of the run's first seed.
        arms: results of all arms.
        merged: ledgers of all private trials; None if no arm is private.
        explanations: file of the explanation tensors; None without explanations.
    """
    first = config.of_seed(config.all_seeds[0])
    return {
        "schema": SCHEMA,
        "name": config.name,
        "seeds": list(config.all_seeds),
        "task": {
            "name": stream.task.name,
            "metric": stream.task.metric.name,
            "unit": stream.task.metric.unit,
            "higher_is_better": stream.task.metric.higher_is_better,
        },
        "stream": {
            "name": stream.name,
            "scenario": stream.scenario,
            "experiences": len(stream.stages),
            "classes": [list(stream[stage.last].classes) for stage in stream.stages],
            "declared_sizes": [
                declared_size_of(stream.experiences[stage.first : stage.last + 1])
                for stage in stream.stages
            ],
        },
        "model": asdict(config.model),
        "federation": federation_row(first, stream),
        "environment": versions() | {k: v for k, v in machine().items() if v is not None},
        "attack": attack_row(config.attack),
        "certificate": asdict(config.certificate) if config.certificate else None,
        "arms": arms,
        "epsilon_of_all_arms": epsilon_of_all_arms(merged, config.privacy.delta)
        if merged and config.privacy
        else None,
        "explanations": explanations,
    }


def by_class(learner: Learner, stream: Stream) -> list[ClassMeasures]:
    """Measure each class on every stage's test records, at the end of the stream."""
    after = max(0, learner.position.experience - 1)
    with torch.no_grad():
        return [
            class_measures(
                by_pieces(learner.predictor(stage.last, after=after), stage.test.inputs),
                stage.test.labels,
            )
            for stage in stream.to(learner.device).stages
        ]


def class_row(measured: ClassMeasures) -> ClassResult:
    """Convert measures of each class to the form of `result.json`, without counts of 0."""
    present = measured.confusion.sum(1).nonzero().flatten().tolist()
    return {
        "macro_f1": measured.macro_f1,
        "accuracy": {str(c): float(measured.accuracy[c]) for c in present},
        "f1": {str(c): float(measured.f1[c]) for c in present},
        "confusion": {
            str(c): {
                str(predicted): count
                for predicted, count in enumerate(measured.confusion[c].tolist())
                if count
            }
            for c in present
        },
    }


def group_rows(learner: Learner, stream: Stream, groups: Groups) -> list[GroupResult | None]:
    """Measure groups on every stage's test records, in the form of `result.json`."""
    found = group_measures(learner, stream, groups)
    return [cast(GroupResult, asdict(each)) if each else None for each in found]


def federation_row(config: Config, stream: Stream) -> dict[str, Any] | None:
    """Return the federation's settings for `result.json`, with each client's declared sizes."""
    if config.federation is None:
        return None
    clients = client_streams(config, stream)
    return asdict(config.federation) | {
        "declared_sizes": [[e.train.declared_size for e in own] for own in clients]
    }


def client_streams(config: Config, stream: Stream) -> list[Stream]:
    """Split the stream over the clients.

    If an arm of the run is private, or sizes are given, the client of a record depends only on the
    record and public facts, in all arms.

    Raises:
        ConfigError: if the records cannot be split as the config says.
    """
    chosen = config.federation
    assert chosen is not None
    seed = config.seed
    attribute = chosen.attribute or ""
    splits: dict[str, Callable[..., list[Stream]]] = {
        "dirichlet": partial(dirichlet, alpha=chosen.alpha, min_size=chosen.min_size, seed=seed),
        "iid": partial(iid, min_size=chosen.min_size, seed=seed),
        "by_attribute": partial(by_attribute, attribute=attribute, values=chosen.values),
    }
    try:
        return splits[chosen.split](
            stream,
            clients=chosen.clients,
            exact=config.privacy is None and chosen.client_sizes is None,
            client_sizes=chosen.client_sizes,
        )
    except ConfigError as error:
        known = [each.name for each in fields(chosen)]
        raise ConfigError(placed(str(error), "federation", known)) from None


def epsilon_row(stated: Statement) -> Epsilon:
    """Convert one privacy statement to the form of `result.json`."""
    return {
        "value": stated.epsilon,
        "delta": stated.delta,
        "unit": stated.unit,
        "relation": stated.relation,
        "accountant": stated.accountant,
        "sampling": stated.sampling,
        "trust": stated.trust,
        "simulated": stated.simulated,
        "text": str(stated),
    }


OF_SEED = re.compile(r"-seed-(\d+)/client-\d+$")
"""End of the name of an owner in a run of several seeds."""


def epsilon_of_all_arms(merged: Merged, delta: float) -> Epsilon:
    """Return the privacy statement against a reader of all private models of the run.

    The same record's uses in all of them compose. A partition's name means the same records in all
    arms of one seed. Where another seed may have placed a record in another partition, such as by
    another order of classes, the seeds compose by addition instead:

        epsilon(delta) <= sum over the S seeds of epsilon_seed(delta / S)
    """
    groups = _groups(merged)
    each = [_composed(names, merged, delta / len(groups)) for names in groups]
    units = max(_units(names, merged) for names in groups)
    return epsilon_row(replace(merged.statement(delta), epsilon=sum(each), units=units))


def _groups(merged: Merged) -> list[dict[str, str]]:
    """Group the partitions in which equal names mean the same records.

    Returns:
        One dictionary for each group, from the partition's name in the merged account to the name
        of its records. There is one group for all seeds if the rules that assign records to
        partitions are known and equal, and else one group per seed.
    """
    seeds: dict[str, dict[str, str]] = {}
    rules: dict[str, set[str]] = {}
    for part in merged.parts:
        found = OF_SEED.search(part.account.owner)
        own = seeds.setdefault(found[1] if found else "", {})
        for name in part.account.sizes:
            full = f"{part.account.owner}/{name}"
            own[full] = full.split("/client-", 1)[1]
            rules.setdefault(own[full], set()).add(part.account.rules.get(name, ""))
    alike = all(len(known) == 1 and "" not in known for known in rules.values())
    if alike:
        return [{name: record for group in seeds.values() for name, record in group.items()}]
    return list(seeds.values())


def _composed(names: Mapping[str, str], merged: Merged, delta: float) -> float:
    """Return the largest epsilon of a record, with all partitions of one record name composed."""
    same = groupby(sorted(names, key=names.__getitem__), key=names.__getitem__)
    return max(merged.epsilon(list(group), delta=delta) for _, group in same)


def _units(names: Mapping[str, str], merged: Merged) -> int:
    """Return the number of records; partitions with one record name are counted once."""
    return sum({record: merged.sizes[name] for name, record in names.items()}.values())


def spending(account: Account, delta: float) -> list[Spending]:
    """List the charges of the partition with the largest epsilon; equal charges are added up."""
    worst, _ = account.worst(delta)
    steps: dict[tuple[str, float, float], int] = {}
    for entry in account.entries:
        if worst in entry.scope:
            key = (entry.purpose, entry.noise_multiplier, entry.scope[worst])
            steps[key] = steps.get(key, 0) + entry.steps
    return [
        {"purpose": purpose, "noise_multiplier": noise, "sampling_rate": rate, "steps": count}
        for (purpose, noise, rate), count in steps.items()
    ]


def ledger_files(arm: Path) -> list[Path]:
    """Return the ledgers of an arm: its own, or those of its clients.

    Raises:
        LedgerError: if a ledger that the arm's checkpoints refer to is missing.
    """
    refuse_missing_ledgers(arm)
    return sorted([*arm.glob("ledger.jsonl"), *arm.glob("clients/*/ledger.jsonl")])


def account_of_arm(arm: Path, server: "Server | None" = None) -> Merged:
    """Return the account of a private arm: from its ledgers, or from the reports of its clients.

    Args:
        arm: folder of the arm's training.
        server: server of a deployment that is training it, whose folder may be an exchange behind.

    Returns:
        The account, empty if there is none. Its parts have no lines if the ledgers are at the sites
        of a deployment.

    Raises:
        LedgerError: if a ledger that the arm's checkpoints refer to is missing.
    """
    if (arm / "clients").is_dir() or (arm / "ledger.jsonl").exists():
        return merge(ledger_files(arm))
    # only a federation has reports, and Flower need not be imported for anything else
    from perdure.federated.reported_accounts import joined_of

    return joined_of(server or arm, lambda client: f"{arm.name}/client-{client}")


def attack_row(chosen: AttackConfig | None) -> AttackResult | None:
    """Describe the attack for robust accuracy, with its strength."""
    if chosen is None:
        return None
    attack = chosen.attack
    row: AttackResult = {"name": chosen.name, "epsilon": attack.epsilon, "norm": attack.norm}
    if hasattr(attack, "steps"):
        row["steps"] = attack.steps
    if not attack.OWN_LOSSES:
        row["objectives"] = list(OBJECTIVES)
    return row


def explained_arm(config: Config) -> Arm:
    """Return the arm to explain: the first arm with a memory, or else the first arm."""
    with_memory = [
        arm
        for arm in config.arms
        if arm.strategy.privacy_cost.reuses_past_records and not arm.private
    ]
    return (with_memory or list(config.arms))[0]


def collect_explanations(config: Config, folder: Path) -> Explanations | None:
    """Combine the explanations after the first and last experience into one file of the run."""
    if not config.explain:
        return None
    from safetensors.torch import load_file

    arm = explained_arm(config)
    trial = config.trial(arm, config.all_seeds[0])
    files = sorted((folder / "arms" / trial).glob("explanation-*.safetensors"))
    if not files:  # its training diverged
        return None
    parts = [load_file(path) for path in files]
    joined = {"inputs": parts[0]["inputs"], "labels": parts[0]["labels"]}
    save_tensors(
        folder / EXPLAINED, joined | {"values": torch.stack([part["values"] for part in parts])}
    )
    moments = [f"after experience {int(path.stem.split('-')[1]) + 1}" for path in files]
    return {
        "file": EXPLAINED,
        "method": config.explain.method,
        "moments": moments,
        "arm": arm.file,
    }
