import re
from collections import deque
from dataclasses import dataclass, replace
from functools import partial
from typing import ClassVar

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from perdure.contract.combine import Combine
from perdure.contract.strategy import Strategy
from perdure.data.client_splits import iid
from perdure.data.records import Records
from perdure.data.scenarios import online, split
from perdure.errors import ConfigError, GuardError
from perdure.learner.learner import Learner
from perdure.models.classifiers import cnn, mlp, resnet18
from perdure.privacy.guard.loss_checks import check_losses, quiet_training
from perdure.privacy.guard.model_checks import check_buffers, check_model
from perdure.privacy.settings import Privacy
from perdure.strategies import EWC, LwF, Naive, Replay


def frozen(module):
    return module.requires_grad_(False)


FORMS = {
    "1d": nn.BatchNorm1d(6),
    "2d": nn.BatchNorm2d(48),
    "3d": nn.BatchNorm3d(6),
    "without scale and shift": nn.BatchNorm2d(6, affine=False),
    "without running statistics": nn.BatchNorm1d(6, track_running_stats=False),
    "in evaluation mode": nn.BatchNorm2d(6).eval(),
    "frozen": frozen(nn.BatchNorm2d(6)),
    "frozen, in evaluation mode, without scale": frozen(nn.BatchNorm1d(6, affine=False)).eval(),
    "synchronised": nn.SyncBatchNorm(6),
}


@pytest.mark.parametrize("form", FORMS)
def test_batch_norm_is_refused_at_every_depth_and_in_every_form(form):
    model = nn.Sequential(
        nn.Identity(), nn.ModuleDict({"deep": nn.Sequential(nn.ReLU(), FORMS[form])})
    )
    with pytest.raises(
        GuardError, match=r"1\.deep\.1 is (Sync)?BatchNorm.*replace it by torch.nn.GroupNorm"
    ):
        check_model(model)


def test_the_error_for_batch_norm_names_a_valid_group_norm():
    with pytest.raises(GuardError, match="model is BatchNorm2d") as refusal:
        check_model(FORMS["2d"])
    groups, channels = map(
        int, re.search(r"GroupNorm\((\d+), (\d+)\)", str(refusal.value)).groups()
    )
    assert nn.GroupNorm(groups, channels)(torch.rand(2, 48, 3, 3)).shape == (2, 48, 3, 3)


@pytest.mark.parametrize("make", [nn.InstanceNorm1d, nn.InstanceNorm2d])
def test_instance_norm_is_refused_only_with_running_statistics(make):
    with pytest.raises(
        GuardError, match=r"0 is InstanceNorm\dd with running.*track_running_stats=False"
    ):
        check_model(nn.Sequential(make(6, track_running_stats=True)))
    check_model(nn.Sequential(make(6)))


@pytest.mark.parametrize("make", [cnn, partial(resnet18, width=4)])
def test_built_in_models_are_accepted_with_group_norm_only(make):
    options = {"input_shape": (1, 16, 16), "num_classes": 3, "seed": 0}
    model = make(**options)
    check_model(model)
    check_buffers(model, torch.rand(4, 1, 16, 16))
    with pytest.raises(GuardError, match="BatchNorm2d"):
        check_model(make(**options, norm="batch"))


def test_the_guard_accepts_layer_norm_and_group_norm():
    model = nn.Sequential(nn.Linear(5, 6), nn.LayerNorm(6), nn.GroupNorm(2, 6))
    check_model(model)
    check_buffers(model, torch.rand(4, 5))


# --------------------------------------------------------------------------- buffers


class Centring(nn.Module):
    """A layer that subtracts a running mean, updated by every pass in training mode."""

    def __init__(self, grows=False):
        super().__init__()
        self.register_buffer("mean", torch.zeros(5))
        self.grows = grows

    def forward(self, x):
        if self.training and self.grows:
            self.register_buffer(f"seen_{len(self._buffers)}", x.detach().clone())
        elif self.training:
            self.mean.lerp_(x.detach().mean(0), 0.1)
        return x - self.mean


