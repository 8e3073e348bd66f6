"""Schema of the file `result.json`, which a run writes and reports read."""

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NotRequired, TypedDict, cast

from perdure.errors import RunError

SCHEMA = 2


class Epsilon(TypedDict):
    """Privacy statement of an arm or of the whole run; `text` is the statement as a sentence."""

    value: float
    delta: float
    unit: str
    relation: str
    accountant: str
    sampling: str
    trust: str
    simulated: bool
    text: str


class Spending(TypedDict):
    """Noisy steps of one purpose, such as gradients: part of an arm's privacy cost."""

    purpose: str
    steps: int
    noise_multiplier: float
    sampling_rate: float


class PrivacyResult(TypedDict):
    """Privacy of one arm: its statement, epsilon after each experience, and its charges.

    An arm without privacy has no statement, no epsilons and no charges.
    """

    epsilon: Epsilon | None
    epsilon_over_time: list[float | None] | None
    spending: list[Spending]


class ClassResult(TypedDict):
    """Measures of each class with test records in one experience, at the end of the stream.

    Keys are classes; accuracies and F1 are in percent. `confusion` counts, for each class, the
    records that were predicted as each other class, where there are any.
    """

    macro_f1: float
    accuracy: dict[str, float]
    f1: dict[str, float]
    confusion: dict[str, dict[str, int]]


class GroupResult(TypedDict):
    """Measures of groups of test records in one experience, at the end of the stream.

    The keys are those of `perdure.learner.GroupMeasures`; shares are from 0 to 1.
    """

    attribute: str
    records: dict[str, int]
    accuracy: dict[str, float]
    selection_rate: dict[str, float] | None
    accuracy_difference: float
    demographic_parity_difference: float | None
    equalized_odds_difference: float | None


MEASURES = (
    "average_accuracy",
    "learning_accuracy",
    "forgetting",
    "backward_transfer",
    "forward_transfer",
    "worst_experience_accuracy",
    "area_under_accuracy",
)
"""Keys of `Numbers` that are measures of the accuracy matrix, the fields of `metrics.Summary`."""


class Numbers(TypedDict):
    """Measures of a trained model, or their means over seeds.

    Accuracies are in the unit of the task's metric, which is percent for single-label records, and
    differences in its points. A measure that does not exist for the task is null. `by_class` and
    `by_group` have an entry for each experience of a trial, and no mean over seeds. Robust
    measures, and the percentage of test records whose cross entropy has no gradient, are null
    without an attack. The drift of reasons is null unless `[explain]` asks for it.
    """

    accuracy_matrix: Sequence[Sequence[float | None]]
    average_accuracy: float | None
    learning_accuracy: float | None
    forgetting: float | None
    backward_transfer: float | None
    forward_transfer: float | None
    worst_experience_accuracy: float | None
    area_under_accuracy: float | None
    calibration_error: list[float] | None
    by_class: NotRequired[list[ClassResult] | None]
    by_group: NotRequired[list[GroupResult | None] | None]
    state_bytes: int
    robust_accuracy: float | None
    robust_matrix: NotRequired[Sequence[Sequence[float | None]] | None]
    robust_forgetting: NotRequired[float | None]
    robust_backward_transfer: NotRequired[float | None]
    zero_gradients: NotRequired[float | None]
    certified_accuracy: NotRequired[float | None]
    certified_matrix: NotRequired[Sequence[Sequence[float | None]] | None]
    certified_forgetting: NotRequired[float | None]
    reason_matrix: NotRequired[Sequence[Sequence[float | None]] | None]
    reason_overlap_matrix: NotRequired[Sequence[Sequence[float | None]] | None]
    reason_correlation: NotRequired[float | None]
    reason_overlap: NotRequired[float | None]
    seconds: float


