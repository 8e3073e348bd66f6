"""A run on disk: every arm of a config, alone or federated, resumable at any moment, and its result.

    runs/NAME/config.toml       what was asked
    runs/NAME/result.json       the result, in the schema of `perdure.report.result`
    runs/NAME/metrics.jsonl     one line per arm and experience, appended as it goes
    runs/NAME/ledger.jsonl      the ledgers of all arms and clients, each with its own chain and head
    runs/NAME/checkpoint/       the final model of every arm
    runs/NAME/arms/ARM/         the arm's own checkpoints, clients and `private/` (keys and memory; never exported)
"""

import json
import os
import time
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass, field
from itertools import groupby
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from perdure.adversarial.attacks import FGSM, PGD, Attack
from perdure.adversarial.evaluate import robust_accuracy
from perdure.checkpoint import Snapshot, Store, write_atomically, write_json
from perdure.config import Arm, AttackConfig, Config
from perdure.datasets import load
from perdure.environment import machine, versions
from perdure.errors import RunError
from perdure.learner import Learner
from perdure.metrics import summarise
from perdure.models import build
from perdure.privacy.account import Account
from perdure.privacy.ledger import Merged, merge
from perdure.seeds import generator
from perdure.streams import Stream, split

if TYPE_CHECKING:
    from perdure.federated.server import Federation

Progress = Callable[[str, float], None]
"""Called as progress(arm name, share done)."""

EXPLAINED = "explanations.safetensors"


def silent(arm: str, share: float) -> None:
    """Show nothing."""


# --------------------------------------------------------------------------- a whole run


def run(config: Config, text: str, folder: Path, progress: Progress = silent) -> dict[str, Any]:
    """Run every arm and write the run's files; a run that was stopped goes on where it was.

    Args:
        config: what to do. text: the TOML it was read from, kept beside the result.
        folder: of the run; created. progress: see `Progress`.

    Raises:
        RunError: when the folder holds a run of another config.
    """
    keep_config(folder, text)
    torch.set_num_threads(config.threads)
    stream = open_stream(config)
    log = MetricsLog(folder / "metrics.jsonl")
    rows = [ArmRun(config, arm, stream, folder, log, progress).run() for arm in config.arms]
    ledgers = [path for arm in config.arms for path in ledger_files(folder / "arms" / arm.name)]
    merged = merge(ledgers) if ledgers else None
    if merged:
        merged.export(folder / "ledger.jsonl")
    result = summary(config, stream, rows, merged, collect_explanations(config, folder))
    write_json(folder / "result.json", result)
    return result


def keep_config(folder: Path, text: str) -> None:
    """Write the config, or see that the folder's is the same."""
    path = folder / "config.toml"
    if path.exists() and path.read_text() != text:
        raise RunError(f"{folder} holds a run of another config; give another --out, or remove the folder")
    write_atomically(path, text.encode())


def open_stream(config: Config) -> Stream:
    """Load the data and split it into experiences."""
    data = load(config.data.name, config.data.root, seed=config.seed)
    order = config.seed if config.data.shuffle_classes else None
    return split(data, scenario=config.data.scenario, experiences=config.data.experiences, seed=order)


# --------------------------------------------------------------------------- metrics.jsonl


class MetricsLog:
    """Lines of JSON, each under a key; a line that is written again after a resume is not repeated."""

    def __init__(self, path: Path) -> None:
        self._path = path
        kept = path.read_text().splitlines(keepends=True) if path.exists() else []
        whole = [line for line in kept if line.endswith("\n")]
        if whole != kept:
            write_atomically(path, "".join(whole).encode())
        self.rows: dict[tuple[str, int], dict[str, Any]] = {}
        for line in whole:
            row = json.loads(line)
            self.rows[row["arm"], row["experience"]] = row

    def append(self, row: Mapping[str, Any]) -> None:
        """Write one line for an arm after an experience, unless it is there."""
        key = (row["arm"], row["experience"])
        if key in self.rows:
            return
        self.rows[key] = dict(row)
        self._path.parent.mkdir(parents=True, exist_ok=True)
        with self._path.open("a") as file:
            file.write(json.dumps(row) + "\n")
            file.flush()
            os.fsync(file.fileno())


