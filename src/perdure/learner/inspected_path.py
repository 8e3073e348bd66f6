"""Checks, during a run, that the code from rows to losses is still the code the guard tested."""

from collections.abc import Callable
from functools import partial
from operator import is_

from torch import nn

from perdure.errors import GuardError
from perdure.learner.inspection import (
    TRIAL_RECORDS,
    Inspection,
    Verdict,
    look_at_mixtures,
    losses_of,
)
from perdure.learner.loss_path import LossPath
from perdure.privacy.guard.independence import unlisted
from perdure.privacy.guard.loss_checks import check_losses, quiet_training
from perdure.privacy.guard.neighbour_checks import check_neighbours, explained
from perdure.utils.modules import evaluating

HOOKS = ("_forward_hooks", "_forward_pre_hooks", "_backward_hooks", "_backward_pre_hooks")
"""Names of the attributes in which a module holds its hooks."""
HOOKS_OF_ALL = tuple(getattr(nn.modules.module, f"_global{kind}") for kind in HOOKS)
"""Hooks that torch runs in all modules."""


class InspectedPath:
    """Record of the code from rows to losses that the guard tested, to refuse changed code.

    Args:
        inspection: inspection that was run before any charge.
        verdict: result of the inspection; "tested" losses are tested again in each experience.
    """

    def __init__(self, inspection: Inspection, verdict: Verdict) -> None:
        self._parts = parts_of_others(inspection.model, inspection.path)
        self._glance = Glance(inspection.model, inspection.path)
        self._looks_again = verdict.independence == "tested"
        self._looked_at: set[int] = set()

    def look_again(self, inspection: Callable[[], Inspection], index: int, *, begins: bool) -> None:
        """Refuse losses that couple records with the state at the start of an experience.

        Losses that are independent by construction are not tested again. The test uses released
        values and synthetic rows only.

        Args:
            inspection: function that makes an inspection of the current state.
            index: index of the experience.
            begins: True if the experience starts; False if it is resumed in the middle.
        """
        inspected = begins and index == 0
        if inspected or not self._looks_again or index in self._looked_at:
            return
        self._looked_at.add(index)
        _look_again(inspection(), index)

    def refuse_changed(self, model: nn.Module, path: LossPath) -> None:
        """Refuse code that was changed since the last check; fast enough for every step.

        A user's own loop may set a hook or a method between two steps.

        Raises:
            GuardError: if the code was changed.
        """
        if not self._glance.same(Glance(model, path)):
            raise GuardError(
                "a hook, a forward method, the strategy or another part of the forward pass and "
                "the losses was changed between two steps; allowed: the same code in the whole "
                "run; make the change before the session is prepared"
            )

    def refuse_other(self, model: nn.Module, path: LossPath) -> None:
        """Refuse a run whose user code differs from the user code that was tested.

        A callback may have set a hook, a method or another strategy.

        Raises:
            GuardError: names the tested code and the present code.
        """
        self._glance = Glance(model, path)
        found = parts_of_others(model, path)
        if found != self._parts:
            raise GuardError(
                "the forward pass and the losses now run "
                f"{' and '.join(found) or 'library code only'}, but the guard tested them with "
                f"{' and '.join(self._parts) or 'library code only'}; allowed: the same code in "
                "the whole run; set hooks, methods, strategy, "
                "adversary and views before the session is prepared"
            )


def _look_again(inspection: Inspection, index: int) -> None:
    """Refuse losses that couple records at the start of an experience, with its current state.

    Raises:
        GuardError: names the code that couples records.
    """
    domain = inspection.domain_of(index)
    pairs = inspection.pairs(domain)
    facts = inspection.facts(index, len(pairs[0].one))
    inputs = domain.random(TRIAL_RECORDS, inspection.generator).to(inspection.device)
    own = inspection.rows.facts(index, TRIAL_RECORDS)
    with evaluating(inspection.model):  # restores the modes at the end
        quiet_training(inspection.model)
        with explained(inspection.name, "a small batch"):
            check_losses(partial(inspection.losses, index), inputs, own, inspection.name)
        for name, ask in losses_of(inspection).items():
            of = partial(ask, index)
            check_neighbours(inspection.model, of, pairs, facts, name, layers=False)
            drop = name == inspection.name  # an attack may use random numbers
            look_at_mixtures(inspection, ask, name, index, pairs, drop=drop)


def parts_of_others(model: nn.Module, path: LossPath) -> tuple[str, ...]:
    """Return the names of the parts between rows and losses that are not library code."""
    return (*unlisted(model), *path.foreign_parts())


class Glance:
    """Record of the code that computes losses, at one time: objects, methods, numbers of hooks.

    Args:
        model: model that is trained.
        path: computation from rows to their losses.
    """

    def __init__(self, model: nn.Module, path: LossPath) -> None:
        self._things: list[object] = [
            path.strategy,
            path.adversary,
            path.views,
            path.mixing,
            path.defence,
            path.task,
        ]
        self._counts = list(map(len, HOOKS_OF_ALL))
        for module in model.modules():
            own = vars(module)
            self._things += [module, type(module), own.get("forward")]
            self._counts += [len(own[kind]) for kind in HOOKS]

    def same(self, other: "Glance") -> bool:
        """Return True if both records have the very same objects, and equally many hooks."""
        alike = self._counts == other._counts and len(self._things) == len(other._things)
        return alike and all(map(is_, self._things, other._things))
