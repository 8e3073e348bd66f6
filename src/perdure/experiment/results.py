"""Parts of a run's result, combined in the schema of `perdure.experiment.result_schema`.

The parts are privacy statements, federation, attack and explanations.
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
    """Combine the parts into the result of the run."""
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
    """Expected calibration error on the test records of each stage, at the end of the stream."""
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
    """Settings of the federation, with the declared size of each client in each experience."""
    if config.federation is None:
        return None
    clients = client_streams(config, stream)
    return asdict(config.federation) | {
        "declared_sizes": [[e.train.declared_size for e in own] for own in clients]
    }


def client_streams(config: Config, stream: Stream) -> list[Stream]:
    """Split the stream over the clients.

    If an arm of the run is private, the client of a record depends only on the record's hash, in
    all arms.
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
    """Convert one privacy statement to the form that the result has."""
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
    """Privacy statement for an observer of all private models.

    The charges of a record in all arms are composed.
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
    """Return the ledgers of an arm: its own, or those of its clients.

    Raises:
        LedgerError: if a ledger that the arm's checkpoints refer to is missing.
    """
    refuse_missing_ledgers(arm)
    return sorted([*arm.glob("ledger.jsonl"), *arm.glob("clients/*/ledger.jsonl")])


def attack_row(chosen: AttackConfig | None) -> AttackResult | None:
    """Describe the attack for robust accuracy, with its strength."""
    if chosen is None:
        return None
    attack = chosen.attack
    row: AttackResult = {"name": chosen.name, "epsilon": attack.epsilon, "norm": attack.norm}
    if hasattr(attack, "steps"):
        row["steps"] = attack.steps
    return row


def explained_arm(config: Config) -> Arm:
    """Arm whose predictions are explained: the first one with a memory, or else the first."""
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
