"""Migration from Opacus: spent privacy, settings and model; and export to its accountants."""

import subprocess
import sys
from dataclasses import replace

import pytest
import torch
import torch.distributed as dist
import torch.nn.functional as F
from opacus import PrivacyEngine
from opacus.accountants import IAccountant, RDPAccountant
from opacus.distributed import DifferentiallyPrivateDistributedDataParallel
from opacus.grad_sample import GradSampleModule
from opacus.layers import DPLSTM
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

from helpers.module_hooks import hooks_on
from perdure.errors import ConfigError, GuardError, PrivacyError
from perdure.learner.learner import Learner
from perdure.privacy.accounting.calibration import epsilon
from perdure.privacy.accounting.charges import Charge, merged
from perdure.privacy.guard.model_checks import check_model, check_optimizer
from perdure.privacy.ledger.account import Account
from perdure.privacy.ledger.entries import Entry
from perdure.privacy.opacus.migration import (
    STATEMENT,
    accountant,
    from_opacus,
    sampling_rate,
    settings,
    spent,
    unwrapped,
)
from perdure.privacy.settings import Privacy
from perdure.strategies import Naive

pytestmark = pytest.mark.filterwarnings(
    "ignore:Secure RNG turned off:UserWarning",
    "ignore:Full backward hook is firing:UserWarning",
    "ignore:GDP accounting is experimental:UserWarning",
    "ignore:PrivacyEngine detected new dataset:UserWarning",
)


def small():
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(5, 6), nn.Tanh(), nn.Linear(6, 4))


def engine_for(model, *, kind="rdp", noise=1.3, steps=5, clip=0.7, **options):
    """Return a PrivacyEngine that trained the model for some steps, with its model, optimiser and
    loader.
    """
    place = torch.Generator().manual_seed(0)
    data = TensorDataset(torch.rand(60, 5, generator=place), torch.arange(60) % 4)
    engine = PrivacyEngine(accountant=kind)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    wrapped, optimizer, *criterion, loader = engine.make_private(
        module=model,
        optimizer=optimizer,
        data_loader=DataLoader(data, batch_size=12),
        noise_multiplier=noise,
        max_grad_norm=clip,
        **options,
    )
    loss_of = criterion[0] if criterion else F.cross_entropy
    inner = wrapped if isinstance(wrapped, nn.Module) else model
    done = 0
    while done < steps:
        for x, y in loader:
            if done < steps:
                optimizer.zero_grad()
                loss_of(inner(x), y).backward()
                optimizer.step()
                done += 1
    return engine, wrapped, optimizer, loader


# --------------------------------------------------------------------------- what was spent


@pytest.mark.parametrize("kind", ["rdp", "prv", "gdp"])
def test_spent_charges_equal_the_history_of_the_privacy_engine(kind):
    engine, _, _, loader = engine_for(small(), kind=kind, steps=7)
    assert spent(engine) == spent(engine.accountant) == (Charge(0.2, 1.3, 7),)
    assert sampling_rate(loader) == 0.2


def test_spent_charges_keep_changed_noise_and_rates_separate():
    engine, _, optimizer, _ = engine_for(small(), steps=3)
    optimizer.noise_multiplier = 0.9
    optimizer.step_hook(optimizer)
    assert spent(engine) == (Charge(0.2, 1.3, 3), Charge(0.2, 0.9, 1))
    assert spent(PrivacyEngine()) == ()


@pytest.mark.reference
def test_the_epsilon_of_the_history_equals_that_of_opacus():
    engine, *_ = engine_for(small(), steps=11)
    assert epsilon(spent(engine), delta=1e-3, accountant="rdp") == pytest.approx(
        engine.get_epsilon(1e-3), abs=1e-3
    )


class Trees(RDPAccountant):
    @classmethod
    def mechanism(cls):
        return "tree aggregation"


