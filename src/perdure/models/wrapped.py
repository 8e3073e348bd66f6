"""Wrapper for models of other libraries and for a user's own models.

Learners, sessions, federations, attacks and explainers call a model with one tensor and expect one
tensor. `wrap` adapts a model that returns a tuple, a dict or a `ModelOutput` of Hugging Face, that
takes its input by keyword, or that needs a mask for padding. It can also give the model features.
"""

from collections.abc import Mapping
from functools import partial
from typing import Any

from torch import Tensor, nn

from perdure.errors import ConfigError

MASK = "attention_mask"
"""Keyword of the mask that models of Hugging Face take: 1 for a token, 0 for padding."""


Caught = list[tuple[Tensor, Tensor]]
"""Tensors recorded at a layer: each as a copy of its first value, and as the tensor itself."""


class Wrapped(nn.Module):
    """Model with one tensor as input and one as output, made from any module by `wrap`.

    Its parameters are the parameters of the module, with names that begin with `model.`.

    Args:
        model: any module.
        output: key, name or position of the output in the returned value; None for the returned
            value itself.
        input_name: keyword argument for the inputs; "" for the first argument.
        padding: token id that fills sequences; None for no mask.
    """

    def __init__(
        self,
        model: nn.Module,
        *,
        output: str | int | None,
        input_name: str,
        padding: int | None,
    ) -> None:
        super().__init__()
        self.model = model
        self.output = output
        self.input_name = input_name
        self.padding = padding

    def forward(self, x: Tensor) -> Tensor:
        """Compute outputs (n, ...) of inputs (n, ...)."""
        named: dict[str, Tensor] = {}
        if self.padding is not None:
            named[MASK] = (x != self.padding).long()
        if self.input_name:
            return self._chosen(self.model(**{self.input_name: x}, **named))
        return self._chosen(self.model(x, **named))

    def _chosen(self, answer: Any) -> Tensor:
        """Return the chosen output from the value that the model returned."""
        chosen = answer
        if self.output is not None:
            by_place = isinstance(self.output, int) or isinstance(answer, Mapping)
            try:
                chosen = answer[self.output] if by_place else getattr(answer, str(self.output))
            except (LookupError, AttributeError, TypeError):
                chosen = None
        if not isinstance(chosen, Tensor):
            kind = type(answer).__name__
            allowed = ", ".join(map(repr, outputs_in(answer))) or "a tensor, which there is none of"
            raise ConfigError.of("output", self.output, f"of this {kind}: {allowed}")
        return chosen

    def extra_repr(self) -> str:
        """Show the settings, for messages and for the digest of a run."""
        return f"output={self.output!r}, input_name={self.input_name!r}, padding={self.padding}"


