"""Numbers that a hook may read where it runs alone, and may not under `torch.func.vmap`."""

from torch import Tensor


def number_unless_vmapped(value: Tensor) -> float | None:
    """Return the number in a tensor of shape (); None under vmap, where there are several.

    A hook that spares itself work by a number of its state still runs on stacked states: it then
    does all the work. On an accelerator reading a number waits for the device.
    """
    try:
        return float(value)
    except RuntimeError:  # what vmap raises for a number that is one a replica
        return None