def test_spent_charges_of_other_accountants_are_refused():
    with pytest.raises(
        PrivacyError,
        match=r"Trees is not a supported .*: tree aggregation.; .*rdp or prv or gdp",
    ):
        spent(Trees())
    with pytest.raises(PrivacyError, match="Sequential is not a supported accountant of Opacus"):
        spent(small())
    accumulated = RDPAccountant()
    accumulated.step(noise_multiplier=1.0, sample_rate=0.6 * 2)
    with pytest.raises(PrivacyError, match=r"cannot be used: sampling_rate = 1.2 is not allowed"):
        spent(accumulated)
    torn = RDPAccountant()
    torn.history = [(1.0, 0.1)]
    with pytest.raises(PrivacyError, match="cannot be used"):
        spent(torn)


def test_a_loader_without_poisson_sampling_is_refused():
    engine, _, _, loader = engine_for(small(), poisson_sampling=False)
    assert spent(engine) == (Charge(0.2, 1.3, 5),)  # Opacus says Poisson all the same
    with pytest.raises(
        PrivacyError,
        match="DataLoader does not do Poisson sampling, although Opacus accounts for it",
    ):
        sampling_rate(loader)


# --------------------------------------------------------------------------- settings


@pytest.mark.parametrize("options", [{}, {"grad_sample_mode": "ghost"}, {"loss_reduction": "mean"}])
def test_optimizer_settings_are_the_noise_and_the_clip_norm(options):
    _, _, optimizer, _ = engine_for(small(), **options)
    assert settings(optimizer) == (1.3, 0.7)


def test_optimizer_settings_refuse_another_kind_of_clipping():
    adaptive = {
        "target_unclipped_quantile": 0.5,
        "clipbound_learning_rate": 0.2,
        "max_clipbound": 10,
        "min_clipbound": 0.1,
        "unclipped_num_std": 2.0,
    }
    _, _, optimizer, _ = engine_for(small(), clipping="adaptive", **adaptive)
    with pytest.raises(PrivacyError, match=r"AdaClipDPOptimizer changes its clip norm.*Adaptive"):
        settings(optimizer)
    _, _, optimizer, _ = engine_for(small(), clipping="per_layer", clip=[0.5, 0.5, 0.5, 0.5])
    with pytest.raises(
        PrivacyError, match=r"DPPerLayerOptimizer has one clip norm per parameter.*per-layer"
    ):
        settings(optimizer)
    _, _, optimizer, _ = engine_for(small(), grad_sample_mode="ghost")
    # what PrivacyEngineAdaptiveClipping sets
    vars(optimizer).update(_adjusted_noise_multiplier=1.4)
    with pytest.raises(PrivacyError, match="changes its clip norm"):
        settings(optimizer)
    with pytest.raises(PrivacyError, match="optimizer SGD is not known; give the DPOptimizer"):
        settings(torch.optim.SGD(small().parameters(), lr=0.1))


def test_the_learner_refuses_the_optimizer_of_opacus():
    _, _, optimizer, _ = engine_for(small())
    with pytest.raises(
        GuardError, match=r"DPOptimizer of Opacus.*noise a second time.*original_optimizer"
    ):
        check_optimizer(optimizer)
    check_optimizer(optimizer.original_optimizer)


# --------------------------------------------------------------------------- the model


def traces(model):
    on_params = {name for p in model.parameters() for name in vars(p)}
    hooks = sum(sum(hooks_on(m).values()) for m in model.modules())
    usual = vars(nn.Linear(1, 1)).keys() | vars(nn.Sequential()).keys()
    return (
        on_params,
        hooks,
        {name for m in model.modules() for name in vars(m) if name not in usual},
    )


@pytest.mark.parametrize(
    "options", [{"grad_sample_mode": mode} for mode in ("hooks", "functorch", "ghost")]
)
@pytest.mark.parametrize("wrap", [True, False])
def test_unwrapping_returns_a_clean_model_with_equal_parameters(options, wrap):
    model = small()
    _, wrapped, _, _ = engine_for(model, wrap_model=wrap, **options)
    params = list(model.parameters())
    assert traces(model)[0] and traces(model)[1]
    assert unwrapped(wrapped) is model
    assert traces(model) == (set(), 0, set())
    assert all(a is b for a, b in zip(params, model.parameters(), strict=True))
    model(torch.rand(3, 5)).sum().backward()
    assert traces(model) == (set(), 0, set())
    check_model(model)