class WrappedWithFeatures(Wrapped):
    """Wrapped model whose features are the input or output of one of its layers.

    Args:
        model: any module.
        output: key, name or position of the output in the returned value; None for the value
            itself.
        input_name: keyword argument for the inputs; "" for the first argument.
        padding: token id that fills sequences; None for no mask.
        layer: name of the layer.
        entering: True for the input of that layer, False for its output.
        feature_size: length of one feature vector.
    """

    def __init__(
        self,
        model: nn.Module,
        *,
        output: str | int | None,
        input_name: str,
        padding: int | None,
        layer: str,
        entering: bool,
        feature_size: int,
    ) -> None:
        super().__init__(model, output=output, input_name=input_name, padding=padding)
        self.layer = layer
        self.entering = entering
        self.feature_size = feature_size

    def features(self, x: Tensor) -> Tensor:
        """Feature vectors (n, feature_size) of inputs (n, ...), or (n, L, feature_size)."""
        return self.with_features(x)[1]

    def with_features(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """Compute outputs (n, ...) and features (n, feature_size) in one pass.

        Args:
            x: inputs (n, ...).

        Raises:
            ConfigError: if the layer does not give one row per record.
        """
        caught: Caught = []
        layer = self.model.get_submodule(self.layer)
        # Only for this pass, because a hook that stayed would be copied with the model.
        if self.entering:
            handle = layer.register_forward_pre_hook(partial(_catch_input, caught))
        else:
            handle = layer.register_forward_hook(partial(_catch_output, caught))
        try:
            outputs = self(x)
        finally:
            handle.remove()
        return outputs, self._rows(caught, outputs)

    def _rows(self, caught: Caught, outputs: Tensor) -> Tensor:
        """Return the tensor recorded at the layer, without axes of length 1 after the features."""
        given = f"{'head' if self.entering else 'features'} = {self.layer!r}"
        if len(caught) != 1:
            raise ConfigError(
                f"{given} passes {len(caught)} tensors in a pass; allowed: a layer that runs once "
                "and passes one tensor"
            )
        features, source = caught[0]
        if source is outputs:
            raise ConfigError(
                f"{given} gives the model's outputs; allowed: an earlier layer; write "
                f"head={self.layer!r} to use the input of this layer"
            )
        if features.dim() > 2 and features[0, 0].numel() == 1:
            features = features.flatten(1)
        shape = tuple(features.shape)
        if len(shape) < 2 or shape[0] != outputs.shape[0] or shape[-1] != self.feature_size:
            raise ConfigError(
                f"{given} gives features of shape {shape} for {len(outputs)} records; allowed: "
                f"({len(outputs)}, ..., {self.feature_size}); give another layer, or its "
                "feature_size"
            )
        return features

    def extra_repr(self) -> str:
        """Show the settings, for messages and for the digest of a run."""
        return (
            f"{super().extra_repr()}, layer={self.layer!r}, entering={self.entering}, "
            f"feature_size={self.feature_size}"
        )


def wrap(
    model: nn.Module,
    *,
    output: str | int | None = None,
    features: str | None = None,
    head: str | None = None,
    feature_size: int | None = None,
    input_name: str | None = None,
    padding: int | None = None,
) -> Wrapped:
    """Make a model from any module: one tensor as input, one as output, and features if wanted.

        wrap(transformers.GPT2LMHeadModel(config), output="logits")
        wrap(transformers.BertForSequenceClassification(config), output="logits",
             head="classifier", padding=0)
        wrap(torchvision.models.resnet18(num_classes=10), head="fc")
        wrap(my_module, output=0)                      # the first tensor of a tuple

    Strategies such as iCaRL, SLDA or RanPAC need features, the input of the head. They are taken in
    the same pass as the outputs.

    Guarantee: none is added. Under privacy the guard checks the model like any other model; row i
    of its outputs must depend on record i only.

    Args:
        model: any module; it is not copied.
        output: key of a dict or `ModelOutput`, name of an attribute, or position in a tuple; None
            if the model returns the tensor itself.
        features: name of the layer whose output is the features, (n, feature_size), or
            (n, L, feature_size) for one vector per token.
        head: name of the layer whose input is the features; give this or `features`.
        feature_size: length of a feature vector; None if it follows from the layer.
        input_name: keyword argument of the model for its inputs; None for its first argument.
        padding: token id that fills sequences; the model then gets `attention_mask=(inputs !=
            padding)`, 1 for a token and 0 for padding.

    Returns:
        A `Wrapped` model; where a layer is named, one with `features`.

    Raises:
        ConfigError: if the model has no such layer, or its feature size is not known.

    Example:
        >>> model = wrap(nn.Sequential(nn.Linear(4, 8), nn.ReLU(), nn.Linear(8, 3)), head="2")
        >>> model.features(torch.zeros(5, 4)).shape
        torch.Size([5, 8])
    """
    if not isinstance(model, nn.Module):
        raise ConfigError.of("model", model, "a torch.nn.Module")
    for name, value, kinds, allowed in (
        ("output", output, (str, int), 'a name such as "logits", a place such as 0, or None'),
        ("feature_size", feature_size, (int,), "a whole number, 1 or more, or None"),
        ("input_name", input_name, (str,), 'a keyword such as "input_ids", or None'),
        ("padding", padding, (int,), "the token id that fills sequences, a whole number, or None"),
    ):
        if isinstance(value, bool) or not (value is None or isinstance(value, kinds)):
            raise ConfigError.of(name, value, allowed)
    if features is not None and head is not None:
        given = f"features = {features!r} and head = {head!r}"
        raise ConfigError(f"{given} both name a layer; allowed: one of them, or neither")
    layer = head if features is None else features
    if layer is None:
        return Wrapped(model, output=output, input_name=input_name or "", padding=padding)
    where = "features" if head is None else "head"
    found = _layer(model, layer, where)
    return WrappedWithFeatures(
        model,
        output=output,
        input_name=input_name or "",
        padding=padding,
        layer=layer,
        entering=head is not None,
        feature_size=feature_size or _size_at(found, layer, where),
    )


def outputs_in(answer: object) -> list[str | int]:
    """Possible values of `wrap`'s argument `output` that select a tensor from a model's result.

    Args:
        answer: value that a model returned, which is not a tensor.
    """
    if isinstance(answer, tuple | list):
        return [place for place, value in enumerate(answer) if isinstance(value, Tensor)]
    held = answer if isinstance(answer, Mapping) else getattr(answer, "__dict__", {})
    return [str(name) for name, value in held.items() if isinstance(value, Tensor)]


def _layer(model: nn.Module, name: str, where: str) -> nn.Module:
    """Return a layer of a model by its name.

    Raises:
        ConfigError: if there is no such layer; the message names the last layers.
    """
    found: dict[str, nn.Module] = dict(model.named_modules()) if isinstance(name, str) else {}
    if not name or name not in found:
        known = ", ".join([own for own in found if own][-8:])
        raise ConfigError.of(where, name, f"a name among model.named_modules(), as {known}")
    return found[name]


def _size_at(layer: nn.Module, name: str, where: str) -> int:
    """Return the feature size at a layer: length of a head's inputs, or of a layer's outputs.

    Raises:
        ConfigError: if the layer does not have this length as an attribute.
    """
    entering = where == "head"
    known = ("in_features", "in_channels") if entering else ("out_features", "out_channels")
    for attribute in (*known, "normalized_shape", "num_features", "num_channels", "embedding_dim"):
        value = getattr(layer, attribute, None)
        value = value[-1] if isinstance(value, tuple | list) and value else value
        if isinstance(value, int):
            return value
    raise ConfigError(
        f"{where} = {name!r} is a {type(layer).__name__}, which has no known length of a feature "
        "vector; give feature_size=LENGTH"
    )


def _catch_input(caught: Caught, layer: nn.Module, entered: tuple[object, ...]) -> None:
    """Forward pre-hook that records the input of a layer."""
    _keep(caught, *entered)


def _catch_output(caught: Caught, layer: nn.Module, entered: object, left: object) -> None:
    """Forward hook that records the output of a layer."""
    _keep(caught, *(left if isinstance(left, tuple | list) else [left]))


def _keep(caught: Caught, *values: object) -> None:
    # copies, because models write into results of layers, as torchvision's ResNets do
    caught += [(value.clone(), value) for value in values if isinstance(value, Tensor)]
