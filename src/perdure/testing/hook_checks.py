"""Checks of single hooks, on a learner in the middle of its second experience."""

from collections.abc import Callable, Mapping
from functools import partial
from typing import Any

import torch
from torch import Tensor

from perdure.contract.forward import Forward
from perdure.contract.state import State
from perdure.contract.strategy import Strategy
from perdure.data.records import Batch
from perdure.privacy.clipping.bookkeeping import clipped_gradient_sum
from perdure.privacy.clipping.clip import Clip, clipped_sum
from perdure.queries.evaluation import bounded_sum
from perdure.queries.gram import Gram
from perdure.queries.per_record import as_params, gradient_rows
from perdure.testing.fixtures import (
    CLIP_NORM,
    NOISE,
    MidRunFixture,
    NotApplicable,
    StrategyFixture,
    copied,
    differing,
    require,
    tensors_of,
)
from perdure.types import Params

ROUNDING = 1 + 1e-4
EVERY = 5
"""Step between the rows that `rows` also evaluates alone: rows 0, 5, 10 and so on."""
RowsOfBatch = Callable[[Batch], Mapping[str, Tensor]]

# --------------------------------------------------------------------------- a hook changes nothing


def pure(fixture: StrategyFixture) -> None:
    """Check that the strategy's hooks are pure functions.

    A hook must change neither its arguments nor the strategy, and must return the same result in a
    second call.
    """
    scene = MidRunFixture(fixture)
    for hook, call in scene.calls().items():
        before = copied(held(scene))
        own = inside(scene.strategy)
        first = copied(tensors_of(call()))
        again = tensors_of(call())
        changed = differing(before, held(scene))
        require(
            not changed,
            f"{hook}() changes {', '.join(changed[:3])} in place",
            allowed="new tensors",
            fix="write value = value + change instead of value += change, or clone first",
        )
        require(
            inside(scene.strategy) == own,
            f"{hook}() changes the strategy object itself",
            allowed="hyper-parameters that stay as they are",
            fix="keep what is remembered in the State",
        )
        require(
            not differing(first, again),
            f"{hook}() gives {', '.join(differing(first, again)[:3])} anew at every call",
            allowed="a function of its arguments",
            fix="keep what is remembered in the State, and draw at random from a generator "
            "seeded by a field",
        )
    _derive_keeps_to_local_names(scene)
    _adds_the_gradient_of_its_penalty(scene)
    _follows_in_place_as_anew(scene)


def _adds_the_gradient_of_its_penalty(scene: MidRunFixture) -> None:
    strategy = scene.strategy
    if not strategy.uses("penalty"):
        return
    leaves = {name: value.clone().requires_grad_() for name, value in scene.params.items()}
    mine, theirs = ({n: torch.zeros_like(v) for n, v in scene.params.items()} for _ in range(2))
    strategy.add_penalty_gradient(mine, leaves, scene.state)
    Strategy.add_penalty_gradient(strategy, theirs, leaves, scene.state)
    wrong = [n for n in mine if not torch.allclose(mine[n], theirs[n], rtol=1e-3, atol=1e-5)]
    require(
        not wrong,
        f"add_penalty_gradient() adds a gradient to {', '.join(wrong[:3])} that differs from the "
        "gradient of penalty()",
        allowed="the same up to rounding",
        fix="correct the formula, or leave add_penalty_gradient() out",
    )


def _follows_in_place_as_anew(scene: MidRunFixture) -> None:
    strategy = scene.strategy
    if not strategy.uses("after_step"):
        return
    handed = (scene.params, scene.later, scene.gradient)
    own = State(copied(scene.state), scene.state.rules)
    anew = strategy.after_step(*handed, own, NOISE)
    kept = {name: value for name, value in own.items() if anew[name] is value}
    values = copied(kept)
    in_place = strategy.after_step_in_place(*handed, own, NOISE)
    wrong = [*differing(anew, in_place), *differing(values, kept)]
    require(
        not wrong,
        f"after_step_in_place() leaves another {', '.join(wrong[:3])} than after_step()",
        allowed="the same bits, written into what after_step() replaces",
        fix="let after_step() call it on copies, or leave after_step_in_place() out",
    )


