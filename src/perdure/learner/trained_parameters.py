"""Choice of the parameters that are trained, for frozen, partial and full fine-tuning."""

from typing import Literal

from torch import nn
from torch.nn.modules.batchnorm import _BatchNorm

from perdure.errors import ConfigError

Train = Literal["all", "head"] | tuple[str, ...]
"""All parameters, the head alone, or the parameters whose names begin with one of several texts."""
HEAD = "head."
"""Beginning of the names of the parameters of a head."""
SHOWN = 12
"""Most names of parameters in a message."""


def choose_trained(model: nn.Module, chosen: Train | None) -> None:
    """Let exactly the chosen parameters of a model require gradients.

    Guarantee: parameters that are not chosen enter no gradient. Under privacy the clip norm bounds
    the gradient of the chosen ones alone, so the noise falls on fewer numbers at equal epsilon.

    Args:
        model: model whose parameters are chosen; it is changed in place.
        chosen: "all", "head", or beginnings of names; None to change nothing.

    Raises:
        ConfigError: if no parameter has one of the beginnings; the message has the names.
    """
    if chosen is None:
        return
    names = [name for name, _ in model.named_parameters()]
    beginnings = {"all": ("",), "head": (HEAD,)}.get(chosen) if isinstance(chosen, str) else chosen
    if not beginnings:
        raise ConfigError.of(
            "fine_tune", chosen, 'at least one beginning of a name, such as "head."'
        )
    for beginning in beginnings:
        if not any(name.startswith(beginning) for name in names):
            more = ", ..." if len(names) > SHOWN else ""
            allowed = f"beginnings of {', '.join(names[:SHOWN])}{more}"
            raise ConfigError.of("fine_tune", chosen, allowed)
    for name, value in model.named_parameters():
        value.requires_grad_(name.startswith(tuple(beginnings)))


def keep_frozen_statistics(model: nn.Module) -> None:
    """Put BatchNorm layers without trained parameters into evaluation mode.

    Otherwise a frozen body would go on averaging its inputs, and change its outputs.
    """
    for part in model.modules():
        own = list(part.parameters(recurse=False))
        if isinstance(part, _BatchNorm) and own and not any(each.requires_grad for each in own):
            part.eval()