# --------------------------------------------------------------------------- one arm


@dataclass
class ArmRun:
    """One model of the run: trained alone or federated, measured, explained."""

    config: Config
    arm: Arm
    stream: Stream
    run_folder: Path
    log: MetricsLog
    progress: Progress
    _blocks_done: int = field(default=0, init=False)

    def __post_init__(self) -> None:
        self.folder = self.run_folder / "arms" / self.arm.name

    def run(self) -> dict[str, Any]:
        """Train if that is not done yet, and return the arm's row of the result."""
        done = self.folder / "arm.json"
        if not done.exists():
            start = time.perf_counter()
            row = self._train()
            write_json(done, row | {"seconds": time.perf_counter() - start})
        self.progress(self.arm.name, 1.0)
        loaded: dict[str, Any] = json.loads(done.read_text())
        return loaded

    def learner(self, stream: Stream, client: int = 0, folder: Path | None = None) -> Learner:
        """Return a fresh learner for one party of this arm."""
        config, private = self.config, self.arm.private
        training = (config.private_training or config.training) if private else config.training
        rounds = config.federation.rounds if config.federation else 1
        return Learner(
            model=build(config.model, input_shape=stream.input_shape, num_classes=stream.num_classes, seed=config.seed),
            strategy=self.arm.strategy, optimizer=training.factory(), epochs=training.epochs,
            iterations=training.iterations, batch_size=training.batch_size, seed=config.seed, blocks=rounds,
            privacy=config.privacy if private else None, reset_optimizer=training.reset_optimizer,
            client=client, owner=f"{self.arm.name}/client-{client}", folder=folder, callbacks=[self._listen],
        )  # fmt: skip

    def _train(self) -> dict[str, Any]:
        learner = self._fit()
        matrix = torch.tensor(learner.matrix, dtype=torch.float64)
        Store(self.run_folder / "checkpoint" / self.arm.name).save(1, Snapshot(tensors=learner.snapshot().tensors))
        measures = asdict(summarise(matrix, self._untrained()))
        names = ("average_accuracy", "learning_accuracy", "forgetting", "backward_transfer", "forward_transfer")
        return {
            "strategy": self.arm.file, "options": repr(self.arm.strategy), "private": self.arm.private,
            "accuracy_matrix": learner.matrix, **{name: measures[name] for name in names},
            "robust_accuracy": self._robust(learner), **self._privacy(),
        }  # fmt: skip

    def _fit(self) -> Learner:
        if self.config.federation is None:
            learner = self.learner(self.stream, folder=self.folder)
            learner.fit(self.stream)
            return learner
        from perdure.federated import fit_federated

        return fit_federated(
            self.learner, self._client_streams(), self.stream, self._federation(), folder=self.folder,
            callbacks=[self._listen],
        )  # fmt: skip

    def _client_streams(self) -> list[Stream]:
        from perdure.federated.partition import dirichlet

        chosen = self.config.federation
        assert chosen is not None
        return dirichlet(
            self.stream, clients=chosen.clients, alpha=chosen.alpha, min_size=chosen.min_size, seed=self.config.seed
        )

    def _federation(self) -> "Federation":
        from perdure.federated.server import Federation

        chosen = self.config.federation
        assert chosen is not None
        return Federation(
            clients=chosen.clients, rounds=chosen.rounds, fraction=chosen.fraction, seed=self.config.seed,
            engine=chosen.engine,
        )  # fmt: skip

    # ------------------------------------------------------------------ what is watched while it trains

    def _listen(self, point: str, learner: Learner) -> None:
        if point == "block.end":
            self._blocks_done += 1
            self.progress(self.arm.name, min(0.99, self._blocks_done / self._all_blocks()))
        elif point == "evaluated":
            index = len(learner.matrix) - 1
            self._explain(learner, index)
            self.log.append({
                "arm": self.arm.name, "experience": index, "accuracy": learner.matrix[index], "epsilon": self._spent(),
            })  # fmt: skip

    def _all_blocks(self) -> int:
        chosen = self.config.federation
        per_experience = chosen.rounds * chosen.clients * chosen.fraction if chosen else 1
        return max(1, round(len(self.stream) * per_experience))

    def _spent(self) -> float | None:
        account = self._account()
        assert account is None or self.config.privacy is not None
        return account.worst(self.config.privacy.delta)[1] if account and self.config.privacy else None

    def _account(self) -> Merged | None:
        return merge(ledger_files(self.folder)) if self.arm.private else None

    def _explain(self, learner: Learner, index: int) -> None:
        last = len(self.stream) - 1
        if not self.config.explain or self.arm != explained_arm(self.config) or index not in (0, last):
            return
        from perdure.explain import kernel_shap

        chosen = self.stream[0].test
        inputs, labels = chosen.inputs[: self.config.explain], chosen.labels[: self.config.explain]
        blank = torch.zeros_like(inputs[:1])
        with torch.no_grad():
            values = kernel_shap(
                learner.predictor(0, after=index), inputs, blank, targets=labels,
                generator=generator(self.config.seed, "explain", index),
            ).values  # fmt: skip
        tensors = {"inputs": inputs, "labels": labels, "values": values}
        save_tensors(self.folder / f"explanation-{index}.safetensors", tensors)

    # ------------------------------------------------------------------ what is measured at the end

    def _untrained(self) -> Tensor:
        fresh = self.learner(self.stream)
        fresh.callbacks, fresh.privacy = (), None
        fresh.prepare(self.stream)
        fresh.position.experience = len(self.stream)
        return torch.tensor(fresh.evaluate(self.stream), dtype=torch.float64)

    def _robust(self, learner: Learner) -> float | None:
        if self.config.attack is None:
            return None
        attack, last = attack_of(self.config.attack), len(self.stream) - 1
        shares = [
            robust_accuracy(
                learner.predictor(e.index, after=last), e.test.inputs, e.test.labels, attack,
                generator=generator(self.config.seed, "attack", e.index),
            )
            for e in self.stream
        ]  # fmt: skip
        return sum(shares) / len(shares)

    def _privacy(self) -> dict[str, Any]:
        account = self._account()
        if account is None or self.config.privacy is None:
            return {"epsilon": None, "epsilon_over_time": None, "spending": []}
        return {
            "epsilon": epsilon_row(account, self.config.privacy.delta),
            "epsilon_over_time": [self.log.rows[self.arm.name, e.index]["epsilon"] for e in self.stream],
            "spending": spending(account, self.config.privacy.delta),
        }


