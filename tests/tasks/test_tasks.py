"""Every task: loss, distillation, predictions, metric, and refused targets."""

import math
from dataclasses import replace

import pytest
import torch
import torch.nn.functional as F

import perdure.tasks
from perdure.contract.context import contexts
from perdure.data import (
    Batch,
    Dataset,
    Experience,
    Records,
    Stream,
    dirichlet,
    iid,
    permuted,
    split,
)
from perdure.errors import ConfigError, DataError
from perdure.tasks import EXTREME, MASKED, MultiLabel, NextToken, Regression, SingleLabel, Task

N, C, L = 6, 5, 4
GIVEN = torch.tensor([True, True, True, True, False])
PAD = -100


def drawn(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def tokens() -> torch.Tensor:
    """Return (N, L) tokens below 4; some sequences end with padding."""
    made = torch.arange(N * L).view(N, L) % 4
    made[1, 2:] = PAD
    made[4, 3:] = PAD
    return made


TARGETS = {
    SingleLabel(): torch.arange(N) % 4,
    MultiLabel(): (drawn(N, C, seed=1) > -0.3).float() * GIVEN,
    Regression(): drawn(N, C, seed=2),
    NextToken(): tokens(),
}
every = pytest.mark.parametrize("task", TARGETS, ids=lambda task: task.name)


def outputs_of(task: Task, seed: int = 5) -> torch.Tensor:
    return drawn(*task.output_shape(TARGETS[task], C), seed=seed)


def losses_by_hand(task: Task, outputs, targets, mask) -> list[float]:
    """Return losses by the formulas of the files, number by number."""
    found = []
    for z, y in zip(outputs.double(), targets, strict=True):
        if isinstance(task, SingleLabel):
            found.append(float(z[mask].logsumexp(0) - z[y]))
        elif isinstance(task, MultiLabel):
            p = z.sigmoid()
            each = -(y * p.log() + (1 - y) * (1 - p).log())
            found.append(float(each[mask].mean()))
        elif isinstance(task, Regression):
            found.append(float(((z - y) ** 2).mean()))
        else:
            real = [(row, int(word)) for row, word in zip(z, y, strict=True) if word != PAD]
            found.append(sum(float(row[mask].logsumexp(0) - row[word]) for row, word in real))
    return found


@every
@pytest.mark.parametrize("masked", [False, True])
def test_task_losses_equal_their_formula(task, masked):
    outputs, targets = outputs_of(task), TARGETS[task]
    mask = GIVEN if masked else torch.ones(C, dtype=torch.bool)
    expected = torch.tensor(losses_by_hand(task, outputs, targets, mask))
    for given in (mask, mask.expand(N, C), *([] if masked else [None])):
        torch.testing.assert_close(task.losses(outputs, targets, given), expected)


@every
def test_the_task_loss_of_a_record_depends_only_on_that_record(task):
    outputs, targets = outputs_of(task), TARGETS[task]
    alone = torch.func.vmap(lambda z, y: task.losses(z[None], y[None])[0])(outputs, targets)
    torch.testing.assert_close(alone, task.losses(outputs, targets))


@every
def test_distillation_is_smallest_at_the_outputs_of_the_teacher(task):
    teacher, targets = outputs_of(task, seed=8), TARGETS[task]
    outputs = outputs_of(task).requires_grad_()
    rows = task.distillation(outputs, teacher, targets, temperature=2.0)
    assert rows.shape == (N,)
    at_teacher = task.distillation(teacher, teacher, targets, temperature=2.0)
    assert (rows > at_teacher).all()
    same = teacher.clone().requires_grad_()
    task.distillation(same, teacher, targets, temperature=2.0).sum().backward()
    torch.testing.assert_close(same.grad, torch.zeros_like(same), atol=1e-6, rtol=0)


@every
def test_distillation_covers_only_the_known_outputs(task):
    teacher, targets = outputs_of(task, seed=8), TARGETS[task]
    other = teacher.clone()
    other[..., -1] += 3.0
    answers = [
        task.distillation(outputs_of(task), each, targets, known=GIVEN, allowed=GIVEN)
        for each in (teacher, other)
    ]
    assert torch.equal(*answers) == (not isinstance(task, Regression))


@every
def test_task_predictions_have_the_shape_of_targets(task):
    targets = TARGETS[task]
    found = task.predictions(outputs_of(task), GIVEN)
    assert found.shape == targets.shape
    assert found.dtype == targets.dtype
    if not isinstance(task, Regression):
        best = found.argmax(1) if isinstance(task, MultiLabel) else found
        assert (best < C - 1).all()


def metric(task: Task, outputs, targets=None) -> float:
    targets = TARGETS[task] if targets is None else targets
    return task.score(task.measures(outputs, targets).sum(0), len(targets))


def test_task_metrics_equal_their_formula():
    single, multi, numbers, words = TARGETS
    assert metric(single, F.one_hot(TARGETS[single], C).float()) == 100.0
    assert metric(numbers, TARGETS[numbers] + 2.0) == pytest.approx(2.0, rel=1e-6)
    uniform = torch.zeros(N, L, C)
    assert metric(words, uniform) == pytest.approx(math.log2(C))
    assert metric(multi, 2 * TARGETS[multi] - 1) == 100.0
    assert metric(multi, torch.full((N, C), MASKED)) == 0.0
    assert math.isnan(metric(multi, torch.zeros(N, C), torch.zeros(N, C)))


def test_macro_f1_is_the_mean_over_labels_that_occur():
    task = MultiLabel()
    outputs = outputs_of(task)
    scores = []
    for predicted, present in zip((outputs > 0).T.tolist(), TARGETS[task].T.tolist(), strict=True):
        found = sum(p and t for p, t in zip(predicted, present, strict=True))
        if any(present):
            scores.append(2 * found / (sum(predicted) + sum(present)))
    assert len(scores) == C - 1
    assert metric(task, outputs) == pytest.approx(100 * sum(scores) / len(scores))


@every
def test_synthetic_targets_are_valid_and_differ_from_each_other(task):
    rows = task.synthetic(TARGETS[task], (0, 1, 2, 3, 4), torch.arange(7))
    task.check(rows)
    assert rows.shape[1:] == TARGETS[task].shape[1:]
    assert task.undeclared(rows, range(C)) == ""
    assert not torch.equal(rows[0], rows[1])
    zeros = torch.zeros_like(TARGETS[task])
    assert torch.equal(rows, task.synthetic(zeros, (0, 1, 2, 3, 4), torch.arange(7)))


@every
def test_extreme_synthetic_targets_are_valid(task):
    rows = task.synthetic(TARGETS[task], (0, 1, 2), EXTREME + torch.arange(7))
    task.check(rows)
    assert task.undeclared(rows[:, :3] if isinstance(task, Regression) else rows, range(3)) == ""


BAD = [
    (SingleLabel(), torch.rand(N), r"float32; convert them with labels\.long"),
    (SingleLabel(), torch.zeros(N, 2).long(), r"\(6, 2\).*task=MultiLabel\(\)"),
    (MultiLabel(), torch.zeros(N, C).bool(), r"bool; convert them with labels\.float"),
    (MultiLabel(), torch.full((N, C), 0.5), "have 0.5 in row 0, column 0; allowed: 0 and 1"),
    (Regression(), torch.rand(N), r"\(6,\).*give labels\[:, None\]"),
    (Regression(), torch.full((N, 1), math.nan), "have nan in row 0, column 0"),
    (NextToken(), torch.zeros(N).long(), r"\(n, L\), the token that follows"),
    (NextToken(), torch.zeros(N, L), r"float32; convert them with labels\.long"),
]


@pytest.mark.parametrize(("task", "targets", "message"), BAD)
def test_records_refuse_targets_of_another_task(task, targets, message):
    with pytest.raises(DataError, match=message):
        Records(inputs=torch.rand(N, 3), labels=targets, task=task)


def records(task: Task) -> Records:
    return Records(inputs=torch.rand(N, 3), labels=TARGETS[task], task=task)


@every
def test_data_sets_streams_and_experiences_keep_the_task(task):
    part = records(task)
    data = Dataset(name="made", train=part, test=part, num_classes=C, input_shape=(3,))
    stream = permuted(data, experiences=2)
    assert data.task == stream.task == stream[1].task == stream[0].without_records().task == task
    assert [len(client[0].train) for client in iid(stream, clients=2, min_size=2)] != [0, N]


@pytest.mark.parametrize(
    ("task", "declared", "message"),
    [
        (SingleLabel(), (0, 1, 2), r"has train labels \[3\]"),
        (MultiLabel(), (0, 1, 2), r"has train labels \[3\]"),
        (MultiLabel(), tuple(range(6)), "has train labels of 5 columns"),
        (Regression(), (0, 1), "has train labels of 5 columns"),
        (NextToken(), (0, 1, 2), r"has train tokens \[3\]"),
    ],
)
def test_targets_beyond_the_declared_classes_are_refused(task, declared, message):
    part = records(task)
    with pytest.raises(DataError, match=message):
        Experience(index=0, train=part, test=part, classes=declared)


def test_data_sets_and_streams_refuse_a_mixture_of_tasks():
    one, other = records(NextToken()), records(NextToken())
    other = replace(other, task=NextToken(padding=-1), labels=other.labels.clamp(min=-1))
    with pytest.raises(DataError, match="give both the same task"):
        Dataset(name="made", train=one, test=other, num_classes=C, input_shape=(3,))
    with pytest.raises(DataError, match="give both the same task"):
        Experience(index=0, train=one, test=other, classes=tuple(range(C)))
    experiences = tuple(
        Experience(index=i, train=part, test=part, classes=tuple(range(C)))
        for i, part in enumerate((one, other))
    )
    with pytest.raises(ConfigError, match="allowed: one task"):
        Stream(
            name="made",
            scenario="domain",
            experiences=experiences,
            num_classes=C,
            input_shape=(3,),
        )


def test_class_based_splits_refuse_other_tasks():
    part = records(Regression())
    data = Dataset(name="made", train=part, test=part, num_classes=C, input_shape=(3,))
    with pytest.raises(ConfigError, match="split does not support regression records: it cuts by"):
        split(data, scenario="class", experiences=5)
    with pytest.raises(ConfigError, match='scenario="domain" keeps the labels'):
        permuted(data, experiences=2, scenario="class")
    with pytest.raises(ConfigError, match=r"perdure\.data\.iid splits records of every task"):
        dirichlet(permuted(data, experiences=2), clients=2, alpha=1.0)


def test_tasks_are_found_by_their_file_names():
    assert perdure.tasks.names() == ("multi_label", "next_token", "regression", "single_label")
    assert perdure.tasks.find("next_token") is NextToken
    with pytest.raises(ConfigError, match=r"'regresion' is not allowed.*did you mean 'regression'"):
        perdure.tasks.find("regresion")


def test_labels_of_later_experiences_are_left_out_of_the_loss():
    parts = []
    for index, classes in enumerate(((0, 1), (2, 3, 4))):
        labels = torch.zeros(N, C)
        labels[:, list(classes)] = 1.0
        part = Records(inputs=torch.rand(N, 3), labels=labels, task=MultiLabel())
        parts.append(Experience(index=index, train=part, test=part, classes=classes))
    stream = Stream(
        name="labels", scenario="class", experiences=tuple(parts), num_classes=C, input_shape=(3,)
    )
    batch = Batch.current(stream[0].train, 0)
    outputs = outputs_of(MultiLabel())
    first = contexts(stream, "cpu")(0)
    expected = torch.tensor(
        losses_by_hand(MultiLabel(), outputs, batch.labels, torch.arange(C) < 2)
    )
    torch.testing.assert_close(first.losses(outputs, batch), expected)
    assert not MultiLabel().predictions(first.mask(outputs.abs(), batch))[:, 2:].any()
    later = contexts(stream, "cpu")(1)
    assert not torch.allclose(later.losses(outputs, batch), expected)
