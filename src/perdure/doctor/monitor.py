"""Monitor: a callback of the learner that watches a training for symptoms of known challenges."""

from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING

from perdure.adversarial import Attack
from perdure.data.groups import Groups, GroupWeights
from perdure.doctor.finding import Cause, Finding, in_order
from perdure.doctor.recorder import Recorder
from perdure.doctor.rounds import RoundRecorder
from perdure.doctor.rules import find, names
from perdure.doctor.rules.base import Rule
from perdure.doctor.stages import StageRecorder
from perdure.doctor.trace import Trace
from perdure.errors import ConfigError, PrivacyError
from perdure.learner.evaluation import refuse_learnt
from perdure.learner.group_measures import GroupMeasures, group_measures
from perdure.learner.learner import Learner
from perdure.utils.checked_fields import CheckedFields

if TYPE_CHECKING:
    from perdure.federated.server import Server

EVERY = 20
"""Fewest steps between two measured steps, unless the user asks for fewer."""
MEASURED = 40
"""Number of measured steps of an experience, if it has enough steps."""
PROBE_EVERY = 3
"""Number of measured steps for each probe on public rows."""
CHECKS = (0.25, 0.5)
"""Shares of an experience at which rules look at it, besides its end."""
OF_CLIENTS: tuple[Cause, ...] = ("wiring", "privacy", "initialisation", "activation")
"""Causes that a client's own training can show. Its losses say little: it has records of few
classes, and its model is replaced in every round."""