class FindingResult(TypedDict):
    """Finding of the doctor; the fields are those of `perdure.doctor.Finding`.

    `remedy` is the advice and `changes` its settings. Numbers that are not finite are null.
    """

    rule: str
    cause: str
    evidence: str
    measured: float | None
    threshold: float | None
    source: str
    remedy: str
    changes: dict[str, Any]
    level: str
    experience: int | None
    step: int | None
    series: list[float | None]
    series_name: str
    explained_by: list[str]


class AbsenceResult(TypedDict):
    """Client without a usable reply in one exchange of a federation.

    Experience, round and client count from 0; `round` is null in the consolidation. `field` is the
    part of a rejected reply that was wrong.
    """

    experience: int
    round: int | None
    client: int
    cause: str
    field: str


class ClientResult(TypedDict):
    """Client of a federation, counted from the start of the run.

    Clients count from 0. `asked` and `accepted` are numbers of exchanges; bytes are those of the
    tensors in the messages. `accuracy` is the mean over the stages that the client holds, on its
    own test records; null if the server does not have them. `robust_accuracy` is the same under the
    attack of a run with `[attack]`. `seconds` is null under privacy, where
    times depend on private records, and is in `result.json` only.
    """

    client: int
    asked: int
    accepted: int
    bytes_sent: int
    bytes_received: int
    accuracy: float | None
    robust_accuracy: NotRequired[float | None]
    seconds: NotRequired[float | None]


class OverClients(TypedDict):
    """Mean, worst value and standard deviation of the clients' accuracies."""

    mean: float
    worst: float
    spread: float


class ClientsResult(TypedDict):
    """Clients of a federated training; a training without a federation has no such keys."""

    clients: NotRequired[list[ClientResult]]
    accuracy_over_clients: NotRequired[OverClients | None]
    robust_accuracy_over_clients: NotRequired[OverClients | None]


class TrialResult(Numbers, PrivacyResult, ClientsResult):
    """One arm with one seed.

    `failure` is the error message if training diverged; the measures are then null. `progress` has
    the measurements inside stages: number of the experience that ended, and accuracies.
    `findings` are those of the doctor, in the order of repair.
    """

    seed: int
    trial: str
    failure: str | None
    progress: list[tuple[int, list[float]]]
    findings: NotRequired[list[FindingResult]]
    absences: NotRequired[list[AbsenceResult]]


class Failure(TypedDict):
    """Seed of a trial whose training diverged, and the error message."""

    seed: int
    trial: str
    failure: str


class ArmResult(Numbers, PrivacyResult):
    """One strategy of the run, with or without privacy.

    Measures are means over the seeds that did not fail; time is a sum, and state the largest. The
    privacy statement is for one model: the seed with the largest epsilon. `findings` has each rule
    and experience once.
    """

    name: str
    strategy: str
    options: str
    private: bool
    standard_error: dict[str, float | None]
    failures: list[Failure]
    findings: NotRequired[list[FindingResult]]
    seeds: list[TrialResult]


class TaskResult(TypedDict):
    """Task of the records and its metric."""

    name: str
    metric: str
    unit: str
    higher_is_better: bool


class StreamResult(TypedDict):
    """Experiences of the run in the order of training, with their declared sizes.

    Results from before sizes were stored have no sizes.
    """

    name: str
    scenario: str
    experiences: int
    classes: list[list[int]]
    declared_sizes: NotRequired[list[int]]


class AttackResult(TypedDict):
    """Attack that was used for robust accuracy; `steps` only if it takes several steps.

    `objectives` are the losses of which a record had to survive each.
    """

    name: str
    epsilon: float | Sequence[float]
    steps: NotRequired[int]
    norm: str
    objectives: NotRequired[list[str]]


class Explanations(TypedDict):
    """Explanations of a run: file of the tensors, explainer, explained arm, and times."""

    file: str
    method: str
    moments: list[str]
    arm: str


class ArmChange(TypedDict):
    """Average accuracy of an arm before and after a restart; null if it was not measured."""

    before: float | None
    after: float | None