# --------------------------------------------------------------------------- pieces of the result


def summary(
    config: Config,
    stream: Stream,
    rows: list[dict[str, Any]],
    merged: Merged | None,
    explanations: dict[str, Any] | None,
) -> dict[str, Any]:
    """Put the result together, schema 1."""
    return {
        "schema": 1, "name": config.name, "seed": config.seed,
        "stream": {
            "name": stream.name, "scenario": stream.scenario, "experiences": len(stream),
            "classes": [list(e.classes) for e in stream],
        },
        "model": asdict(config.model), "federation": federation_row(config, stream),
        "environment": versions() | {k: v for k, v in machine().items() if v is not None},
        "attack": asdict(config.attack) if config.attack else None, "arms": rows,
        "epsilon_of_all_arms": together(merged, config.privacy.delta) if merged and config.privacy else None,
        "explanations": explanations,
    }  # fmt: skip


def federation_row(config: Config, stream: Stream) -> dict[str, Any] | None:
    """Federation's settings with the declared size of every client in every experience."""
    if config.federation is None:
        return None
    from perdure.federated.partition import dirichlet

    chosen = config.federation
    clients = dirichlet(stream, clients=chosen.clients, alpha=chosen.alpha, min_size=chosen.min_size, seed=config.seed)
    return asdict(chosen) | {"declared_sizes": [[e.train.declared_size for e in own] for own in clients]}


