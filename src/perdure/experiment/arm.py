"""One arm of a run: its learner or federation, its checkpoints and its results."""

import json
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property, partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from perdure.adversarial import Attack
from perdure.data.experience import Stream
from perdure.doctor import Finding, Monitor, in_order
from perdure.errors import NonFiniteError, RunawayError
from perdure.experiment.certified import certified_after, certified_numbers
from perdure.experiment.config import Arm, Config
from perdure.experiment.explanations import explanation_of
from perdure.experiment.federation_rows import FederationRows
from perdure.experiment.finding_rows import finding_of, finding_row
from perdure.experiment.metrics_log import MetricsLog
from perdure.experiment.reasons import reason_numbers, reasons_after, without_reasons
from perdure.experiment.result_schema import Numbers, PrivacyResult, TrialResult
from perdure.experiment.results import (
    account_of_arm,
    by_class,
    class_row,
    client_streams,
    epsilon_row,
    explained_arm,
    group_rows,
    spending,
)
from perdure.experiment.robustness import (
    RobustnessRow,
    robust_numbers,
    robustness_after,
    without_robustness,
)
from perdure.experiment.starts import model_of, started
from perdure.experiment.stream_checks import refuse_unmeasurable
from perdure.experiment.training_config import TrainingConfig
from perdure.learner.learner import Callback, Learner
from perdure.learner.progress import Watch
from perdure.loggers import Logger
from perdure.metrics import summarise
from perdure.privacy.ledger.merged import Merged
from perdure.tasks import SingleLabel
from perdure.tasks.losses import Loss
from perdure.utils.atomic_files import save_tensors, write_json

if TYPE_CHECKING:
    from flwr.serverapp import Grid

    from perdure.federated.server import Server, ServerCallback

GridOfTrial = Callable[[str], "Grid"]
Progress = Callable[[str, float, str], None]
"""Function that is called as progress(arm name, share done, state in words)."""


def silent(arm: str, share: float, state: str) -> None:
    """Default progress function, which shows nothing."""


def nothing() -> None:
    """Default of functions that are called before a training."""


# --------------------------------------------------------------------------- a whole run


def open_stream(config: Config, *, without: int | None = None) -> Stream:
    """Load the data of a config, and split it into experiences.

    Args:
        config: config with the data set and the split.
        without: id of a training record to remove before the split, for an audit; None for none.

    Raises:
        ConfigError: if the data cannot be split or explained as configured.
        DataError: if the data are missing or damaged.
    """
    private = config.privacy is not None
    stream = started(config, config.data.open(seed=config.seed, private=private, without=without))
    refuse_unmeasurable(config, stream)
    return stream


# --------------------------------------------------------------------------- one arm