@pytest.mark.parametrize(("grows", "name"), [(False, "0.mean"), (True, "0.seen_1")])
def test_a_buffer_changed_by_a_pass_is_refused_by_name(grows, name):
    model = nn.Sequential(Centring(grows), nn.Linear(5, 3)).eval()
    with pytest.raises(
        GuardError,
        match=f"buffer {name} of the model changes.*remove it, or compute it from public",
    ):
        check_buffers(model, torch.rand(4, 5))
    assert (
        float(model[0].mean.sum()) == 0
        and not model.training
        and len(list(model[0].buffers())) == 1
    )


def test_a_constant_buffer_passes_the_guard_without_random_draws():
    model = nn.Sequential(nn.Dropout(0.5), nn.Linear(5, 3))
    model.register_buffer("scale", torch.ones(3))
    before = torch.random.get_rng_state()
    check_buffers(model, torch.rand(4, 5, generator=torch.Generator()))
    assert torch.equal(before, torch.random.get_rng_state())


class Keeping(nn.Module):
    """A layer that keeps a function of its inputs as an attribute, not as a buffer."""

    def __init__(self, what):
        super().__init__()
        self.what = what
        self.kept = {"list": [], "queue": deque(maxlen=3)}
        self.seen = 0

    def forward(self, x):
        self.what(self, x)
        return x


def in_attribute(module, x):
    module.last = x.detach()


def in_list(module, x):
    module.kept["list"].append(x.detach().mean(0))


def in_queue(module, x):
    module.kept["queue"].append(x[0].detach())


def as_number(module, x):
    module.scale = 0.9 + 0.1 * float(x.abs().max())


def as_key(module, x):
    module.kept[float(x.max())] = 1


@pytest.mark.parametrize(
    ("what", "name"),
    [
        (as_key, r"0\.kept\[0\.\d+\]"),
        (in_attribute, r"0\.last"),
        (in_list, r"0\.kept\['list'\]\[0\]"),
        (in_queue, r"0\.kept\['queue'\]\[0\]"),
        (as_number, r"0\.scale"),
    ],
)
def test_inputs_kept_in_attributes_are_refused_by_name(what, name):
    model = nn.Sequential(Keeping(what), nn.Linear(5, 3))
    with pytest.raises(
        GuardError, match=f"attribute {name} of the model depends on the records.*return it instead"
    ):
        check_buffers(model, torch.rand(4, 5, generator=torch.Generator().manual_seed(0)))
    assert model[0].seen == 0 and not model[0].kept["list"]


def as_cache(module, x):
    module.positions = torch.arange(x.shape[1])
    module.seen += 1


def test_the_guard_accepts_caches_independent_of_records():
    check_buffers(nn.Sequential(Keeping(as_cache), nn.Linear(5, 3)), torch.rand(4, 5))


# --------------------------------------------------------------------------- losses

MODEL = mlp(input_shape=(5,), num_classes=3, hidden=(6,), seed=0)
INPUTS = torch.rand(6, 5, generator=torch.Generator().manual_seed(0))
LABELS = torch.tensor([0, 1, 2, 0, 1, 2])
WEIGHTS = torch.tensor([1.0, 2.0, 5.0])


def each(inputs, labels):
    return F.cross_entropy(MODEL(inputs), labels, reduction="none")


def class_weighted_mean(inputs, labels):
    """Return losses divided by the sum of class weights in the batch, as
    CrossEntropyLoss(weight=...) does.
    """
    return len(labels) * WEIGHTS[labels] * each(inputs, labels) / WEIGHTS[labels].sum()


def in_batch_masking(inputs, labels):
    """Return ER-ACE losses as published, over the classes present in the batch."""
    present = torch.isin(torch.arange(3), labels)
    return F.cross_entropy(torch.where(present, MODEL(inputs), -1e9), labels, reduction="none")


