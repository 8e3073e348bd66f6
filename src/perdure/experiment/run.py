"""A run on disk: every arm of a config, alone or federated, resumable at any moment, and its result.

runs/NAME/config.toml       what was asked
runs/NAME/result.json       the result, in the schema of `perdure.report.wording`
runs/NAME/metrics.jsonl     one line per arm and experience, appended as it goes
runs/NAME/ledger.jsonl      the ledgers of all arms and clients, each with its own chain and head
runs/NAME/checkpoint/ARM/   the arm's final model and strategy state, `model.safetensors`; see `trained`
runs/NAME/arms/ARM/         the arm's own checkpoints, clients and `private/` (keys and memory; never exported)
"""

import json
import math
import os
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass, replace
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any, cast

import torch
from torch import Tensor

from perdure.adversarial.robust_accuracy import robust_accuracy
from perdure.data.datasets.base import load
from perdure.data.scenarios import Stream, split
from perdure.errors import ConfigError, RunError
from perdure.experiment.config import Arm, Config, read
from perdure.experiment.results import (
    attack_of,
    calibration,
    client_streams,
    collect_explanations,
    epsilon_row,
    explained_arm,
    ledger_files,
    spending,
    summary,
)
from perdure.learner.learner import Callback, Learner
from perdure.metrics import summarise
from perdure.models.classifiers import build
from perdure.privacy.ledger.ledger import Merged, merge
from perdure.report.wording import read_result
from perdure.utils.atomic_files import save_tensors, write_atomically, write_json
from perdure.utils.seeding import generator

if TYPE_CHECKING:
    from perdure.federated.server import Server

Progress = Callable[[str, float], None]
"""Called as progress(arm name, share done)."""

TIMINGS = frozenset({"seconds"})
"""Keys of the result that time fills: all that two runs of one config on one machine may differ in."""


def silent(arm: str, share: float) -> None:
    """Show nothing."""


def untimed(value: Any) -> Any:
    """Copy of a result without its timings, to be compared with that of another run."""
    if isinstance(value, dict):
        return {name: untimed(inner) for name, inner in value.items() if name not in TIMINGS}
    return [untimed(inner) for inner in value] if isinstance(value, list) else value


# --------------------------------------------------------------------------- a whole run


def run(
    config: Config, text: str, folder: Path, progress: Progress = silent, callbacks: Sequence[Callback] = ()
) -> dict[str, Any]:
    """Run every arm and write the run's files; a run that was stopped goes on where it was.

    Args:
        config: what to do. text: the TOML it was read from, kept beside the result.
        folder: of the run; created. progress: see `Progress`.
        callbacks: called as callback(point, learner) by every learner of every arm; see `perdure.learner.learner.POINTS`.

    Raises:
        RunError: when the folder holds a run of another config, is in use, or cannot be written.
    """
    with occupied(folder):
        keep_config(folder, text)
        if (folder / "result.json").exists():
            for arm in config.arms:
                progress(arm.name, 1.0)
            return cast(dict[str, Any], read_result(folder))
        torch.set_num_threads(config.threads)
        stream = open_stream(config)
        log = MetricsLog(folder / "metrics.jsonl")
        rows = [ArmRun(config, arm, stream, folder, log, progress, callbacks).run() for arm in config.arms]
        ledgers = [path for arm in config.arms for path in ledger_files(folder / "arms" / arm.name)]
        merged = merge(ledgers) if ledgers else None
        if merged:
            merged.export(folder / "ledger.jsonl")
        explanations = collect_explanations(config, folder)
        write_json(folder / "result.json", summary(config, stream, rows, merged, explanations))
        return cast(dict[str, Any], read_result(folder))


