"""Extreme eigenvalues of the Hessian of a public loss: saddle points, and sharpness."""

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.func import functional_call

from perdure.data.records import Records
from perdure.errors import ConfigError
from perdure.learner.evaluation import refuse_learnt_records
from perdure.learner.learner import Learner
from perdure.types import Params
from perdure.utils.modules import evaluating
from perdure.utils.seeding import generator, undisturbed

SMALL = 1e-10
"""Norm of a residual, relative to the largest eigenvalue so far, at which Lanczos has converged."""


@dataclass(frozen=True, kw_only=True)
class Curvature:
    """Extreme eigenvalues of the Hessian of a loss at the current parameters.

    Both are Ritz values, which lie between the two exact ones: a negative `smallest` proves, up to
    rounding, that the loss falls in some direction.

    Args:
        smallest: smallest eigenvalue; negative at a saddle point.
        largest: largest eigenvalue, the sharpness; plain gradient descent diverges at learning
            rates above 2 / `largest`.
        loss: the loss.
        gradient_norm: norm of its gradient; 0 at a saddle point.
    """

    smallest: float
    largest: float
    loss: float
    gradient_norm: float


def hessian_extremes(
    learner: Learner,
    records: Records | None = None,
    *,
    experience: int | None = None,
    steps: int = 30,
    rows: int = 256,
    seed: int = 0,
) -> Curvature:
    """Measure the curvature of a learner's loss on public records, by the Lanczos method.

    A step costs two passes and the memory of one copy of the parameters.

    Guarantee: none for `records`, which must be public. Under privacy, training records are
    refused, unless the diagnostics are raw.

    Args:
        learner: learner that was prepared or trained; its trained parameters are measured, in
            evaluation mode.
        records: public records; None for the test records of the experience.
        experience: index of the experience whose classes and test records are meant; None for the
            last one that began.
        steps: number of products with the Hessian; more give closer eigenvalues.
        rows: number of records that are drawn from `records`, at most all.
        seed: seed of the first direction and of the drawn records.

    Raises:
        ConfigError: if there are no records, or `steps` or `rows` is not 1 or more.
        PrivacyError: if the learner has privacy, and was trained on some of the records.

    Source: Lanczos 1950; Pearlmutter 1994, "Fast exact multiplication by the Hessian".
    """
    for name, value in (("steps", steps), ("rows", rows)):
        if value < 1:
            raise ConfigError.of(name, value, "a whole number, 1 or more")
    last = min(learner.position.experience, len(learner.stream) - 1)
    index = last if experience is None else experience
    chosen = learner.stream[index].test if records is None else records
    if not len(chosen):
        raise ConfigError.of("records", "no test records", "public Records of the task")
    if not (learner.privacy and learner.privacy.diagnostics == "raw"):
        refuse_learnt_records(learner.session, chosen, "records")
    drawn = torch.randperm(len(chosen), generator=generator(seed, "curvature"))[:rows]
    drawn = drawn.to(chosen.inputs.device)
    inputs = chosen.inputs[drawn].to(learner.device)
    labels = chosen.labels[drawn].to(learner.device)
    context = learner.session.context(index)
    mask = None if context.scenario == "domain" else context.allowed

    def loss(params: Params) -> Tensor:
        outputs = functional_call(learner.model, params, (inputs,))
        return context.task.losses(outputs, labels, mask).mean()

    with evaluating(learner.model), undisturbed():
        return curvature_of(loss, learner.session.trained or learner.params, steps, seed)


def curvature_of(
    loss: Callable[[Params], Tensor], params: Params, steps: int, seed: int = 0
) -> Curvature:
    """Compute the curvature of a function of parameters.

    Args:
        loss: function from parameters to a scalar.
        params: parameters at which it is measured; they do not change.
        steps: number of products with the Hessian.
        seed: seed of the first direction.
    """
    at = {name: value.detach().clone().requires_grad_() for name, value in params.items()}
    leaves = list(at.values())
    with torch.enable_grad():
        value = loss(at)
        grads = torch.autograd.grad(value, leaves, create_graph=True, materialize_grads=True)
        gradient = torch.cat([each.reshape(-1) for each in grads])

        def product(direction: Tensor) -> Tensor:
            if not gradient.requires_grad:  # a linear loss
                return torch.zeros_like(direction)
            parts = torch.autograd.grad(
                gradient, leaves, direction, retain_graph=True, materialize_grads=True
            )
            return torch.cat([part.reshape(-1) for part in parts]).detach()

        start = torch.randn(len(gradient), generator=generator(seed, "direction"))
        values = ritz_values(product, start.to(gradient.device, gradient.dtype), steps)
    return Curvature(
        smallest=float(values[0]),
        largest=float(values[-1]),
        loss=float(value.detach()),
        gradient_norm=float(gradient.detach().norm()),
    )


def ritz_values(product: Callable[[Tensor], Tensor], start: Tensor, steps: int) -> Tensor:
    """Return the Ritz values of a symmetric matrix, ascending, by Lanczos steps.

    Args:
        product: function from a vector (d,) to its product with the matrix.
        start: (d,) first direction.
        steps: largest number of products.
    """
    basis = [start / start.norm()]
    diagonal: list[float] = []
    beside: list[float] = []
    for step in range(min(steps, len(start))):
        vector = product(basis[-1])
        diagonal.append(float(vector @ basis[-1]))
        # twice against all directions, because rounding brings the first ones back
        for _ in range(2):
            for each in basis:
                vector = vector - (vector @ each) * each
        length = float(vector.norm())
        scale = max(map(abs, [*diagonal, *beside]))
        if step + 1 == min(steps, len(start)) or length <= SMALL * scale:
            break
        beside.append(length)
        basis.append(vector / length)
    table = torch.diag(torch.tensor(diagonal, dtype=torch.float64))
    sides = torch.tensor(beside[: len(diagonal) - 1], dtype=torch.float64)
    table = table + torch.diag(sides, 1) + torch.diag(sides, -1) if len(diagonal) > 1 else table
    values: Tensor = torch.linalg.eigvalsh(table)
    return values