def _derive_keeps_to_local_names(scene: MidRunFixture) -> None:
    state = scene.strategy.after_experience(scene.door().curator, scene.params, scene.state)
    wrong = [
        name
        for name in differing(state, scene.strategy.derive(state))
        if state.rules.get(name) != "local"
    ]
    require(
        not wrong,
        f"derive() changes {', '.join(wrong[:3])}, which a federation combines",
        allowed="names declared 'local'",
        fix="declare what is derived as 'local', or change it in after_experience()",
    )


def held(scene: MidRunFixture) -> dict[str, Tensor]:
    """Return everything that is passed to hooks, by name."""
    parts: dict[str, Mapping[str, Tensor]] = {
        "parameter": scene.params,
        "state": scene.state,
        "row tensor": scene.batch.tensors(),
        "gradient": scene.gradient,
        "later parameter": scene.later,
        "model": scene.learner.params,
        "references": tensors_of(scene.references),
    }
    return {
        f"{part} {name}": value.detach()
        for part, tensors in parts.items()
        for name, value in tensors.items()
    }


def inside(value: object) -> object:
    """Return the contents of an object, for a comparison."""
    if isinstance(value, Strategy):
        return {name: inside(part) for name, part in vars(value).items()}
    if isinstance(value, dict):
        return {repr(key): inside(part) for key, part in value.items()}
    if isinstance(value, list | tuple):
        return [inside(part) for part in value]
    return value.tolist() if isinstance(value, Tensor) else repr(value)


# ---------------------------------------------------------------------- a row is that of one record


def rows(fixture: StrategyFixture) -> str | None:
    """Check that a strategy's results for one record do not depend on other records in the batch.

    Losses, predictions, stored tensors and rows of queries must be the same for a record alone, in
    the batch, and among other or fewer records.
    """
    scene = MidRunFixture(fixture)
    skipped = scene_couples(fixture.strategy)
    for what, ask in _asked_by_row(scene).items():
        if what == "losses()" and skipped:
            continue
        _same_for_every_company(what, ask, scene.batch)
    return f"losses(): {skipped}" if skipped else None


def scene_couples(strategy: Strategy) -> str | None:
    """Return the strategy's reason why a record's loss may depend on others; None if it may not."""
    return (
        "the strategy declares couples_records, so privacy refuses it"
        if strategy.couples_records
        else None
    )


def _asked_by_row(scene: MidRunFixture) -> dict[str, RowsOfBatch]:
    strategy = scene.strategy
    state = scene.state
    found: dict[str, RowsOfBatch] = {
        "losses()": lambda batch: {"loss": scene.losses(scene.forward, batch)},
        "remember()": lambda batch: strategy.remember(scene.forward, batch, state),
        "predict()": lambda b: {
            "logits": strategy.predict(scene.forward, b.inputs, scene.context, state)
        },
    }
    for number, question in enumerate(scene.questions):
        by_batch = question.kind in ("histograms", "selections")
        query = question.rows.parts if isinstance(question.rows, Gram) else question.rows
        ask = query if by_batch else partial(query, scene.forward)
        found[f"question {number} ({question.purpose})"] = lambda batch, ask=ask: as_params(
            ask(batch)
        )  # type: ignore[misc]
    return found


