"""Checks of a strategy in whole runs: alone, stopped and resumed, and in a federation."""

import dataclasses
import inspect
from collections.abc import Sequence
from difflib import get_close_matches
from pathlib import Path
from tempfile import TemporaryDirectory

import torch
from torch import Tensor

from perdure.contract.state import State
from perdure.contract.strategy import Strategy
from perdure.learner.checkpoint import Store
from perdure.learner.learner import Learner
from perdure.privacy.settings import Privacy
from perdure.testing.fixtures import (
    BLOCKS,
    SIMULATED,
    StrategyFixture,
    copied,
    differing,
    require,
    run,
)

# --------------------------------------------------------------------------- what it is


def declared(fixture: StrategyFixture) -> None:
    """Check that the strategy is a frozen, hashable dataclass.

    `small_model` of the strategy must return the same model in every call.
    """
    kind = type(fixture.strategy)
    fix = "write @dataclass(frozen=True, kw_only=True) above the class"
    parameters = getattr(kind, "__dataclass_params__", None)
    require(
        parameters is not None and parameters.frozen,
        f"{kind.__name__} is no frozen dataclass",
        allowed="frozen dataclasses",
        fix=fix,
    )
    hooks = [
        name
        for name, value in vars(Strategy).items()
        if callable(value) and not name.startswith("_")
    ]
    for name in vars(kind):
        meant = (
            get_close_matches(name, hooks, 1, 0.8)
            if name not in hooks and callable(getattr(kind, name))
            else []
        )
        require(
            not meant or fixture.strategy.uses(meant[0]),
            f"{name}() is no hook",
            allowed=", ".join(hooks),
            fix=f"did you mean {meant[0] if meant else ''}()? Rename it, or give a helper "
            "another name",
        )
    known = {field.name for field in dataclasses.fields(fixture.strategy)}
    own = [
        name
        for name, of in inspect.get_annotations(kind).items()
        if name not in known and "ClassVar" not in str(of)
    ]
    require(
        not own,
        f"{', '.join(own)} of {kind.__name__} is no field",
        allowed="fields of a dataclass",
        fix=fix,
    )
    try:
        hash(fixture.strategy)
    except TypeError as error:
        require(
            False,
            f"it has no hash ({error})",
            allowed="hashable fields",
            fix="use tuples instead of lists",
        )
    moved = differing(fixture.build().state_dict(), fixture.build().state_dict())
    require(
        not moved,
        f"its model is made with different {', '.join(moved[:3])} in every call",
        allowed="the same model",
        fix="seed the initialisation, as perdure.models.classifiers.build does",
    )


# --------------------------------------------------------------------------- alone


def alone(fixture: StrategyFixture) -> None:
    """Check a strategy on a whole stream, without federation and without a stop.

    The state must keep its layout, numbers must be finite, and predictions and penalties must
    respect the masks and the plan.
    """
    learner = fixture.prepared()
    as_laid_out = layout(learner.state)

    def watch(point: str, learner: Learner) -> None:
        if point in ("step.done", "experience.consolidated"):
            _kept(
                learner,
                as_laid_out,
                "after_step()" if point == "step.done" else "after_experience() or derive()",
            )
        if point == "step.done" and fixture.strategy.uses("penalty"):
            _free_of_penalty(learner)
        if point == "experience.end":
            _predictions(learner)

    learner.callbacks = [watch]
    run(learner, fixture.stream)


def _free_of_penalty(learner: Learner) -> None:
    experience = learner.stream[learner.position.experience]
    params = learner.params
    if learner.training.of(experience).applies_penalty:
        return
    pull = {name: torch.zeros_like(value) for name, value in params.items()}
    learner.strategy.add_penalty_gradient(pull, params, learner.state)
    pulled = [name for name, value in pull.items() if bool(value.any())]
    require(
        not pulled,
        f"penalty() pulls {', '.join(pulled[:3])} in experience {experience.index}",
        allowed="none where plan() says applies_penalty=False",
        fix="leave applies_penalty out of the plan of that experience",
    )


def layout(state: State) -> dict[str, str]:
    """Describe the tensors of a state: name to shape, dtype, device and rule."""
    return {
        name: f"{tuple(value.shape)} {value.dtype} {value.device.type} {state.rules[name]}"
        for name, value in state.items()
    }


def _kept(learner: Learner, as_laid_out: dict[str, str], hook: str) -> None:
    now = layout(learner.state)
    wrong = sorted(
        name for name in as_laid_out.keys() | now.keys() if as_laid_out.get(name) != now.get(name)
    )
    require(
        not wrong,
        f"{hook} leaves state {', '.join(f'{n!r} as {now.get(n)}' for n in wrong[:3])}",
        allowed="what init() laid out, "
        f"{', '.join(f'{n!r} as {as_laid_out.get(n)}' for n in wrong[:3])}",
        fix="return state.replace({name: value}) with values of those shapes and types",
    )
    lost = [
        n
        for n, t in learner.state.items()
        if t.is_floating_point() and not bool(torch.isfinite(t).all())
    ]
    require(
        not lost,
        f"{hook} leaves NaN or infinity in state {', '.join(lost[:3])}",
        allowed="finite numbers",
        fix="guard divisions and logarithms, as by clamp(min=tiny)",
    )