class Restart(TypedDict):
    """Restart of a run with remedies: their cause, rules and settings, and each arm's change.

    `start` is the run whose config was changed. `worse` has the reason why the remedies were
    withdrawn; "" if they were not.
    """

    run: str
    start: str
    cause: str
    rules: list[str]
    changes: dict[str, Any]
    worse: str
    arms: dict[str, ArmChange]


class Result(TypedDict):
    """Content of `result.json`: the result of a finished run.

    `healing` has all restarts with remedies, in a run that is one.
    """

    schema: int
    name: str
    seeds: list[int]
    task: TaskResult
    stream: StreamResult
    model: dict[str, Any]
    federation: dict[str, Any] | None
    environment: dict[str, Any]
    attack: AttackResult | None
    certificate: NotRequired[dict[str, Any] | None]
    arms: list[ArmResult]
    epsilon_of_all_arms: Epsilon | None
    explanations: Explanations | None
    healing: NotRequired[list[Restart]]


def read_result(run: Path) -> Result:
    """Read `result.json` of a run.

    Raises:
        RunError: if the file is missing, is not JSON, or has another schema.
    """
    path = run / "result.json"
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise RunError(
            f"{path} cannot be read ({error.strerror}); let the run finish first"
        ) from error
    except ValueError as error:
        raise RunError(f"{path} is not valid JSON ({error}); run the experiment again") from error
    return checked(content, str(path))


def checked(content: object, source: str = "result") -> Result:
    """Return `content` as a result, if all that the schema promises is there.

    Raises:
        RunError: names `source` and the first error.
    """
    if not isinstance(content, Mapping):
        raise RunError(
            f"{source} contains a {type(content).__name__}; allowed: an object of schema {SCHEMA}"
        )
    if content.get("schema") != SCHEMA:
        raise RunError(
            f"{source} has schema {content.get('schema')!r}; allowed: {SCHEMA}, which this version "
            "of perdure reads; run the experiment again, or install the version that wrote it"
        )
    _require(content, Result, source)
    if not content["arms"]:
        raise RunError(f"{source} has no arms; allowed: at least one; run the experiment again")
    _require(content["stream"], StreamResult, f"{source}: stream")
    _require(content["task"], TaskResult, f"{source}: task")
    for number, arm in enumerate(content["arms"]):
        _check_arm(arm, f"{source}: arms[{number}]")
    for name, shape in (
        ("attack", AttackResult),
        ("explanations", Explanations),
        ("epsilon_of_all_arms", Epsilon),
    ):
        if content[name] is not None:
            _require(content[name], shape, f"{source}: {name}")
    return cast(Result, content)


def _check_arm(arm: Mapping[str, Any], source: str) -> None:
    _require(arm, ArmResult, source)
    if arm["private"] != (arm["epsilon"] is not None):
        given = f"private = {arm['private']} but epsilon = {arm['epsilon']!r}"
        raise RunError(
            f"{source} has {given}; allowed: an epsilon for each private arm, and no "
            "epsilon for other arms; run the experiment again"
        )
    if arm["epsilon"] is not None:
        _require(arm["epsilon"], Epsilon, f"{source}.epsilon")
    for entry in arm["spending"]:
        _require(entry, Spending, f"{source}.spending")
    for finding in arm.get("findings", ()):
        _require(finding, FindingResult, f"{source}.findings")
    for number, trial in enumerate(arm["seeds"]):
        _require(trial, TrialResult, f"{source}.seeds[{number}]")
        for row in trial.get("clients", ()):
            _require(row, ClientResult, f"{source}.seeds[{number}].clients")


def _require(content: object, shape: type, source: str) -> None:
    expected: frozenset[str] = shape.__required_keys__  # type: ignore[attr-defined]
    missing = sorted(expected - set(content)) if isinstance(content, Mapping) else sorted(expected)
    if missing:
        raise RunError(
            f"{source} has no {', '.join(missing)}, but schema {SCHEMA} needs them; run the "
            "experiment again"
        )
