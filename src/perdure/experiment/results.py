"""The pieces of a run's result, put together in the schema of `perdure.experiment.result_schema`.

They are privacy statements, federation, attack and explanations.
"""

from dataclasses import asdict, replace
from itertools import groupby
from pathlib import Path
from typing import Any

import torch

from perdure.data.experience import Stream, declared_size_of
from perdure.experiment.config import Arm, AttackConfig, Config
from perdure.experiment.result_schema import (
    SCHEMA,
    ArmResult,
    AttackResult,
    Epsilon,
    Explanations,
    Result,
    Spending,
)
from perdure.learner.folder_claims import refuse_missing_ledgers
from perdure.learner.learner import Learner
from perdure.metrics import expected_calibration_error
from perdure.privacy.ledger.account import Account, Statement
from perdure.privacy.ledger.merged import Merged
from perdure.utils.atomic_files import save_tensors
from perdure.utils.chunking import by_pieces
from perdure.utils.environment import machine, versions

EXPLAINED = "explanations.safetensors"


def summary(
    config: Config,
    stream: Stream,
    arms: list[ArmResult],
    merged: Merged | None,
    explanations: Explanations | None,
) -> Result:
    """Put the result together."""
    return {
        "schema": SCHEMA,
        "name": config.name,
        "seed": config.seed,
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
        "federation": federation_row(config, stream),
        "environment": versions() | {k: v for k, v in machine().items() if v is not None},
        "attack": attack_row(config.attack),
        "arms": arms,
        "epsilon_of_all_arms": epsilon_of_all_arms(merged, config.privacy.delta)
        if merged and config.privacy
        else None,
        "explanations": explanations,
    }


def calibration(learner: Learner, stream: Stream) -> list[float]:
    """Expected calibration error on every stage's test records at the end of the stream."""
    after = max(0, learner.position.experience - 1)
    with torch.no_grad():
        return [
            expected_calibration_error(
                torch.softmax(
                    by_pieces(learner.predictor(stage.last, after=after), stage.test.inputs), dim=1
                ),
                stage.test.labels,
            )
            for stage in stream.to(learner.device).stages
        ]


def federation_row(config: Config, stream: Stream) -> dict[str, Any] | None:
    """Federation's settings with the declared size of every client in every experience."""
    if config.federation is None:
        return None
    clients = client_streams(config, stream)
    return asdict(config.federation) | {
        "declared_sizes": [[e.train.declared_size for e in own] for own in clients]
    }


def client_streams(config: Config, stream: Stream) -> list[Stream]:
    """Split the stream over the clients.

    Where an arm of the run is private, a record's client is its own hash's, for all arms alike.
    """
    from perdure.data.client_splits import dirichlet

    chosen = config.federation
    assert chosen is not None
    return dirichlet(
        stream,
        clients=chosen.clients,
        alpha=chosen.alpha,
        min_size=chosen.min_size,
        seed=config.seed,
        exact=config.privacy is None,
    )


def epsilon_row(stated: Statement) -> Epsilon:
    """One privacy statement as the result keeps it."""
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


def epsilon_of_all_arms(merged: Merged, delta: float) -> Epsilon:
    """Statement for somebody who sees all private models.

    The same record's uses in all arms compose.
    """
    record = {name: name.split("/client-", 1)[1] for name in merged.partitions}
    same = groupby(sorted(record, key=lambda name: record[name]), key=lambda name: record[name])
    worst = max(merged.epsilon(list(names), delta=delta) for _, names in same)
    units = sum({record[name]: size for name, size in merged.sizes.items()}.values())
    return epsilon_row(replace(merged.statement(delta), epsilon=worst, units=units))


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
    """Ledgers of an arm: its own, or its clients'.

    Raises:
        LedgerError: where one that the arm's checkpoints know is gone.
    """
    refuse_missing_ledgers(arm)
    return sorted([*arm.glob("ledger.jsonl"), *arm.glob("clients/*/ledger.jsonl")])


def attack_row(chosen: AttackConfig | None) -> AttackResult | None:
    """Attack behind robust accuracy, as far as the report names its strength."""
    if chosen is None:
        return None
    attack = chosen.attack
    row: AttackResult = {"name": chosen.name, "epsilon": attack.epsilon, "norm": attack.norm}
    if hasattr(attack, "steps"):
        row["steps"] = attack.steps
    return row


def explained_arm(config: Config) -> Arm:
    """Arm whose predictions are explained: the first with a memory, else the first."""
    with_memory = [
        arm
        for arm in config.arms
        if arm.strategy.privacy_cost.reuses_past_records and not arm.private
    ]
    return (with_memory or list(config.arms))[0]


def collect_explanations(config: Config, folder: Path) -> Explanations | None:
    """Join the explanations of both moments into the run's file."""
    if not config.explain:
        return None
    from safetensors.torch import load_file

    arm = explained_arm(config)
    files = sorted((folder / "arms" / arm.name).glob("explanation-*.safetensors"))
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
