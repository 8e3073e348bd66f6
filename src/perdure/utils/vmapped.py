"""Numbers that a hook can read when it runs alone, but not under `torch.func.vmap`."""

from torch import Tensor


def number_unless_vmapped(value: Tensor) -> float | None:
    """Return the number in a tensor of shape (), or None under vmap.

    Under vmap the tensor stands for several numbers. A hook can use this function to skip work if a
    number of its state allows it, and do all the work under vmap. On a GPU, reading a number waits
    for the device.
    """
    try:
        return float(value)
    except RuntimeError:  # error of vmap for a tensor that has one number per record
        return None