def in_batch_negatives(inputs, labels):
    logits = MODEL(inputs)
    return F.cross_entropy(logits @ logits.T, torch.arange(len(labels)), reduction="none")


def batch_centred(inputs, labels):
    return each(inputs - inputs.mean(0), labels)


COUPLED = [class_weighted_mean, in_batch_masking, in_batch_negatives, batch_centred]


@pytest.mark.parametrize("losses", COUPLED)
def test_the_error_for_losses_that_couple_records_names_a_fix(losses):
    with pytest.raises(
        GuardError,
        match=r"Mine.losses\(\) couples records: removing one.*compute each row from that row",
    ):
        check_losses(losses, INPUTS, LABELS, "Mine.losses()")


def test_the_guard_refuses_a_loss_that_is_nan():
    with pytest.raises(GuardError, match="couples records"):
        check_losses(
            lambda inputs, labels: each(inputs, labels) * float("nan"),
            INPUTS,
            LABELS,
            "Mine.losses()",
        )


@pytest.mark.parametrize("losses", [F.cross_entropy, partial(F.cross_entropy, weight=WEIGHTS)])
def test_the_error_for_a_mean_loss_names_the_fix(losses):
    with pytest.raises(GuardError, match=r"gives shape \(\) for 6 records.*reduction='none'"):
        check_losses(
            lambda inputs, labels: losses(MODEL(inputs), labels), INPUTS, LABELS, "Mine.losses()"
        )


def test_the_guard_accepts_losses_with_one_value_per_record():
    check_losses(each, INPUTS, LABELS, "plain")
    check_losses(
        lambda inputs, labels: WEIGHTS[labels] * each(inputs, labels), INPUTS, LABELS, "weighted"
    )
    check_losses(lambda inputs, labels: 1e6 * each(inputs, labels), INPUTS, LABELS, "large")


def test_quiet_training_is_training_mode_without_dropout():
    model = nn.Sequential(nn.Linear(5, 6), nn.Dropout(0.5), nn.Sequential(nn.Dropout2d(0.5))).eval()
    quiet_training(model)
    assert (
        model.training and model[0].training and not model[1].training and not model[2][0].training
    )


# --------------------------------------------------------------------------- through the learner


@dataclass(frozen=True, kw_only=True)
class Contrastive(Strategy):
    couples_records: ClassVar[bool] = True


@dataclass(frozen=True, kw_only=True)
class Secretly(Strategy):
    """A strategy that couples records without declaring it."""

    def losses(self, forward, batch, context, state):
        losses = super().losses(forward, batch, context, state)
        return losses * len(batch) / (1.0 + batch.labels.float()).sum()


@dataclass(frozen=True, kw_only=True)
class Reader(Strategy):
    def after_experience(self, curator, params, state):
        curator.raw("to look at them")
        return state


class OnlyInTraining(nn.Module):
    def forward(self, x):
        return x - x.mean(0) if self.training else x


def private(model, strategy=None):
    privacy = Privacy(noise_multiplier=1.0, seed=0)
    return Learner(
        model=model,
        strategy=strategy or Naive(),
        optimizer=torch.optim.SGD,
        iterations=2,
        batch_size=4,
        privacy=privacy,
    )


@pytest.mark.parametrize(
    ("strategy", "message"),
    [
        (Contrastive(), "Contrastive couples the records of a batch"),
        (
            Combine(EWC(strength=1.0), Contrastive()),
            r"EWC\+Contrastive couples the records of a batch",
        ),
        (Secretly(), r"Secretly.losses\(\) couples records"),
    ],
)
def test_a_strategy_that_couples_records_is_refused_before_draws(
    toy_stream, toy_model, strategy, message
):
    stream = toy_stream()
    learner = private(toy_model(stream), strategy)
    with pytest.raises(GuardError, match=message):
        learner.prepare(stream)
    with pytest.raises(ConfigError, match="no stream yet"):  # nor any ledger
        _ = learner.private_sum


