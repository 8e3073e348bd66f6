"""Rule: a step of training needs more memory than there is."""

import os
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor, nn

from perdure.doctor.case import Case
from perdure.doctor.finding import Cause, Finding, Remedy
from perdure.doctor.rules.base import Rule
from perdure.utils.seeding import drawing_from

ROWS = 2
"""Rows of the pass from which the memory of a batch is estimated."""
FULL = 2.0
"""Activations and the gradients of layer outputs, of which a private step keeps both."""


@dataclass(frozen=True, kw_only=True)
class MemoryNeed(Rule):
    """Estimate the bytes of a training step, and compare them with the memory of the machine.

    The estimate counts parameters, gradients and the state of the optimiser, and what autograd
    keeps of one row, times the rows of a pass; under privacy twice, because the gradients of layer
    outputs are kept, too. Data are not counted.

    Symptom: the estimate is above `share` of the memory.

    Remedy: passes of fewer rows (`micro_batch_size`), which change no result.

    Source: own measurement: estimates are 0.7 to 1.2 times the peak of torch on CNNs.

    Args:
        share: share of the memory above which there is a finding.
        available: bytes of memory; None for the memory of the device.
    """

    name: ClassVar[str] = "memory need"
    cause: ClassVar[Cause] = "memory"
    source: ClassVar[str] = "own measurement"

    share: float = 0.8
    available: int | None = None

    def examine(self, case: Case) -> Finding | None:
        """Run two rows through a copy of the model, and count what is kept."""
        memory = self.available or memory_of(case.device)
        if memory is None:
            return None
        fixed = _of_parameters(case)
        row = _of_a_row(case) * (FULL if case.privacy else 1.0)
        rows = case.micro_batch_size or max(case.batch_size, round(case.records_per_step))
        need = fixed + rows * row
        if need <= self.share * memory:
            return None
        fits = int((self.share * memory / 2 - fixed) // row) if row else 0
        fewer = 2 ** (max(1, min(fits, rows // 2)).bit_length() - 1)
        return self.finding(
            f"a step of {rows} rows needs about {_in_words(need)} of {_in_words(memory)}: "
            f"{_in_words(fixed)} for parameters and optimiser, {_in_words(row)} for each row",
            measured=need / memory,
            threshold=self.share,
            remedy=Remedy(
                advice=f"micro_batch_size = {fewer}", changes={"training.micro_batch_size": fewer}
            ),
        )


def memory_of(device: str | torch.device) -> int | None:
    """Return the bytes of memory of a device; None if they are not known."""
    place = torch.device(device)
    if place.type == "cuda":
        return torch.cuda.get_device_properties(place).total_memory
    try:
        return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    except (AttributeError, ValueError, OSError):
        return None


def _of_parameters(case: Case) -> float:
    """Bytes of parameters, their gradients, and the state of the optimiser after a step."""
    stored = sum(value.nbytes for value in case.model.parameters())
    trained = sum(value.nbytes for value in case.trained_parameters.values())
    # the state of a small parameter tells how many tensors the optimiser keeps for each
    probe = nn.Parameter(torch.zeros(2))
    probe.grad = torch.zeros(2)
    optimizer = case.make_optimizer([probe])
    copies = 0
    if optimizer is not None:
        optimizer.step()
        kept = optimizer.state[probe].values()
        copies = sum(isinstance(each, Tensor) and each.shape == probe.shape for each in kept)
    return stored + (1 + copies) * trained


def _of_a_row(case: Case) -> float:
    """Bytes that autograd keeps for one row, without the parameters."""
    model = case.fresh_model()
    own = {value.untyped_storage().data_ptr() for value in model.parameters()}
    kept: dict[int, int] = {}

    def keep(value: Tensor) -> Tensor:
        if value.untyped_storage().data_ptr() not in own:
            kept[value.untyped_storage().data_ptr()] = value.nbytes
        return value

    with (
        torch.enable_grad(),
        drawing_from(case.seed),
        torch.autograd.graph.saved_tensors_hooks(keep, lambda value: value),
    ):
        outputs: Tensor = model(case.some_inputs(ROWS))
    return (sum(kept.values()) + outputs.nbytes) / max(1, len(outputs))


def _in_words(count: float) -> str:
    for unit in ("bytes", "kB", "MB"):
        if count < 1000:
            return f"{count:.3g} {unit}"
        count /= 1000
    return f"{count:.3g} GB"
