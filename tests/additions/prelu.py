"""PReLU: a slope's gradient is the input times the gradient, summed where the input is below 0."""

from torch import Tensor, nn

from perdure.privacy.clipping.rules.base import ClippingRule, LayerCall, PrecomputedRows, sum_of


class PReLURule(ClippingRule):
    """`nn.PReLU`, with one slope or one slope per channel."""

    layers = (nn.PReLU,)
    parameters = frozenset({"weight"})

    def gradients(self, layer: nn.Module, calls: list[LayerCall]) -> PrecomputedRows:
        """See `ClippingRule`."""
        assert isinstance(layer, nn.PReLU)
        return PrecomputedRows({"weight": sum_of([_slopes(layer, call) for call in calls])})


def _slopes(layer: nn.PReLU, call: LayerCall) -> Tensor:
    """Gradients (n, slopes) of one call."""
    entered, back = call.flowed()
    # One slope is the sum over all positions; several are sums over the positions of a channel.
    return (entered.clamp(max=0) * back).view(len(back), layer.num_parameters, -1).sum(2)