@pytest.mark.parametrize("strategy", [Naive(), EWC(strength=1.0), LwF(), Replay(memory_size=8)])
def test_built_in_strategies_are_accepted_with_dropout(toy_stream, toy_model, strategy):
    stream = toy_stream()
    model = toy_model(stream)
    model.body.append(nn.Dropout(0.5))
    learner = private(model, strategy)
    learner.prepare(stream)
    assert learner.private_sum is not None


@pytest.mark.parametrize(
    ("layer", "message"),
    [
        (nn.BatchNorm1d(6).eval(), "body.3 is BatchNorm1d"),
        (Centring(), "buffer body.0.mean"),
        (OnlyInTraining(), r"Naive.losses\(\) couples records"),
    ],
)
def test_the_guard_refuses_a_model_that_mixes_records(toy_stream, toy_model, layer, message):
    stream = toy_stream()
    model = toy_model(stream)
    if isinstance(layer, Centring):
        model.body.insert(0, layer)
    else:
        model.body.append(layer)
    with pytest.raises(GuardError, match=message):
        private(model).fit(stream)


def test_a_strategy_hook_that_reads_raw_records_is_stopped(toy_stream, toy_model):
    stream = toy_stream()
    from perdure.errors import PrivacyError

    with pytest.raises(
        PrivacyError,
        match=r"a hook reads curator\.raw, which no charge in the ledger covers.*curator.release",
    ):
        private(toy_model(stream), Reader()).fit(stream)


def test_privacy_refuses_streams_whose_records_depend_on_others(toy_stream, toy_model):
    stream = online(toy_stream(), chunk=10)
    with pytest.raises(GuardError, match=r"depends on other records.*exact=False"):
        private(toy_model(stream)).prepare(stream)


def test_privacy_refuses_a_stream_with_assigned_by_record_none(toy_stream, toy_model):
    stream = replace(toy_stream(), assigned_by_record=None)
    with pytest.raises(
        GuardError, match=r"has assigned_by_record=None.* write Stream\(.*_by_record=True\) if"
    ):
        private(toy_model(stream)).prepare(stream)
    Learner(
        model=toy_model(stream),
        strategy=Naive(),
        optimizer=partial(torch.optim.SGD, lr=0.1),
        iterations=1,
    ).fit(stream)


def test_privacy_refuses_an_exact_split_over_clients(toy_stream, toy_model):
    stream = toy_stream()
    evened, hashed = (iid(stream, clients=2, exact=exact)[0] for exact in (True, False))
    with pytest.raises(
        GuardError, match=r"experience or client of a record depends on other .*exact=False"
    ):
        private(toy_model(stream)).prepare(evened)
    private(toy_model(stream)).prepare(hashed)


def test_the_error_for_a_split_by_row_position_names_the_fix(toy_data, toy_model):
    """This also holds after a split by class, because the client of a record follows from its
    id.
    """
    train = Records(inputs=toy_data.train.inputs, labels=toy_data.train.labels)
    stream = split(replace(toy_data, train=train), scenario="class", experiences=2)
    client, _ = iid(stream, clients=2, exact=False)
    told = r"with Records\(ids=...\).*a hash of a patient's number.*exact=False and a declared_size"
    with pytest.raises(GuardError, match=told):
        private(toy_model(stream)).prepare(client)


@pytest.mark.deep(reason="deployment: torch.compile imports its compiler")
@pytest.mark.parametrize("in_place", [True, False])
def test_a_compiled_model_is_refused_under_privacy(toy_stream, toy_model, in_place):
    stream = toy_stream()
    model = toy_model(stream)
    if in_place:
        model.compile(backend="eager")
    else:
        model = torch.compile(model, backend="eager")
    with pytest.raises(GuardError, match=r"model is .*, compiled by torch.compile: other code"):
        private(model).prepare(stream)
