"""Combination of the strategy states of clients, by the declared rule of each name."""

from collections.abc import Sequence

import torch
from torch import Tensor

from perdure.contract.state import Rule, State
from perdure.errors import StrategyError


def sent(state: State) -> State:
    """Return the part of a client's state that the server gets: all names except `local` ones."""
    rules: dict[str, Rule] = {name: rule for name, rule in state.rules.items() if rule != "local"}
    return State({name: state[name] for name in rules}, rules)


def sent_every_round(state: State) -> State:
    """Return the part of a state that is combined after every round."""
    names = [name for name, rule in state.rules.items() if rule == "round_mean"]
    return State({name: state[name] for name in names}, dict.fromkeys(names, "round_mean"))


def combine_round(old: State, states: Sequence[State], clients: int) -> State:
    """Combine the tensors of the rule `round_mean` after a round.

        old + sum_k (state_k - old) / clients

    A client that is not in the round changes nothing, so the result is the mean over all clients.

    Args:
        old: state before the round, the same for all clients.
        states: states of the clients of the round, in a fixed order.
        clients: number of clients of the federation.
    """
    tensors = {}
    for name, before in old.items():
        device = states[0][name].device
        start = before.to(device, torch.float64)
        moved = sum((state[name].double() - start for state in states), torch.zeros_like(start))
        tensors[name] = (start + moved / clients).to(before.dtype)
    return State(tensors, old.rules)


def combine(old: State | None, states: Sequence[State], weights: Sequence[float]) -> State:
    """Combine the states of all clients into one state.

    Each tensor is combined by the rule that was declared for its name; tensors with the rule
    `local` are left out.

        sum:  old + sum_k (state_k - old)          mean:  sum_k w_k state_k / sum_k w_k

    Tensors with the rule `round_mean` stay as the last round left them (see `combine_round`).

    If there is only one state, its tensors are returned unchanged.

    Args:
        old: state before the round, the same for all clients; None for zeros.
        states: one state per client, in a fixed order.
        weights: declared sizes of the clients.

    Raises:
        StrategyError: if a tensor of integers has the rule `mean`.
    """
    parts = [sent(state) for state in states]
    rules = parts[0].rules
    tensors = {}
    for name, rule in rules.items():
        values = [part[name] for part in parts]
        before = torch.zeros_like(values[0]) if old is None else old[name]
        tensors[name] = (
            values[0] if len(values) == 1 else RULES[rule](before, values, weights, name)
        )
    return State(tensors, rules)


def _sum(before: Tensor, values: Sequence[Tensor], weights: Sequence[float], name: str) -> Tensor:
    wide = torch.float64 if before.is_floating_point() else before.dtype
    # clients reply with tensors on the CPU; the server may use a GPU
    start = before.to(values[0].device, wide)
    return (start + sum(value.to(wide) - start for value in values)).to(before.dtype)


def _mean(before: Tensor, values: Sequence[Tensor], weights: Sequence[float], name: str) -> Tensor:
    if not before.is_floating_point():
        raise StrategyError(
            f"state {name!r} is {before.dtype}, and integers have no mean; declare the rule sum "
            "or local for it"
        )
    total = sum(weights)
    terms = [weight / total * value.double() for weight, value in zip(weights, values, strict=True)]
    return torch.stack(terms).sum(0).to(before.dtype)


def _kept(before: Tensor, values: Sequence[Tensor], weights: Sequence[float], name: str) -> Tensor:
    return before


RULES = {"sum": _sum, "mean": _mean, "round_mean": _kept}