def _same_for_every_company(what: str, ask: RowsOfBatch, batch: Batch) -> None:
    whole = tensors_of(ask(batch))
    n = len(batch)
    wrong = [
        f"{name} of shape {tuple(value.shape)}"
        for name, value in whole.items()
        if value.shape[:1] != (n,)
    ]
    require(
        not wrong,
        f"{what} gives {', '.join(wrong[:3])} for {n} rows",
        allowed="one row per record, (n, ...)",
        fix="use reduction='none' and keep the rows in order",
    )
    changed = batch.map(lambda value: value.clone())
    changed.inputs[1::2] = 1 - changed.inputs[1::2]
    changed.labels[1::2] = changed.labels[1::2].flip(0)
    companies = {
        "other": (changed, slice(0, None, 2)),
        "no other": (batch.take(slice(0, None, 2)), None),
    }
    for company, (rows_of, kept) in companies.items():
        answer = tensors_of(ask(rows_of))
        _same(what, f"{company} rows beside it", whole, answer, slice(0, None, 2), kept)
    for i in range(0, n, EVERY):
        _same(
            what,
            "no rows beside it",
            whole,
            tensors_of(ask(batch.take(slice(i, i + 1)))),
            slice(i, i + 1),
            None,
        )


def _same(
    what: str,
    company: str,
    whole: Mapping[str, Tensor],
    answer: Mapping[str, Tensor],
    place: slice,
    kept: slice | None,
) -> None:
    for name, value in whole.items():
        there = answer[name] if kept is None else answer[name][kept]
        moved = there.shape != value[place].shape or not torch.allclose(
            there, value[place], rtol=1e-3, atol=1e-5
        )
        require(
            not moved,
            f"{what} gives a record another {name} with {company}",
            allowed="a row that depends on that record, parameters, state and context only",
            fix="use no batch means, no classes seen in the batch, no other rows; or declare "
            "couples_records = True, "
            "which is refused under privacy",
        )


# ---------------------------------------------------------------- a record moves a sum by its bound


def bounds(fixture: StrategyFixture) -> None:
    """Check the sensitivity of the clipped gradient and of the sum of every query.

    Removing one record changes them by at most the clip norm.
    """
    if skipped := scene_couples(fixture.strategy):
        raise NotApplicable(skipped)
    scene = MidRunFixture(fixture)
    for what, (clip, total) in _sums(scene).items():
        whole = total(scene.batch, clip) or {}
        for dropped in range(0, len(scene.batch), EVERY):
            fewer = total(scene.batch.take(_but(dropped, scene.batch)), clip) or {}
            moved = (
                torch.stack([(whole[name] - fewer[name]).double().square().sum() for name in whole])
                .sum()
                .sqrt()
            )
            require(
                float(moved) <= clip.norm * ROUNDING,
                f"one record moves {what} by {float(moved):.3g}",
                allowed=f"its clip norm, {clip.norm:.3g}",
                fix="let row i depend on record i only, and call forward on all rows in their "
                "order",
            )


Total = Callable[[Batch, Clip], Params | None]


def _sums(scene: MidRunFixture) -> dict[str, tuple[Clip, Total]]:
    model = scene.learner.model
    params = scene.learner.params
    clip = Clip(norm=CLIP_NORM)

    def by_rows(batch: Batch, clip: Clip) -> Params | None:
        return clipped_sum(
            gradient_rows(scene.losses, model), scene.params, batch.tensors(), clip, 10
        )

    def by_bookkeeping(batch: Batch, clip: Clip) -> Params | None:
        return clipped_gradient_sum(
            model,
            params,
            lambda: scene.losses(scene.learner.session.forward, batch),
            len(batch),
            clip,
        ) or by_rows(batch, clip)

    found: dict[str, tuple[Clip, Total]] = {
        "the gradient, taken record by record,": (clip, by_rows),
        "the gradient of a batch": (clip, by_bookkeeping),
    }
    for number, question in enumerate(scene.questions):
        if question.kind in ("releases", "memory_releases") and question.clip_norm is not None:
            asked = Clip(norm=question.clip_norm)
            found[f"question {number} ({question.purpose})"] = (
                asked,
                partial(_released, scene, question.rows),
            )
    return found


def _released(
    scene: MidRunFixture, query: Callable[..., Any], batch: Batch, clip: Clip
) -> Params | None:
    return bounded_sum(query, scene.learner.model, scene.params, batch.tensors(), clip)


def _but(dropped: int, batch: Batch) -> Tensor:
    return torch.arange(len(batch), device=batch.inputs.device) != dropped