def trained(folder: Path, arm: str) -> Learner:
    """Learner of a finished run's arm with its final model, ready for `predictor` and `evaluate`.

    Args:
        folder: of the run. arm: name of its folder in `checkpoint/`, such as ewc-private.

    Raises:
        RunError: when there is no such arm, or its model cannot be read.
    """
    from safetensors import SafetensorError
    from safetensors.torch import load_file

    config, path = read(folder / "config.toml"), folder / "checkpoint" / arm / "model.safetensors"
    names = [one.name for one in config.arms]
    if arm not in names:
        raise RunError(f"{folder} has no arm {arm!r}; it has {', '.join(names)}")
    try:
        tensors = load_file(path)
    except (OSError, SafetensorError) as error:
        raise RunError(f"{path} cannot be read ({error}); let the run finish first") from None
    chosen = config.arms[names.index(arm)]
    learner = ArmRun(config, chosen, open_stream(config), folder, MetricsLog(folder / "metrics.jsonl")).untrained()
    learner.model.load_state_dict(under("model.", tensors))
    learner.state = learner.state.replace(under("state.", tensors))
    return learner


def under(prefix: str, tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Tensors whose name begins with `prefix`, without it."""
    return {name.removeprefix(prefix): value for name, value in tensors.items() if name.startswith(prefix)}


@contextmanager
def occupied(folder: Path) -> Iterator[None]:
    """Keep the folder to this process; the system gives it up however the process ends.

    Raises:
        RunError: when another process works in it, or it cannot be written.
    """
    import fcntl

    try:
        folder.mkdir(parents=True, exist_ok=True)
        lock = (folder / ".lock").open("a")
    except OSError as error:
        raise RunError(f"{folder} cannot be written ({error.strerror}); give another --out") from None
    with lock:
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError:
            raise RunError(f"{folder} is in use by another process; let it finish, or give another --out") from None
        yield


def keep_config(folder: Path, text: str) -> None:
    """Write the config, or see that the folder's is the same; where nothing was run yet, it may change."""
    path = folder / "config.toml"
    if path.exists() and path.read_bytes() == text.encode():
        return
    if (folder / "arms").exists():
        raise RunError(f"{folder} holds a run of another config; give another --out, or remove the folder")
    write_atomically(path, text.encode())


def open_stream(config: Config) -> Stream:
    """Load the data and split it into experiences.

    Raises:
        ConfigError: when they cannot be split so, or explained. DataError: when they are missing or damaged.
    """
    data = load(config.data.name, config.data.root, seed=config.seed)
    order = config.seed if config.data.shuffle_classes else None
    stream = split(data, scenario=config.data.scenario, experiences=config.data.experiences, seed=order)
    if config.explain and len(stream.input_shape) < 2:
        allowed = f"0 for inputs of shape {stream.input_shape}, which make no picture"
        raise ConfigError.of("explain", config.explain, allowed)
    return stream


# --------------------------------------------------------------------------- metrics.jsonl


class MetricsLog:
    """Lines of JSON, each under a key; a line that is written again after a resume is not repeated."""

    def __init__(self, path: Path) -> None:
        self._path = path
        kept = path.read_bytes().splitlines(keepends=True) if path.exists() else []
        whole = [line for line in kept if line.endswith(b"\n")]
        if whole != kept:
            write_atomically(path, b"".join(whole))
        try:
            rows = [json.loads(line) for line in whole]
            self.rows: dict[tuple[str, int], dict[str, Any]] = {(row["arm"], row["experience"]): row for row in rows}
        except (ValueError, KeyError, TypeError) as error:
            raise RunError(f"{path} is damaged ({error!r}); restore it, or remove the folder") from None

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
    progress: Progress = silent
    callbacks: Sequence[Callback] = ()

    def __post_init__(self) -> None:
        self.folder = self.run_folder / "arms" / self.arm.name
        self._clock = self.folder / "seconds.json"
        before = float(json.loads(self._clock.read_text())) if self._clock.exists() else 0.0
        self._began = time.perf_counter() - before
        self._shown = 0.0

    def run(self) -> dict[str, Any]:
        """Train if that is not done yet, and return the arm's row of the result."""
        done = self.folder / "arm.json"
        if not done.exists():
            self.progress(self.arm.name, 0.0)
            row = self._train()
            write_json(done, row | {"seconds": self._seconds()})
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
            precision=training.precision,
            client=client, owner=f"{self.arm.name}/client-{client}", folder=folder,
            callbacks=[self._listen, *self.callbacks],
        )  # fmt: skip

    def untrained(self) -> Learner:
        """Learner that was shown nothing, at the end of the stream."""
        fresh = self.learner(self.stream)
        fresh.callbacks, fresh.privacy = (), None
        fresh.prepare(self.stream)
        fresh.position.experience = len(self.stream)
        return fresh

    def _train(self) -> dict[str, Any]:
        learner = self._fit()
        final = {n: t for n, t in learner.snapshot().tensors.items() if n.startswith(("model.", "state."))}
        save_tensors(self.run_folder / "checkpoint" / self.arm.name / "model.safetensors", final)
        start = torch.tensor(self.untrained().evaluate(self.stream), dtype=torch.float64)
        measures = asdict(summarise(torch.tensor(learner.matrix, dtype=torch.float64), start))
        return {
            "strategy": self.arm.file, "options": repr(self.arm.strategy), "private": self.arm.private,
            "accuracy_matrix": learner.matrix, **measures, "calibration_error": calibration(learner, self.stream),
            "state_bytes": sum(value.nbytes for value in learner.state.values()),
            "robust_accuracy": self._robust(learner), **self._privacy(),
        }  # fmt: skip

    def _fit(self) -> Learner:
        if self.config.federation is None:
            learner = self.learner(self.stream, folder=self.folder)
            learner.fit(self.stream)
            return learner
        from perdure.federated import Federation, run_federation

        chosen, seed = self.config.federation, self.config.seed
        federation = Federation(clients=chosen.clients, rounds=chosen.rounds, fraction=chosen.fraction, seed=seed)
        # what watches a run cannot be sent to Ray's processes
        party = self if chosen.engine == "inprocess" else replace(self, progress=silent, callbacks=())
        server = run_federation(
            partial(party.learner, self.stream), client_streams(self.config, self.stream), federation,
            folder=self.folder, engine=chosen.engine, callbacks=[self._hear],
        )  # fmt: skip
        return server.learner

    # ------------------------------------------------------------------ what is watched while it trains

    def _hear(self, point: str, server: "Server") -> None:
        for callback in (self._listen, *self.callbacks):
            callback(point, server.learner)

    def _listen(self, point: str, learner: Learner) -> None:
        if point == "step.done":
            self._show(self._share(learner))
        elif point == "evaluated" and learner.matrix:
            index = len(learner.matrix) - 1
            self._explain(learner, index)
            self.log.append({
                "arm": self.arm.name, "experience": index, "accuracy": learner.matrix[index], "epsilon": self._spent(),
            })  # fmt: skip
            self._show((index + 1) / len(self.stream))
            write_json(self._clock, self._seconds())

    def _show(self, share: float) -> None:
        """Tell of every percent once; the last one comes when the arm's row is written."""
        if share >= self._shown + 0.01:
            self._shown = share
            self.progress(self.arm.name, min(0.99, share))

    def _share(self, learner: Learner) -> float:
        """Share of the arm that is done after a learner's step; in a round, clients go in ascending order."""
        here, blocks = learner.position, learner.blocks
        clients = self.config.federation.clients if self.config.federation else 1
        done = blocks * here.step / learner.steps(here.experience)
        whole = math.ceil(done) - 1
        within = (whole + (learner.client + done - whole) / clients) / blocks
        return (here.experience + within) / len(self.stream)

    def _seconds(self) -> float:
        """Seconds spent on the arm by all processes, up to the last experience that each of them finished."""
        return time.perf_counter() - self._began

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

    def _robust(self, learner: Learner) -> float | None:
        if self.config.attack is None:
            return None
        attack, last = attack_of(self.config.attack, self.stream), len(self.stream) - 1
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
            "epsilon": epsilon_row(account.statement(self.config.privacy.delta)),
            "epsilon_over_time": [self.log.rows[self.arm.name, e.index]["epsilon"] for e in self.stream],
            "spending": spending(account, self.config.privacy.delta),
        }
