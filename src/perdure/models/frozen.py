"""Bodies that are never trained: fixed transforms, or a backbone with given weights.

Only the head of such a model has parameters.

A frozen body has no parameters, only buffers that are neither stored nor sent: all parties build
the same body, from a seed or from their own file of weights. It always stays in evaluation mode.
"""

import copy
from collections.abc import Callable, Sequence

import torch
from torch import Tensor, nn

from perdure.errors import ConfigError
from perdure.models.classifier import Classifier, Head
from perdure.utils.seeding import seeded

Transform = Callable[[Tensor], Tensor]
"""Function from (n, ...) to (n, ...), row by row, such as `Scattering()`."""

_RUNNING = (nn.modules.batchnorm._BatchNorm, nn.modules.instancenorm._InstanceNorm)


class Fixed(nn.Module):
    """Module that applies a transform without parameters, for `nn.Sequential`."""

    def __init__(self, transform: Transform) -> None:
        super().__init__()
        self.transform = transform

    def forward(self, x: Tensor) -> Tensor:
        """Apply the transform to inputs (n, ...)."""
        return self.transform(x)

    def extra_repr(self) -> str:
        """Show the transform with its settings."""
        return repr(self.transform)


class FixedNorm(nn.Module):
    """Normalisation by running statistics, as in evaluation mode.

    There is one scale and one shift per channel.

    scale = weight / sqrt(running_var + eps),    shift = bias - scale * running_mean

    Guarantee: row i of the result is a fixed function of row i, and no statistic changes.

    Args:
        norm: a BatchNorm or InstanceNorm with running statistics.
    """

    scale: Tensor
    shift: Tensor

    def __init__(self, norm: nn.modules.batchnorm._NormBase) -> None:
        super().__init__()
        assert norm.running_mean is not None and norm.running_var is not None
        scale = (norm.running_var.double() + norm.eps).rsqrt()
        scale = scale * norm.weight.detach().double() if norm.weight is not None else scale
        shift = -scale * norm.running_mean.double()
        shift = shift + norm.bias.detach().double() if norm.bias is not None else shift
        self.register_buffer("scale", scale.to(norm.running_mean.dtype))
        self.register_buffer("shift", shift.to(norm.running_mean.dtype))

    def forward(self, x: Tensor) -> Tensor:
        """Apply the normalisation to inputs (n, channels, ...)."""
        shape = (1, -1, *[1] * (x.dim() - 2))
        return x * self.scale.view(shape) + self.shift.view(shape)


class Frozen(nn.Module):
    """Body (n, ...) -> (n, feature_size) from a module or transform, without trainable parameters.

    Parameters become buffers that are not in `state_dict`, and so not in checkpoints and messages.
    BatchNorm with running statistics is replaced by its scale and shift in evaluation mode. The
    given module is not changed.

    Guarantee: row i of the result is a fixed function of row i, if the module in evaluation mode
    is.

    Raises:
        ConfigError: if a BatchNorm has no running statistics, because it mixes records.
    """

    def __init__(self, features: nn.Module | Transform) -> None:
        super().__init__()
        module = features if isinstance(features, nn.Module) else Fixed(features)
        self.features = without_parameters(without_statistics(copy.deepcopy(module)))
        self.eval()

    def forward(self, x: Tensor) -> Tensor:
        """Feature vectors (n, feature_size) of inputs (n, ...)."""
        answer: Tensor = self.features(x)
        return answer.flatten(1)

    def train(self, mode: bool = True) -> "Frozen":
        """Stay in evaluation mode, for any value of `mode`."""
        return super().train(False)


def without_statistics(module: nn.Module) -> nn.Module:
    """Replace every normalisation with running statistics in a module by a `FixedNorm`.

    The module is changed in place and returned.
    """
    if isinstance(module, _RUNNING) and module.running_mean is not None:
        return FixedNorm(module)
    if isinstance(module, nn.modules.batchnorm._BatchNorm):
        raise ConfigError(
            f"the features contain {module}, which mixes records; give it running statistics, or "
            "use GroupNorm"
        )
    for name, child in module.named_children():
        setattr(module, name, without_statistics(child))
    return module


def without_parameters(module: nn.Module) -> nn.Module:
    """Turn the parameters of a module into buffers that are not in its `state_dict`.

    The module is changed in place and returned.
    """
    for part in module.modules():
        for name, value in [*part.named_parameters(recurse=False)]:
            delattr(part, name)
            part.register_buffer(name, value.detach())
        for name, buffer in [*part.named_buffers(recurse=False)]:
            part.register_buffer(name, buffer, persistent=False)
    return module


@torch.no_grad()
def width(body: nn.Module, input_shape: tuple[int, ...]) -> int:
    """Return the length of the feature vectors that a body computes for inputs of this shape.

    Raises:
        ConfigError: if the body cannot use such inputs.
    """
    try:
        shape = tuple(body(torch.zeros(2, *input_shape)).shape)
    except (RuntimeError, ValueError) as error:
        reason = str(error).partition("\n")[0]
        raise ConfigError.of(
            "input_shape", input_shape, f"a shape that the features can use ({reason})"
        ) from error
    if len(shape) != 2 or shape[0] != 2 or not shape[1]:
        raise ConfigError(
            f"the features of two inputs have shape {shape}; allowed: one row per record, (2, "
            "feature_size)"
        )
    return int(shape[1])


def frozen(
    features: nn.Module | Transform,
    *,
    input_shape: Sequence[int],
    num_classes: int,
    seed: int = 0,
    head: Head = "linear",
) -> Classifier:
    """Make a classifier of features that are never trained; only its head has parameters.

        frozen(RandomConvolutions(seed=0), input_shape=(1, 28, 28), num_classes=10)
        frozen(Scattering(), input_shape=(1, 28, 28), num_classes=10)
        # a backbone of timm or torchvision, without its head
        frozen(backbone, input_shape=(3, 224, 224), num_classes=10)

    Guarantee: the features do not depend on the records of the stream, and no step, round or
    checkpoint changes them. The earlier training of a backbone, on other records, is not counted in
    any ledger.

    Args:
        features: module or function from (n, ...) to (n, ...), row by row; its output is flattened.
            A module is copied and put into evaluation mode.
        input_shape: shape of one input.
        num_classes: full width of the head.
        seed: seed of the head's initial parameters.
        head: `linear` or `cosine`.

    Raises:
        ConfigError: if the features cannot use this input, or mix records.
    """
    if num_classes < 1:
        raise ConfigError.of("num_classes", num_classes, "whole numbers from 1")
    body = Frozen(features)
    feature_size = width(body, tuple(input_shape))
    with seeded(seed):
        return Classifier(body, feature_size, num_classes, head)