def _predictions(learner: Learner) -> None:
    after = learner.position.experience - 1
    for index in range(after + 1):
        experience = learner.stream[index]
        c = learner.stream.num_classes
        allowed = learner.session.context(
            index if learner.stream.scenario == "task" else after
        ).allowed
        with torch.no_grad():
            logits = learner.predictor(index, after=after)(experience.test.inputs)
        require(
            logits.shape == (len(experience.test), c),
            f"predict() gives shape {tuple(logits.shape)}",
            allowed=f"({len(experience.test)}, {c}), one logit per class of the full head",
            fix="keep the whole head",
        )
        require(
            bool(torch.isfinite(logits[:, allowed]).all()),
            "predict() gives NaN or infinity",
            allowed="finite logits",
            fix="guard divisions and logarithms, as by clamp(min=tiny)",
        )
        leak = torch.softmax(logits, dim=1)[:, ~allowed]
        require(
            not bool(leak.any()),
            "predict() gives a probability above 0 to a class that may not be predicted",
            allowed="the classes in context.allowed",
            fix="return torch.where(context.allowed, logits, MASKED)",
        )


# --------------------------------------------------------------------------- stopped and resumed


def resume(fixture: StrategyFixture) -> str | None:
    """Check that a run that is stopped in the middle, saved and loaded ends with the same bits."""
    for privacy in (None,) if fixture.strategy.couples_records else (None, SIMULATED):
        _resumed(fixture, privacy)
    return (
        "under privacy: the strategy declares couples_records, so privacy refuses it"
        if fixture.strategy.couples_records
        else None
    )


def _resumed(fixture: StrategyFixture, privacy: Privacy | None) -> None:
    first = fixture.middle(privacy)
    with TemporaryDirectory(prefix="perdure-") as folder:
        store = Store(Path(folder))
        store.save(1, first.snapshot())
        snapshot = store.load()
    assert snapshot is not None
    # before another learner exists, with which it could wrongly share state
    _to_the_end(first)
    again = fixture.prepared(privacy)
    again.restore(snapshot)
    again.begin(1)
    _to_the_end(again)
    mine = first.snapshot()
    theirs = again.snapshot()
    wrong = [*differing(mine.tensors, theirs.tensors), *differing(mine.private, theirs.private)]
    require(
        not wrong
        and mine.facts == theirs.facts
        and first.evaluate(fixture.stream) == again.evaluate(fixture.stream),
        f"stopped and resumed {'under privacy' if privacy else 'without privacy'}, "
        f"{', '.join(wrong[:3]) or 'its accuracy'} differs from a run that went through",
        allowed="the same bits",
        fix="keep everything that is remembered in the State",
    )


def _to_the_end(learner: Learner) -> None:
    learner.train(learner.training.block(learner.position.experience, BLOCKS - 1, BLOCKS))
    learner.finish()


# --------------------------------------------------------------------------- in a federation


def federated(fixture: StrategyFixture) -> None:
    """Check that one client ends like the learner alone, and two are combined as declared."""
    _only_client(fixture)
    _two_clients(fixture)


def _only_client(fixture: StrategyFixture) -> None:
    from perdure.federated import Federation, run_federation

    learner = fixture.prepared()
    run(learner, fixture.stream)
    server = run_federation(
        lambda _: fixture.learner(), [fixture.stream], Federation(clients=1, rounds=BLOCKS)
    ).learner
    wrong = differing(_shared(learner), _shared(server))
    require(
        not wrong,
        f"{', '.join(wrong[:3])} of the only client of a federation differs from the learner alone",
        allowed="the same bits",
        fix="keep everything that is remembered in the State",
    )
    require(
        learner.matrix == server.matrix,
        "a server makes other predictions than its only client",
        allowed="the same accuracies",
        fix="predict from state declared 'sum' or 'mean', or from what derive() makes of it",
    )


def _shared(learner: Learner) -> dict[str, Tensor]:
    state = {f"state {n}": t for n, t in learner.state.items() if learner.state.rules[n] != "local"}
    return state | {f"parameter {n}": t for n, t in learner.model.state_dict().items()}


def _two_clients(fixture: StrategyFixture) -> None:
    from perdure.data.client_splits import iid
    from perdure.federated import Federation, Server, run_federation

    streams = iid(fixture.stream, clients=2, min_size=2)
    clients = dict[int, Learner]()
    old = dict[str, Tensor]()

    def make(number: int) -> Learner:
        clients[number] = fixture.learner()
        return clients[number]

    def listen(point: str, server: Server) -> None:
        if point == "experience.received":
            old.update(copied(server.learner.state))
        if point == "experience.combined":
            both = [clients[0], clients[1]]
            weights = [
                float(client.training.declared_pool_size(server.experience)) for client in both
            ]
            _combined(server.learner, [client.state for client in both], weights, old)

    run_federation(make, streams, Federation(clients=2, rounds=BLOCKS), callbacks=[listen])


def _combined(
    server: Learner, states: Sequence[State], weights: Sequence[float], old: dict[str, Tensor]
) -> None:
    for name, rule in server.state.rules.items():
        values = [state[name].double() for state in states]
        if rule == "sum":
            expected = old[name].double() + sum(value - old[name].double() for value in values)
        elif rule == "mean":
            expected = torch.stack([w * v for w, v in zip(weights, values, strict=True)]).sum(
                0
            ) / sum(weights)
        else:
            continue
        require(
            torch.allclose(server.state[name].double(), expected, rtol=1e-4, atol=1e-6),
            f"state {name!r} of two clients is not combined as its rule {rule!r} says",
            allowed="sum, mean or local",
            fix="let derive() write to 'local' names only",
        )