@dataclass(kw_only=True, eq=False)
class Monitor(CheckedFields):
    """Callback that watches a training, and collects findings.

    >>> monitor = Monitor(examined=examine(model, stream, ...))
    >>> Learner(model=model, ..., callbacks=[monitor]).fit(stream)
    >>> for finding in monitor.findings:
    ...     print(finding)

    It measures norms of weights, gradients and updates every few steps, runs the model on public
    test records (or on synthetic ones) less often, and reads the accuracy matrix. In a federation
    give it to the learners of the clients, and `monitor.server` to the server.

    Guarantee: under privacy it reads weights, released gradients, public records and declared
    numbers only, which costs no epsilon. Rules of level "debug" read raw training losses, and are
    left out unless the diagnostics are raw. The training does not change.

    Args:
        rules: names or objects of the rules to use; None for all rules that watch.
        every: number of steps between two measured steps, after the first five; None for 40
            measured steps in an experience, at least 20 steps apart.
        groups: groups of public test records that are compared after each experience; None for
            none.
        attack: attack that the model should resist, which is tried on public test records at the
            end of the stream; None for none.
        examined: findings of `examine` about this training, so that `findings` has both in one
            list, and one of them can explain the other.

    Raises:
        ConfigError: if there is no rule of a name.
        PrivacyError: when training begins, if a rule of level "debug" was asked for by name and the
            learner has privacy.
    """

    rules: Sequence[str | Rule] | None = None
    every: int | None = None
    groups: Groups | None = None
    attack: Attack | None = None
    examined: Sequence[Finding] = ()
    _found: list[Finding] = field(default_factory=list, init=False, repr=False)
    _recorders: dict[int, Recorder] = field(default_factory=dict, init=False, repr=False)
    _traces: dict[int, Trace] = field(default_factory=dict, init=False, repr=False)
    _rounds: RoundRecorder | None = field(default=None, init=False, repr=False)
    _stages: StageRecorder = field(init=False, repr=False)

    def __post_init__(self) -> None:
        if self.every is not None and self.every < 1:
            raise ConfigError.of("every", self.every, "a whole number, 1 or more, or None")
        chosen = names() if self.rules is None else self.rules
        made = [find(each, field="rules")() if isinstance(each, str) else each for each in chosen]
        self._rules = [each for each in made if type(each).watch is not Rule.watch]
        self._stages = StageRecorder(attack=self.attack)

    def take_attack(self, clean: float, attacked: float) -> None:
        """Take accuracies that the caller has measured, so that the attack is not run again.

        Args:
            clean: accuracy over the test records of all stages so far, in percent.
            attacked: accuracy on them under `attack`.
        """
        self._stages.under_attack = (clean, attacked)

    @property
    def findings(self) -> list[Finding]:
        """Findings so far, in the order of repair; one that another one explains is left out.

        `Finding.found` names the origin of each: before training, or the experience and step.
        """
        for client, recorder in self._recorders.items():
            self._check(recorder.trace(), client=client)
        return in_order([*self.examined, *self._found])

    def __call__(self, point: str, learner: Learner) -> None:
        """Measure what a point of the loop shows."""
        if point == "step.sampled":
            self._recorder(learner).before_step()
        elif point == "step.done":
            self._step(learner)
        elif point == "experience.begin":
            self._begin(learner)
        elif point == "block.end":
            self._block(learner)
        elif point == "evaluated":
            self._evaluated(learner)
        elif point == "round.begin":
            self._round_begins(learner)
        elif point == "round.end":
            self._round_ends(learner)

    def server(self, point: str, server: "Server") -> None:
        """Callback for the server of a federation."""
        self(point, server.learner)

    # ------------------------------------------------------------------ one party

    def _begin(self, learner: Learner) -> None:
        self._refuse(learner)
        now = self._recorders.get(learner.client)
        index = learner.position.experience
        if now is not None and now.experience == index and now.learner is learner:
            return
        if now is not None:  # an experience that ended early, by validation
            self._check(now.trace(), client=learner.client)
        steps = learner.training.steps(index)
        every = self.every or max(EVERY, steps // MEASURED)
        self._recorders[learner.client] = Recorder(
            learner=learner,
            every=every,
            probe_every=PROBE_EVERY * every,
            loss_shown=_shows_losses(learner),
        )

    def _recorder(self, learner: Learner) -> Recorder:
        """Return the recorder of a learner; a monitor that was added late begins in a step."""
        now = self._recorders.get(learner.client)
        if now is None or now.learner is not learner:
            self._begin(learner)
        return self._recorders[learner.client]

    def _refuse(self, learner: Learner) -> None:
        """Refuse rules and rows that a private learner may not show."""
        if learner.privacy is None:
            return
        refuse_learnt(learner.session, learner.stream)
        debug = [rule.name for rule in self._rules if rule.level == "debug"]
        if self.rules is not None and debug and not _shows_losses(learner):
            raise PrivacyError(
                f"the rule {debug[0]!r} reads raw values of private records; leave it out, or use "
                "Privacy(diagnostics='raw'), which labels the run as not private"
            )

    def _step(self, learner: Learner) -> None:
        recorder = self._recorder(learner)
        recorder.after_step()
        if learner.position.step in (int(share * recorder.steps) for share in CHECKS):
            self._check(recorder.trace(), client=learner.client)

    def _block(self, learner: Learner) -> None:
        if self._rounds is not None and self._rounds.is_open:
            self._rounds.trained(learner)
        recorder = self._recorder(learner)
        if learner.position.step < recorder.steps:
            return
        recorder.end()
        trace = recorder.trace()
        self._check(trace, client=learner.client)
        self._traces[learner.client] = trace
        del self._recorders[learner.client]

    # ------------------------------------------------------------------ a stream, a federation

    def _evaluated(self, learner: Learner) -> None:
        ended = learner.position.experience - 1
        trace = self._traces.get(learner.client)
        if trace is None or trace.experience != ended or self._rounds is not None:
            trace = _blank(ended, private=learner.privacy is not None)
        groups = self.groups
        found = replace(
            trace,
            rounds=tuple(self._rounds.rounds) if self._rounds else (),
            groups=None if groups is None else _groups(learner, ended, groups),
            group_counts=() if groups is None else _group_counts(learner, ended, groups),
        )
        self._check(self._stages.measured(found, learner))

    def _round_begins(self, server: Learner) -> None:
        index = server.position.experience
        if self._rounds is None or self._rounds.experience != index:
            self._rounds = RoundRecorder(experience=index)
        self._rounds.begin(server)

    def _round_ends(self, server: Learner) -> None:
        if self._rounds is not None:
            self._rounds.end(server)
            blank = _blank(self._rounds.experience, private=False)
            self._check(replace(blank, rounds=tuple(self._rounds.rounds)))

    # ------------------------------------------------------------------ rules

    def _check(self, trace: Trace, *, client: int | None = None) -> None:
        """Ask every rule that has found nothing yet in this experience."""
        in_federation = self._rounds is not None and client is not None
        known = {(each.rule, each.cause, each.experience) for each in self._found}
        shown = not trace.private or bool(trace.losses)
        for rule in self._rules:
            if (rule.name, rule.cause, trace.experience) in known:
                continue
            if (in_federation and rule.cause not in OF_CLIENTS) or (
                rule.level == "debug" and not shown
            ):
                continue
            finding = rule.watch(trace)
            if finding is not None:
                self._found.append(finding)


def _shows_losses(learner: Learner) -> bool:
    return learner.privacy is None or learner.privacy.diagnostics == "raw"


def _blank(experience: int, *, private: bool) -> Trace:
    """Make a trace without measurements of steps, for a server or an evaluation."""
    return Trace(experience=experience, steps=0, done=0, private=private, names=(), matrices=())


def _groups(learner: Learner, ended: int, groups: Groups) -> GroupMeasures | None:
    """Measure the groups of the public test records of an experience."""
    number = learner.stream.stage_of(ended).number
    return group_measures(learner, learner.stream, groups)[number]


def _group_counts(learner: Learner, ended: int, groups: Groups) -> tuple[tuple[float, ...], ...]:
    """Count the public test records of an experience by group and class."""
    test = learner.stream.stage_of(ended).test
    weights = GroupWeights(attribute=groups.attribute, counts="reweighing")
    return weights.declared(test, learner.stream.num_classes).class_counts or ()