def test_unwrapping_removes_the_hooks_of_opacus():
    model = small()
    engine_for(model, wrap_model=False)
    assert traces(model)[1] and unwrapped(model) is model
    assert traces(model) == (set(), 0, set())


def test_unwrapping_cleans_a_model_after_an_interrupted_pass():
    model = nn.ModuleDict({"layer": DPLSTM(5, 4, batch_first=True)})
    wrapped = GradSampleModule(model)
    model["layer"](torch.rand(3, 4, 5))
    assert vars(model["layer"].l0.ih)["activations"]
    inside = unwrapped(wrapped)
    assert (
        inside is model
        and traces(inside)[:2] == (set(), 0)
        and "activations" not in traces(inside)[2]
    )


def test_unwrapping_returns_a_plain_model_unchanged():
    model = small()
    passes = []
    model[0].register_forward_hook(lambda *_: passes.append(1))
    assert unwrapped(model) is model
    model(torch.rand(3, 5))
    assert passes == [1]


def test_unwrapping_removes_data_parallel_wrappers(tmp_path):
    dist.init_process_group("gloo", init_method=f"file://{tmp_path}/meet", rank=0, world_size=1)
    try:
        parallel = nn.parallel.DistributedDataParallel
        for wrap in (DifferentiallyPrivateDistributedDataParallel, parallel, nn.DataParallel):
            model = small()
            assert unwrapped(GradSampleModule(wrap(model))) is model and not traces(model)[1]
        model = small()
        assert unwrapped(parallel(GradSampleModule(model))) is model and not traces(model)[1]
    finally:
        dist.destroy_process_group()


# --------------------------------------------------------------------------- on with perdure


def test_a_learner_counts_charges_of_an_earlier_opacus_training(toy_stream, toy_model):
    stream = toy_stream()
    engine, wrapped, optimizer, _ = engine_for(
        nn.Sequential(nn.Flatten(), toy_model(stream)), steps=6
    )
    privacy = replace(from_opacus(engine, optimizer, delta=1e-3), seed=0)
    assert (privacy.noise_multiplier, privacy.clip_norm, privacy.spent) == (
        1.3,
        0.7,
        (Charge(0.2, 1.3, 6),),
    )
    learner = Learner(
        model=unwrapped(wrapped)[1],
        strategy=Naive(),
        optimizer=torch.optim.SGD,
        iterations=2,
        batch_size=4,
        privacy=privacy,
    )
    learner.fit(stream)
    for partition in learner.private_sum.ledger.partitions:
        charges = merged(learner.private_sum.ledger.charges(partition))
        assert Charge(0.2, 1.3, 6) in charges and sum(c.steps for c in charges) == 8
    assert learner.private_sum.ledger.epsilon(delta=1e-3) > epsilon(spent(engine), delta=1e-3)


def test_the_opacus_notice_names_the_spending_that_is_counted():
    assert "accounted from now on" in STATEMENT and "from_opacus" in STATEMENT


# --------------------------------------------------------------------------- back into Opacus

FACTS = {
    "clip_norm": 1.0,
    "first_step": 0,
    "data": "",
    "start": "",
    "simulated": False,
    "mechanism": "gaussian",
}


def account(*entries, relation="add-remove"):
    result = Account(relation=relation)
    result.sizes = {"one": 100, "two": 100}
    for number, (scope, noise, steps) in enumerate(entries):
        sampling = "none" if set(scope.values()) == {1.0} else "poisson"
        facts = FACTS | {"mechanism": "gaussian" if noise else "none", "relation": relation}
        result.entries.append(
            Entry(
                **facts,
                purpose=f"{number}",
                noise_multiplier=noise,
                steps=steps,
                scope=scope,
                sampling=sampling,
            )
        )
    return result


HISTORIES = [
    account(({"one": 0.01, "two": 0.01}, 1.0, 1000)),
    account(
        ({"one": 0.02}, 1.1, 469),
        ({"one": 0.015, "two": 0.015}, 1.3, 300),
        ({"two": 0.5}, 2.0, 100),
    ),
    account(({"one": 0.02}, 1.1, 200), ({"one": 0.02}, 1.1, 269), ({"one": 1.0}, 4.4, 1)),
]