def epsilon_row(account: Account, delta: float) -> dict[str, Any]:
    """One privacy statement as the result keeps it."""
    stated = account.statement(delta)
    return {
        "value": stated.epsilon, "delta": stated.delta, "unit": stated.unit, "relation": stated.relation,
        "accountant": stated.accountant, "sampling": stated.sampling, "trust": stated.trust,
        "simulated": stated.simulated, "text": str(stated),
    }  # fmt: skip


def together(merged: Merged, delta: float) -> dict[str, Any]:
    """Statement for somebody who sees every model of the run: the same record's uses in all arms compose."""
    record = {name: name.split("/client-", 1)[1] for name in merged.partitions}
    same = groupby(sorted(record, key=lambda name: record[name]), key=lambda name: record[name])
    worst = max(merged.epsilon(list(names), delta=delta) for _, names in same)
    row = epsilon_row(merged, delta)
    return row | {"value": worst, "text": row["text"].replace(f"{row['value']:.2f}", f"{worst:.2f}", 1)}


def spending(account: Account, delta: float) -> list[dict[str, Any]]:
    """What the worst partition's budget went to, equal charges added up."""
    worst, _ = account.worst(delta)
    steps: dict[tuple[str, float, float], int] = {}
    for entry in account.entries:
        if worst in entry.scope:
            key = (entry.purpose, entry.noise_multiplier, entry.scope[worst])
            steps[key] = steps.get(key, 0) + entry.steps
    names = ("purpose", "noise_multiplier", "sampling_rate")
    return [dict(zip(names, key, strict=True)) | {"steps": count} for key, count in steps.items()]


def ledger_files(arm: Path) -> list[Path]:
    """Ledgers of an arm: its own, or its clients'."""
    return sorted([*arm.glob("ledger.jsonl"), *arm.glob("clients/*/ledger.jsonl")])


def attack_of(config: AttackConfig) -> Attack:
    """Make the attack that the config names."""
    if config.name == "fgsm":
        return FGSM(epsilon=config.epsilon, norm=config.norm)
    return PGD(epsilon=config.epsilon, norm=config.norm, steps=config.steps)


def explained_arm(config: Config) -> Arm:
    """Arm whose predictions are explained: the first with a memory, else the first."""
    with_memory = [arm for arm in config.arms if arm.strategy.asks.reuses and not arm.private]
    return (with_memory or list(config.arms))[0]


def collect_explanations(config: Config, folder: Path) -> dict[str, Any] | None:
    """Join the explanations of both moments into the run's file."""
    if not config.explain:
        return None
    from safetensors.torch import load_file

    arm = explained_arm(config)
    files = sorted((folder / "arms" / arm.name).glob("explanation-*.safetensors"))
    parts = [load_file(path) for path in files]
    joined = {"inputs": parts[0]["inputs"], "labels": parts[0]["labels"]}
    save_tensors(folder / EXPLAINED, joined | {"values": torch.stack([part["values"] for part in parts])})
    moments = [f"after experience {int(path.stem.split('-')[1]) + 1}" for path in files]
    return {"file": EXPLAINED, "moments": moments, "arm": arm.file}


def save_tensors(path: Path, tensors: Mapping[str, Tensor]) -> None:
    """Write safetensors atomically."""
    from safetensors.torch import save

    write_atomically(path, save({name: value.detach().cpu().contiguous() for name, value in tensors.items()}))
