"""Mixed pairs of records: mixup and CutMix."""

from functools import partial

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torchvision.transforms import v2

from helpers.learners import same_bits
from helpers.toy_data import records
from perdure.data import Batch, CutMix, Dataset, Mixup, Records, Views, joint, shift_and_flip
from perdure.data.mixing import partners
from perdure.errors import ConfigError, PrivacyError
from perdure.learner import Learner
from perdure.privacy import Privacy
from perdure.strategies import DER, Naive


def batch_of(n=12, seed=0):
    place = torch.Generator().manual_seed(seed)
    return Batch.current(
        Records(inputs=torch.rand(n, 1, 6, 6, generator=place), labels=torch.arange(n) % 3), 0
    )


WEIGHTS = torch.randn(36, 3, generator=torch.Generator().manual_seed(1))


def losses(rows):
    return F.cross_entropy(rows.inputs.flatten(1) @ WEIGHTS, rows.labels, reduction="none")


@pytest.mark.reference
@pytest.mark.parametrize("mixing", [Mixup(alpha=0.7), CutMix(alpha=1.0)])
def test_a_mixed_row_is_that_of_torchvision_with_soft_labels(mixing):
    batch = batch_of()
    mixed = mixing.attach(batch, 3)
    share = float(mixed.stored["mixed.share"][0])
    found = mixing.losses(losses, mixed)
    other = partners(batch, np.random.default_rng(3))
    assert 0 < share < 1 and sorted(other.tolist()) == list(range(12))
    for row in range(12):
        pair = torch.tensor([int(other[row]), row])  # torchvision mixes a row with the one before
        labels = batch.labels[pair]
        given = {"labels": labels, "batch_size": 2, "lam": share, "lam_adjusted": share}
        if isinstance(mixing, Mixup):
            reference = v2.MixUp(num_classes=3)
        else:
            changed = (mixed.inputs[row] != batch.inputs[row]).any(0).nonzero()
            lowest, highest = (0, 0), (0, 0)
            if len(changed):
                lowest, highest = (
                    changed.min(0).values.tolist(),
                    (changed.max(0).values + 1).tolist(),
                )
            given["box"] = (lowest[1], lowest[0], highest[1], highest[0])
            reference = v2.CutMix(num_classes=3)
        inputs = reference.transform(batch.inputs[pair], given)[1]
        soft = reference.transform(labels, given)[1]
        torch.testing.assert_close(mixed.inputs[row], inputs)
        expected = F.cross_entropy(inputs.flatten() @ WEIGHTS, soft)
        torch.testing.assert_close(found[row], expected)


def test_the_share_of_a_cut_is_the_area_that_is_left():
    batch = batch_of(n=2)
    for seed in range(20):
        mixed = CutMix().attach(batch, seed)
        if int(mixed.stored["mixed.ids"][0]) == 1:
            kept = (mixed.inputs[0] == batch.inputs[0]).float().mean()
            torch.testing.assert_close(mixed.stored["mixed.share"][0], kept)


def test_rows_are_mixed_within_their_experience_and_role():
    batch = batch_of(n=40)
    rows = batch.tensors()
    rows["tasks"] = torch.arange(40) % 2
    rows["from_memory"] = torch.arange(40) < 20
    batch = Batch.from_tensors(rows)
    other = partners(batch, np.random.default_rng(0))
    assert torch.equal(batch.tasks[other], batch.tasks)
    assert torch.equal(batch.from_memory[other], batch.from_memory)
    assert not torch.equal(other, torch.arange(40))


def test_views_of_a_mixed_row_are_mixed_alike():
    batch = Views(count=2, change=shift_and_flip(pixels=1)).attach(batch_of(), 0)
    mixed = CutMix().attach(batch, 1)
    mixed_views = [mixed.stored[f"view.{k}"] for k in (0, 1)]
    other = partners(batch, np.random.default_rng(1))
    for view, whole in zip(mixed_views, (batch.stored[f"view.{k}"] for k in (0, 1)), strict=True):
        cut = mixed.inputs != batch.inputs
        torch.testing.assert_close(view[cut], whole[other][cut])


@pytest.mark.parametrize("strategy", [Naive(), DER(memory_size=8)])
def test_mixed_pairs_change_the_parameters_reproducibly(toy_stream, toy_model, strategy):
    ends = []
    for mixing in (Mixup(alpha=0.2), Mixup(alpha=0.2), None):
        learner = learner_with(toy_stream(), toy_model, strategy=strategy, mixing=mixing)
        learner.fit(toy_stream())
        ends.append(learner.model.state_dict())
    assert same_bits(ends[0], ends[1]) and not same_bits(ends[0], ends[2])


def learner_with(stream, model, **options):
    given = {"strategy": Naive(), "iterations": 3, "batch_size": 8}
    optimizer = partial(torch.optim.SGD, lr=0.3)
    return Learner(model=model(stream), optimizer=optimizer, **given | options)


def test_mixing_is_refused_under_privacy(toy_stream, toy_model):
    learner = learner_with(
        toy_stream(), toy_model, mixing=Mixup(), privacy=Privacy(noise_multiplier=1.0, seed=0)
    )
    with pytest.raises(PrivacyError, match="into two rows"):
        learner.fit(toy_stream())


@pytest.mark.parametrize("when", ["experience.begin", "step.gradient"])
def test_mixing_set_in_a_private_run_is_refused(toy_stream, toy_model, when):
    def mix(point, learner):
        if point == when:
            learner.session.mixing = Mixup()

    learner = learner_with(
        toy_stream(),
        toy_model,
        callbacks=[mix],
        privacy=Privacy(noise_multiplier=1.0, seed=0),
    )
    with pytest.raises(PrivacyError, match="Mixup puts each record into two rows"):
        learner.fit(toy_stream())


def test_cut_images_change_the_parameters(toy_model):
    shape = (1, 4, 6)
    train, test = records(24), records(8, first_id=24, partition="test")
    data = Dataset(name="toy", train=train, test=test, num_classes=4, input_shape=shape)
    ends = []
    for mixing in (CutMix(), None):
        learner = learner_with(joint(data), toy_model, mixing=mixing)
        learner.fit(joint(data))
        ends.append(learner.model.state_dict())
    assert not same_bits(*ends)


def test_mixing_refuses_what_it_cannot_mix(toy_stream, toy_model):
    with pytest.raises(ConfigError, match=r"mixing = 'CutMix of inputs .*images"):
        learner_with(toy_stream(), toy_model, mixing=CutMix()).fit(toy_stream())
    with pytest.raises(ConfigError, match=r"mixing.alpha = 0.0"):
        Mixup(alpha=0.0)


def test_the_fingerprint_has_the_mixing(toy_stream, toy_model, tmp_path):
    learner = learner_with(toy_stream(), toy_model, mixing=Mixup(alpha=0.3), folder=tmp_path)
    learner.prepare(toy_stream())
    assert learner.fingerprint["mixing.alpha"] == 0.3
    learner.close()