@pytest.mark.reference
@pytest.mark.parametrize("ours", HISTORIES)
@pytest.mark.parametrize("delta", [1e-5, 1e-3])
def test_an_exported_history_has_equal_epsilon_in_opacus(ours, delta):
    theirs = accountant(ours, ["one"])
    assert isinstance(theirs, IAccountant) and theirs.mechanism() == "rdp"
    assert theirs.get_epsilon(delta) == pytest.approx(
        ours.epsilon(["one"], delta=delta, accountant="rdp"), abs=1e-3
    )
    assert spent(theirs) == merged(ours.charges("one"))


@pytest.mark.reference
# log(1 - q) of a step without sampling
@pytest.mark.filterwarnings("ignore:divide by zero:RuntimeWarning")
@pytest.mark.parametrize("ours", HISTORIES)
def test_the_exported_prv_epsilon_is_close_above_our_epsilon(ours):
    theirs = accountant(ours, ["one"], mechanism="prv").get_epsilon(1e-5)
    assert 0 < theirs - ours.epsilon(["one"], delta=1e-5) < 0.02


def test_a_record_of_two_partitions_is_exported_with_both_rates():
    [entry] = accountant(HISTORIES[0], ["one", "two"]).history
    assert entry == (1.0, 0.02, 1000)


def test_histories_that_opacus_cannot_express_are_refused():
    with pytest.raises(
        PrivacyError,
        match=r"Opacus cannot express Charge\(.*noise_multiplier=0.*use Account.epsilon",
    ):
        accountant(account(({"one": 1.0}, 0.0, 1)), ["one"])
    with pytest.raises(PrivacyError, match="replace-one, but Opacus has only add-remove"):
        accountant(account(({"one": 0.1}, 1.0, 1), relation="replace-one"), ["one"])
    with pytest.raises(ConfigError, match="mechanism = 'gdp' is not allowed; allowed: rdp, prv"):
        accountant(HISTORIES[0], ["one"], mechanism="gdp")
    with pytest.raises(ConfigError, match="partition"):
        accountant(HISTORIES[0], ["three"])


@pytest.mark.parametrize("noise", ["discrete-gaussian", "exponential"])
def test_exports_of_discrete_or_exponential_noise_are_refused(noise):
    ours = account(({"one": 1.0}, 1.0, 1))
    # as of a histogram or a selection
    ours.entries = [replace(entry, mechanism=noise) for entry in ours.entries]
    with pytest.raises(PrivacyError, match=f"cannot express.*{noise}"):
        accountant(ours, ["one"])


@pytest.mark.deep(reason="deployment: fresh processes that load libraries where they are used")
def test_opacus_is_imported_only_for_opacus_layers():
    code = """
import sys, torch
from perdure.privacy.guard import model_checks as guard
from perdure.privacy.guard import repair
from perdure.privacy.clipping.clip import Clip
from perdure.privacy.opacus.samplers import grad_sample_sum
def tried(model, x):
    losses = lambda: model(*x).flatten(1).sum(1)
    total = grad_sample_sum(model, dict(model.named_parameters()), losses, 3, Clip(norm=1.0))
    print(total is None, "opacus" in sys.modules)
x = torch.rand(3, 2)
tried(torch.nn.Bilinear(2, 2, 2), (x, x))
tried(torch.nn.Sequential(torch.nn.Linear(2, 2)), (x,))
tried(torch.nn.Conv1d(2, 2, 1, padding="same"), (x[:, :, None],))
"""
    done = subprocess.run(
        [sys.executable, "-W", "error", "-c", code], capture_output=True, text=True, check=False
    )
    assert done.stdout.split("\n")[:3] == ["True False", "True False", "False True"], done.stderr


def test_a_model_wrapped_by_opacus_gives_a_warning():
    _, wrapped, _, _ = engine_for(small())
    with pytest.warns(UserWarning, match=r"accounted from now on.*from_opacus"):
        learner = Learner(
            model=wrapped,
            strategy=Naive(),
            optimizer=torch.optim.SGD,
            epochs=1,
            privacy=Privacy(noise_multiplier=1.0, seed=0),
        )
    assert not isinstance(learner.model, GradSampleModule)