# --------------------------------------------------------------------------- many replicas at once


def vmap(fixture: StrategyFixture) -> None:
    """Check that the strategy's hooks run under `torch.func.vmap`.

    Hooks must give the same results for stacked parameters and states as for each one alone.
    """
    reason = fixture.strategy.not_vmappable_because
    if reason is not None:
        require(
            " " in reason.strip(),
            f"not_vmappable_because = {reason!r}",
            allowed="a sentence, or None",
            fix="say what stands in the way",
        )
        raise NotApplicable(reason)
    scene = MidRunFixture(fixture)
    fix = "use masks and torch.where, no .item() or branch on values, or set not_vmappable_because"
    stacks = _stacks(scene)
    for hook, call in _on_tensors(scene).items():
        alone = [
            tensors_of(call(*({n: v[i] for n, v in part.items()} for part in stacks)))
            for i in range(3)
        ]
        try:
            together = torch.func.vmap(lambda *parts, call=call: tensors_of(call(*parts)))(*stacks)
        except Exception as error:  # an error of torch, or of the hook on batched tensors
            told = str(error).splitlines()[0] if str(error) else type(error).__name__
            require(
                False,
                f"{hook}() fails under torch.func.vmap ({told})",
                allowed="hooks on tensors alone",
                fix=fix,
            )
        for i, single in enumerate(alone):
            wrong = [
                n
                for n, v in single.items()
                if not torch.allclose(together[n][i], v, rtol=1e-3, atol=1e-4)
            ]
            require(
                not wrong,
                f"{hook}() gives another {', '.join(wrong[:3])} under torch.func.vmap than "
                "one by one",
                allowed="the same up to rounding",
                fix=fix,
            )


def _stacks(scene: MidRunFixture) -> tuple[Params, Params, Params, Params]:
    """Three parameters, later parameters, states and references; the first are unchanged."""
    rng = torch.Generator().manual_seed(4)

    def near(value: Tensor) -> Tensor:
        return value + 0.1 * torch.randn(value.shape, generator=rng).to(value)

    # symmetric matrices must stay symmetric, and counts must stay counts
    def scaled(value: Tensor, factor: float) -> Tensor:
        return (value * factor).to(value.dtype) if value.is_floating_point() else value

    params = {n: torch.stack([v, near(v), near(v)]) for n, v in scene.params.items()}
    later = {n: v + 0.01 for n, v in params.items()}
    states = {
        n: torch.stack([scaled(v, 1 + 0.1 * k) for k in range(3)]) for n, v in scene.state.items()
    }
    references = {
        n: torch.stack([v, near(v), near(v)]) for n, v in tensors_of(scene.references).items()
    }
    return params, later, states, references


Hook = Callable[[Params, Params, Params, Params], object]


def _on_tensors(scene: MidRunFixture) -> dict[str, Hook]:
    strategy = scene.strategy
    batch = scene.batch
    rules = scene.state.rules

    def state(tensors: Params) -> State:
        return State(tensors, rules)

    def at(params: Params) -> Forward:
        return Forward(scene.learner.model, params)

    def references(tensors: Params) -> tuple[Params, ...]:
        return tuple(
            {n: tensors[f"{i}.{n}"] for n in each} for i, each in enumerate(scene.references)
        )

    return {
        "begin_round": lambda now, _, s, __: strategy.begin_round(now, state(s)),
        "losses": lambda now, _, s, __: strategy.losses(at(now), batch, scene.context, state(s)),
        "penalty": lambda now, _, s, __: strategy.penalty(now, state(s)),
        "project": lambda now, later, s, r: strategy.project(later, references(r), state(s)),
        "after_step": lambda now, later, s, _: strategy.after_step(
            now, later, now, state(s), NOISE
        ),
        "derive": lambda _, __, s, ___: strategy.derive(state(s)),
        "predict": lambda now, _, s, __: strategy.predict(
            at(now), batch.inputs, scene.context, state(s)
        ),
    }