@dataclass
class ArmRun:
    """Training, evaluation and explanation of one arm, alone or in a federation."""

    config: Config
    arm: Arm
    stream: Stream
    run_folder: Path
    log: MetricsLog
    progress: Progress = silent
    callbacks: Sequence[Callback] = ()
    listen: Callable[[Any], None] | None = None
    name: str = ""
    begins: Callable[[], None] = nothing
    """Function that is called before a training of one learner begins."""
    grid: "GridOfTrial | None" = None
    """Function from the trial's name to the grid of a deployment; None to train in this process."""
    findings: Sequence[Finding] = ()
    """Findings of the doctor about this arm, for its row of the result."""
    monitor: Monitor = field(default_factory=Monitor)
    """Monitor of all trainings of the arm."""
    explained: bool = True
    """False to draw no explanations: one seed's model is drawn."""

    def __post_init__(self) -> None:
        self.name = self.name or self.arm.name
        if self.config.attack is not None and self.monitor.attack is None:
            self.monitor = Monitor(attack=self.config.attack.on(self.stream))
        if self.config.certificate is not None:
            self.config.certificate.refuse_misfits(self.stream)
        self.monitor.groups = self.config.fairness
        self.folder = self.run_folder / "arms" / self.name
        self._clock = self.folder / "seconds.json"
        self._watched = self.folder / "findings.json"
        self._federated = FederationRows()
        self._server: Server | None = None
        before = float(json.loads(self._clock.read_text())) if self._clock.exists() else 0.0
        self._began = time.perf_counter() - before

    def run(self) -> TrialResult:
        """Train the arm, unless an earlier process has, and return its row of the run's result.

        If training diverged, the row has the reason in `failure`, and no measurements.
        """
        done = self._done
        if not self.finished:
            self.progress(self.name, 0.0, "")
            write_json(done, self._row())
        self.progress(self.name, 1.0, "")
        loaded: TrialResult = json.loads(done.read_text())
        return loaded

    @property
    def finished(self) -> bool:
        """Return True if this process or an earlier one has trained the arm."""
        return self._done.exists()

    @property
    def _done(self) -> Path:
        return self.folder / "arm.json"

    def learner(
        self,
        stream: Stream,
        client: int = 0,
        folder: Path | None = None,
        processes: int = 1,
    ) -> Learner:
        """Make a new learner for one party of this arm."""
        config = self.config
        private = self.arm.private
        training = self._training
        blocks = config.federation.rounds if config.federation else training.blocks
        return Learner(
            model=model_of(config, stream),
            strategy=self.arm.strategy,
            optimizer=training.factory(),
            scheduler=training.scheduler,
            epochs=training.epochs,
            iterations=training.iterations,
            evaluate_every=training.evaluate_every,
            batch_size=training.batch_size,
            micro_batch_size=training.micro_batch_size,
            seed=config.seed,
            device=config.device,
            blocks=blocks,
            privacy=config.privacy if private else None,
            reset_optimizer=training.reset_optimizer,
            precision=training.precision,
            compile=training.compile,
            adversary=self._adversary,
            views=training.views.views if training.views else None,
            mixing=training.mixing.mixing if training.mixing else None,
            defence=training.defence.defence if training.defence else None,
            client=client,
            owner=f"{self.name}/client-{client}",
            folder=folder,
            warm_start=config.start is not None and not config.start.public,
            callbacks=[self._listen, self.monitor, *self.callbacks],
            averaging=training.averaging.averaging if training.averaging else None,
            sharpness=training.sharpness,
            l1=training.l1,
            l2=training.l2,
            gradient_noise=training.gradient_noise,
            weight_noise=training.weight_noise,
            validation=training.validation.on(self.stream) if training.validation else None,
            loss=self._loss,
            max_grad_norm=training.max_grad_norm,
            group_weights=training.group_weights,
            fine_tune=training.fine_tune,
            show_progress=False,
            processes=processes,
        )

    @property
    def _training(self) -> TrainingConfig:
        private = self.config.private_training if self.arm.private else None
        return private or self.config.training

    @property
    def _loss(self) -> Loss | None:
        chosen = self.arm.loss or self._training.loss
        return chosen.loss if chosen else None

    @cached_property
    def _adversary(self) -> Attack | None:
        """Attack for adversarial training; its input bounds come from the stream's test records."""
        chosen = self._training.adversary
        return chosen.on(self.stream) if chosen else None

    def untrained(self) -> Learner:
        """Make a learner at the end of the stream whose model has not been trained."""
        fresh = self.learner(self.stream)
        fresh.callbacks = ()
        fresh.privacy = None
        fresh.prepare(self.stream)
        fresh.position.experience = len(self.stream)
        return fresh

    def _row(self) -> TrialResult:
        failure = None
        try:
            learner = self._fit()
            numbers = self._numbers(learner)
            progress = learner.progress
        except (RunawayError, NonFiniteError) as error:
            failure = str(error)
            numbers = self._no_numbers()
            progress = []
        return {
            "seed": self.config.seed,
            "trial": self.name,
            "failure": failure,
            **numbers,
            "progress": progress,
            "findings": list(
                map(finding_row, in_order([*self.findings, *self._watched_findings()]))
            ),
            "absences": [row for rows in self._rows_of("absences") for row in rows],
            **self._federated.result(
                self._rows_of("clients"),
                self._rows_of("accuracy_over_clients"),
                self._rows_of("robust_accuracy_over_clients"),
            ),
            **self._privacy(),
        }

    def _numbers(self, learner: Learner) -> Numbers:
        """Store the trained model, and return its measurements for the run's result."""
        final = {
            n: t
            for n, t in learner.snapshot().tensors.items()
            if n.startswith(("model.", "state."))
        }
        save_tensors(self.run_folder / "checkpoint" / self.name / "model.safetensors", final)
        metric = self.stream.task.metric
        matrix = torch.tensor(learner.matrix, dtype=torch.float64)
        # one stage has no transfer, so the untrained model need not be measured
        untrained = self.untrained().evaluate(self.stream) if len(matrix) > 1 else matrix[0]
        start = torch.as_tensor(untrained, dtype=torch.float64)
        measures = summarise(matrix, start, metric=metric)
        single = isinstance(self.stream.task, SingleLabel)
        classes = by_class(learner, self.stream) if single else None
        fairness = self.config.fairness
        return {
            "accuracy_matrix": learner.matrix,
            "average_accuracy": measures.average_accuracy,
            "learning_accuracy": measures.learning_accuracy,
            "forgetting": measures.forgetting,
            "backward_transfer": measures.backward_transfer,
            "forward_transfer": measures.forward_transfer,
            "worst_experience_accuracy": measures.worst_experience_accuracy,
            "area_under_accuracy": measures.area_under_accuracy,
            "calibration_error": [each.calibration_error for each in classes] if classes else None,
            "by_class": [class_row(each) for each in classes] if classes else None,
            "by_group": group_rows(learner, self.stream, fairness) if fairness else None,
            "state_bytes": sum(value.nbytes for value in learner.state.values()),
            **robust_numbers(self._rows_of("robustness")),
            **certified_numbers(self._rows_of("certified")),
            **reason_numbers(self._rows_of("reasons")),
            "seconds": self._seconds(),
        }

    def _no_numbers(self) -> Numbers:
        """Return the measurements of an arm whose training diverged: null, but for the time."""
        return {
            "accuracy_matrix": [],
            "average_accuracy": None,
            "learning_accuracy": None,
            "forgetting": None,
            "backward_transfer": None,
            "forward_transfer": None,
            "worst_experience_accuracy": None,
            "area_under_accuracy": None,
            "calibration_error": None,
            "by_class": None,
            "by_group": None,
            "state_bytes": 0,
            **without_robustness(),
            **certified_numbers([]),
            **without_reasons(),
            "seconds": self._seconds(),
        }

    def _fit(self) -> Learner:
        if self.config.federation is None:
            self.begins()
            processes = self.config.processes
            learner = self.learner(self.stream, folder=self.folder, processes=processes)
            watch = Watch(partial(self.progress, self.name))
            learner.callbacks = [*learner.callbacks, *self._loggers(), watch]
            learner.fit(self.stream)
            return learner
        from perdure.experiment.served_federation import federation_of, serve_on
        from perdure.federated import run_federation
        from perdure.federated.progress import ExchangeWatch

        chosen = self.config.federation
        federation = federation_of(chosen, self.config.seed)
        # callbacks that watch a run cannot be sent to Ray's processes
        party = (
            self if chosen.engine == "inprocess" else replace(self, progress=silent, callbacks=())
        )
        exchanges = ExchangeWatch(partial(self.progress, self.name))
        loggers = self._loggers()
        try:
            make = partial(party.learner, self.stream)
            streams = client_streams(self.config, self.stream)
            heard: list[ServerCallback] = [partial(self._hear, loggers), exchanges]
            if self.grid is not None:
                grid = self.grid(self.name)
                server = serve_on(grid, make(0), streams, federation, self.folder, heard)
            else:
                server = run_federation(
                    make,
                    streams,
                    federation,
                    folder=self.folder,
                    engine=chosen.engine,
                    callbacks=heard,
                    progress=exchanges.replied,
                    show_progress=False,
                    listen=self.listen,
                )
        finally:
            for logger in loggers:
                logger.close()
        self._federated.ended(server)
        return server.learner

    def _loggers(self) -> list[Logger]:
        """Make the loggers of this training."""
        return [
            each.of_trial(self.name, project=self.config.name, folder=self.run_folder)
            for each in self.config.loggers
        ]

    # -------------------------------------------------------------- what is watched while it trains

    def _hear(self, loggers: Sequence[Logger], point: str, server: "Server") -> None:
        self._server = server
        privacy = self.config.privacy
        account = self._account() if point == "evaluated" and loggers else None
        if account is not None and privacy is not None:
            # the clients have the ledgers, and the server's learner has none
            for logger in loggers:
                statement = account.statement(privacy.delta)
                raw = privacy.diagnostics == "raw"
                logger.log_privacy(statement, server.learner, raw=raw)
        heard: Sequence[Callback] = (self._listen, self.monitor, *self.callbacks, *loggers)
        if point == "evaluated":
            curves = self._federated.evaluated(server)
            for logger in loggers:
                logger.log(curves, server.learner)
        for callback in heard:
            callback(point, server.learner)

    def _listen(self, point: str, learner: Learner) -> None:
        if point == "evaluated" and learner.matrix:
            index = len(learner.matrix) - 1
            self._explain(learner, index)
            self._log(learner, index)
            if self._attack is not None and self.monitor.attack == self._attack:
                self._tell_monitor(self.log.rows[self.name, index]["robustness"])
            write_json(self._clock, self._seconds())
            write_json(self._watched, list(map(finding_row, self._watched_findings())))

    def _log(self, learner: Learner, index: int) -> None:
        """Append the measurements after a stage to `metrics.jsonl`, unless it has them."""
        if (self.name, index) in self.log.rows:
            return
        row = {
            "arm": self.arm.name,
            "seed": self.config.seed,
            "trial": self.name,
            "experience": index,
            "accuracy": learner.matrix[index],
            "epsilon": self._spent(),
        }
        if self._attack is not None:
            robust = robustness_after(learner, self.stream, self._attack, index, self.config.seed)
            row["robustness"] = robust
            self._federated.attacked(robust["robust"], self._attack, self.config.seed)
        if self.config.certificate is not None:
            row["certified"] = certified_after(
                learner, self.stream, self.config.certificate, index, self.config.seed
            )
        if self.config.explain and self.config.explain.drift:
            row["reasons"] = reasons_after(
                learner, self.stream, self.config.explain, self.folder, index, self.config.seed
            )
        self.log.append(row | self._federated.measured)

    def _tell_monitor(self, row: RobustnessRow) -> None:
        """Give the monitor the accuracies under the attack, which it would measure again."""
        clean, robust = (sum(each) / len(each) for each in (row["clean"], row["robust"]))
        self.monitor.take_attack(clean, robust)

    @cached_property
    def _attack(self) -> Attack | None:
        """Attack for robust accuracy, with bounds that fit the stream."""
        return self.config.attack.on(self.stream) if self.config.attack else None

    def _watched_findings(self) -> list[Finding]:
        """Return the monitor's findings of this process, after those of earlier ones of the run.

        A monitor keeps no measurements over a stop, so a resumed run may find less.
        """
        stored = json.loads(self._watched.read_text()) if self._watched.exists() else []
        before = list(map(finding_of, stored))
        known = {(each.rule, each.experience) for each in before}
        now = [each for each in self.monitor.findings if (each.rule, each.experience) not in known]
        return [*before, *now]

    def _seconds(self) -> float:
        """Return the seconds spent on the arm: by this process, and by earlier ones of the run.

        An earlier process counts up to the last experience that it finished.
        """
        return time.perf_counter() - self._began

    def _spent(self) -> float | None:
        account = self._account()
        return (
            account.worst(self.config.privacy.delta)[1] if account and self.config.privacy else None
        )

    def _account(self) -> Merged | None:
        if not self.arm.private:
            return None
        # in a deployment the sites have the ledgers
        return account_of_arm(self.folder, self._server if self.grid is not None else None)

    def _explain(self, learner: Learner, index: int) -> None:
        stages = self.stream.stages
        chosen = self.config.explain
        ends = (0, len(stages) - 1)
        if chosen is None or self.arm != explained_arm(self.config) or index not in ends:
            return
        if not self.explained or len(self.stream.input_shape) < 2:
            return
        tensors = explanation_of(learner, self.stream, chosen, index, self.config.seed)
        save_tensors(self.folder / f"explanation-{index}.safetensors", tensors)

    # ------------------------------------------------------------------ what is measured at the end

    def _rows_of(self, name: str) -> list[Any]:
        """Return the measurements of this name after each stage; [] if there are none."""
        lines = [self.log.rows.get((self.name, stage.number), {}) for stage in self.stream.stages]
        return [line[name] for line in lines if name in line]

    def _privacy(self) -> PrivacyResult:
        account = self._account()
        if account is None or self.config.privacy is None:
            return {"epsilon": None, "epsilon_over_time": None, "spending": []}
        return {
            "epsilon": epsilon_row(account.statement(self.config.privacy.delta)),
            "epsilon_over_time": [
                self.log.rows.get((self.name, stage.number), {}).get("epsilon")
                for stage in self.stream.stages
            ],
            "spending": spending(account, self.config.privacy.delta),
        }
