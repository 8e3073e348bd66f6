"""The bridge to Opacus: its samplers of per-record gradients for layers without a rule, and the way over for its users.

>>> engine = PrivacyEngine()
>>> model, optimizer, loader = engine.make_private(...)             # trained for a while, then:
>>> privacy = Privacy.from_opacus(engine, optimizer)                # goes on from what was spent
>>> learner = Learner(model=unwrapped(model), ..., privacy=privacy)

Opacus is imported where it is used.
"""

import sys
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any, Literal

import torch
from torch import Tensor, nn

from perdure.data.records import Params
from perdure.errors import ConfigError, PrivacyError
from perdure.privacy.accounting.calibration import Charge, merged
from perdure.privacy.clipping.bookkeeping import RULES, LinearRule, RowsRule, Rule, Use, ruled_layers
from perdure.privacy.clipping.clip import PASS_NUMBERS, Clip, layer_of, sum_of
from perdure.privacy.ledger.entries import Account

STATEMENT = (
    "Accounted is what perdure's curator releases from now on. What Opacus spent before counts where "
    "Privacy.from_opacus(engine, optimizer) takes it over, as Opacus recorded it: Poisson sampling at its rate."
)
"""What an epsilon of perdure covers for a model that Opacus trained before."""

MECHANISMS = ("rdp", "prv", "gdp")
"""Opacus's accountants of Poisson-sampled Gaussian steps under add/remove; what is taken over is their history."""


# --------------------------------------------------------------------------- clipped sums with Opacus's samplers


@dataclass(frozen=True, kw_only=True, eq=False)
class Layer:
    """A layer whose per-record gradients are known.

    Args:
        module: the layer. names: its own parameter names to those in the model.
        rule: from the layer and its uses to norms and weighted sums. records: dimension of its output that counts them.
    """

    module: nn.Module
    names: Mapping[str, str]
    rule: Callable[[nn.Module, list[Use]], Rule]
    records: int = 0
    uses: list[Use] = field(default_factory=list)

    @property
    def group(self) -> str:
        """Name of the layer as clipping knows it."""
        return layer_of(next(iter(self.names.values())))

    def take_precision(self) -> None:
        """Bring what autocast left in half precision to that of the parameters, so that sums are not rounded."""
        dtype = next(self.module.parameters()).dtype
        for use in self.uses:
            use.back = use.back.to(dtype)
            use.entered = use.entered.to(dtype) if use.entered.is_floating_point() else use.entered


def grad_sample_sum(
    module: nn.Module, params: Params, losses: Callable[[], Tensor], records: int, clip: Clip
) -> Params | None:
    """Sum over records of clip(gradient of the record's loss, C), by rules where there are any and else by Opacus.

    For DPLSTM, DPGRU, DPRNN, grouped and three-dimensional convolutions, RMSNorm, InstanceNorm, SequenceBias and what
    was registered with `opacus.grad_sample.register_grad_sampler`. The layers are listened to here, not by Opacus's
    own hooks, which add up passes of part of the rows as if they were the same records.

    Guarantee: adding or removing one record changes the result by at most `clip.norm` in L2 norm, provided that row i
    of `losses()` depends on record i only and every differentiable pass of the module covers all rows in row order.
    Gradients and attributes of the parameters are left as they are.

    Args:
        module: the model, at its own parameters. params: those to differentiate.
        losses: runs the module and returns (n,) losses. records: n.
        clip: the bound C.

    Returns:
        None, for the caller to go on record by record, where a parameter belongs to no such layer, to two layers, or to
        a layer that is only partly trained; where a pass does not cover all rows; where rows would take too much memory
        or a norm is not finite; and where book-keeping has a rule for every layer, which is tried first.
    """
    if not records or ruled_layers(module, params) is not None:
        return None
    layers = sampled_layers(module, params)
    if layers is None or any(_too_large(layer, records) for layer in layers):
        return None
    with _listening(module, layers) as strange:
        total = losses().sum()
    uses = [use for layer in layers for use in layer.uses]
    complete = all(use.left.shape[layer.records] == records for layer in layers for use in layer.uses)
    if strange or not uses or not complete:
        return None
    backs = torch.autograd.grad(total, [use.left for use in uses], allow_unused=True, materialize_grads=True)
    for use, back in zip(uses, backs, strict=True):
        use.back = back
    for layer in layers:
        layer.take_precision()
    with torch.no_grad():
        return _clipped([layer for layer in layers if layer.uses], params, records, clip)


def _clipped(layers: Sequence[Layer], params: Params, records: int, clip: Clip) -> Params | None:
    rules = [(layer, layer.rule(layer.module, layer.uses)) for layer in layers]
    device = next(iter(params.values())).device
    squares = {layer_of(name): torch.zeros(records, device=device) for name in params}
    for layer, rule in rules:
        squares[layer.group] = squares[layer.group] + rule.squared_norms()
    if not bool(torch.isfinite(sum_of(list(squares.values()))).all()):
        return None
    factors = clip.factors(squares)
    sums = {
        layer.names[own]: value
        for layer, rule in rules
        for own, value in rule.weighted(factors[layer.group]).items()
    }  # fmt: skip
    return {name: sums.get(name, torch.zeros_like(value)) for name, value in params.items()} | clip.count(squares)


def sampled_layers(module: nn.Module, params: Params) -> list[Layer] | None:
    """Layers that own the parameters; None where one is not known, is shared or is only partly trained."""
    if "opacus" not in sys.modules and not _hopeful(module):
        return None
    from opacus.layers.dp_multihead_attention import DPMultiheadAttention
    from opacus.layers.dp_rnn import DPRNNBase

    known = {param: name for name, param in module.named_parameters()}
    layers: list[Layer] = []
    for part in module.modules():
        if isinstance(part, DPMultiheadAttention) and not part.batch_first:
            return None  # its linear layers see (length, n, features)
        if isinstance(part, DPRNNBase):
            continue  # it only lends its parameters other names
        names = {own: known[param] for own, param in part.named_parameters(recurse=False, remove_duplicate=False)}
        if not params.keys() & set(names.values()):
            continue
        layer = _layer(part, names)
        if layer is None:
            return None
        layers.append(layer)
    owned = [name for layer in layers for name in layer.names.values()]
    return layers if sorted(owned) == sorted(params) else None


def _hopeful(module: nn.Module) -> bool:
    """Whether it is worth importing Opacus: every parameter belongs to a layer that may be known."""
    convolutions, norms = nn.modules.conv._ConvNd, nn.modules.instancenorm._InstanceNorm
    owners = [part for part in module.modules() if any(True for _ in part.parameters(recurse=False))]
    return all(type(part) in RULES or isinstance(part, convolutions | norms | nn.RMSNorm) for part in owners)


def _layer(part: nn.Module, names: Mapping[str, str]) -> Layer | None:
    """How the gradients of one layer are found, if it is known how."""
    from opacus.grad_sample import GradSampleModule
    from opacus.layers.dp_multihead_attention import SequenceBias
    from opacus.layers.dp_rnn import RNNLinear

    alone = nn.Sequential(part)
    if ruled_layers(alone, dict(alone.named_parameters())) is not None:
        return Layer(module=part, names=names, rule=RULES[type(part)])
    if type(part) is RNNLinear:  # one use a time step
        return Layer(module=part, names=names, rule=LinearRule)
    if type(part) is SequenceBias:
        return Layer(module=part, names=names, rule=_last_of_sequence, records=0 if part.batch_first else 1)
    if type(part) not in GradSampleModule.GRAD_SAMPLERS or not _sampled_rightly(part):
        return None
    return Layer(module=part, names=names, rule=_by_sampler)


def _sampled_rightly(part: nn.Module) -> bool:
    """Whether Opacus's sampler heeds the settings of the layer; EmbeddingBag's adds a repeated word once."""
    if isinstance(part, nn.modules.conv._ConvNd):
        return part.padding_mode == "zeros"
    if isinstance(part, nn.modules.instancenorm._InstanceNorm):
        return part.running_mean is None and not part.track_running_stats
    return type(part) not in RULES and type(part) is not nn.EmbeddingBag


def _too_large(layer: Layer, records: int) -> bool:
    size = sum(param.numel() for param in layer.module.parameters())
    return layer.rule is _by_sampler and records * size > PASS_NUMBERS


class Rows(RowsRule):
    """Per-record gradients that are already there."""

    def __init__(self, rows: Params) -> None:
        self.rows = rows


def _by_sampler(layer: nn.Module, uses: list[Use]) -> Rule:
    """Rows by Opacus, summed over the layer's uses.

    Raises:
        PrivacyError: where a sampler that somebody registered gives no row per record.
    """
    from opacus.grad_sample import GradSampleModule

    sampler, own = GradSampleModule.GRAD_SAMPLERS[type(layer)], dict(layer.named_parameters())
    parts = [sampler(layer, [use.entered], use.back) for use in uses]
    for name, param in own.items():
        for use, part in zip(uses, parts, strict=True):
            shape = tuple(part[param].shape) if param in part else None
            if shape != (len(use.left), *param.shape):
                raise PrivacyError(
                    f"the grad sampler of {type(layer).__name__} gives shape {shape} for {name} and {len(use.left)} "
                    f"records; return (n, *{tuple(param.shape)}), one row per record"
                )
    return Rows({name: sum_of([part[param] for part in parts]) for name, param in own.items()})


def _last_of_sequence(layer: nn.Module, uses: list[Use]) -> Rule:
    """SequenceBias adds one element at the end: what comes back there."""
    return Rows({"bias": sum_of([use.back[:, -1] if layer.batch_first else use.back[-1] for use in uses])})


@contextmanager
def _listening(module: nn.Module, layers: Sequence[Layer]) -> Iterator[list[str]]:
    """Record every differentiable call of the layers; what is given names calls that are not understood."""
    from opacus.layers.dp_rnn import DPRNNBase

    strange: list[str] = []

    def listen(layer: Layer) -> Callable[..., None]:
        def hook(_: nn.Module, entered: tuple[Any, ...], left: Any) -> None:
            if len(entered) != 1 or not all(isinstance(x, Tensor) for x in (*entered, left)):
                strange.append(type(layer.module).__name__)
            elif left.requires_grad:
                layer.uses.append(Use(entered[0].detach(), left))

        return hook

    def packed(part: nn.Module, entered: tuple[Any, ...]) -> None:
        if not isinstance(entered[0], Tensor):  # a packed sequence sorts the records by length
            strange.append(type(part).__name__)

    handles = [layer.module.register_forward_hook(listen(layer)) for layer in layers]
    handles += [p.register_forward_pre_hook(packed) for p in module.modules() if isinstance(p, DPRNNBase)]
    try:
        yield strange
    finally:
        for handle in handles:
            handle.remove()


# --------------------------------------------------------------------------- for users of Opacus


def spent(engine: Any) -> tuple[Charge, ...]:
    """What a `PrivacyEngine` (or accountant) of Opacus recorded, as charges of one record.

    Guarantee: none of its own. Opacus records Poisson sampling also where `poisson_sampling=False` switched it off;
    `sampling_rate` of the loader tells.

    Raises:
        PrivacyError: for an accountant of anything but Poisson-sampled Gaussian steps under add/remove.
    """
    accountant = getattr(engine, "accountant", engine)
    mechanism = accountant.mechanism() if callable(getattr(accountant, "mechanism", None)) else None
    if mechanism not in MECHANISMS:
        raise PrivacyError(
            f"{type(engine).__name__} accounts for {mechanism or 'nothing that Opacus knows'}; give a PrivacyEngine or "
            f"accountant of Opacus whose mechanism is one of {', '.join(MECHANISMS)}"
        )
    try:
        return tuple(Charge(float(rate), float(noise), int(steps)) for noise, rate, steps in accountant.history)
    except (ConfigError, TypeError, ValueError) as error:
        raise PrivacyError(
            f"the history of the Opacus accountant cannot be taken over: {error}; it must be (noise multiplier, "
            "sampling rate up to 1, steps)"
        ) from error


def settings(optimizer: Any) -> tuple[float, float]:
    """(noise multiplier, clip norm) of a DPOptimizer of Opacus, flat or ghost; as they are now, under a scheduler.

    Raises:
        PrivacyError: for one that two numbers do not describe: per-layer or adaptive clipping, or no DPOptimizer.
    """
    from opacus import optimizers as of_opacus

    kind = type(optimizer)
    flat = (
        of_opacus.DPOptimizer, of_opacus.DistributedDPOptimizer, of_opacus.DPOptimizerFastGradientClipping,
        of_opacus.DistributedDPOptimizerFastGradientClipping, of_opacus.FSDPOptimizerFastGradientClipping,
    )  # fmt: skip
    if issubclass(kind, of_opacus.AdaClipDPOptimizer) or hasattr(optimizer, "_adjusted_noise_multiplier"):
        reason = "moves its clip norm and spends on the count of clipped records; use Privacy(clipping=Adaptive(...))"
    elif isinstance(getattr(optimizer, "max_grad_norms", None), list):
        reason = "has a clip norm for every parameter; use Privacy(clipping='per-layer')"
    elif kind not in flat:
        reason = "is not known; give the DPOptimizer that PrivacyEngine.make_private returned"
    else:
        return float(optimizer.noise_multiplier), float(optimizer.max_grad_norm)
    raise PrivacyError(f"optimizer {kind.__name__} {reason}")


def sampling_rate(loader: Any) -> float:
    """Rate at which a data loader of Opacus really samples, by Poisson sampling.

    Raises:
        PrivacyError: for another loader, which Opacus accounts for as if it sampled so.
    """
    from opacus.data_loader import DPDataLoader

    if not isinstance(loader, DPDataLoader):
        raise PrivacyError(
            f"{type(loader).__name__} does not do Poisson sampling, although Opacus accounts for it; use the loader "
            "that make_private(..., poisson_sampling=True) returns"
        )
    return float(loader.sample_rate)


def accountant(account: Account, partitions: Sequence[str], *, mechanism: Literal["rdp", "prv"] = "rdp") -> Any:
    """An accountant of Opacus with the history of a record that is in all of `partitions`.

    Guarantee: its epsilon bounds what those records were exposed to. It cannot say unit, trust or simulation; print
    `Account.statement` for that. RDP agrees with ours where the best order is one that both try (to 1e-3 at noise 1 and
    more); PRV is about 0.01 above our PLD, which is the error that it allows for.

    Args:
        account: a ledger or its reading side. mechanism: rdp (RDPAccountant) or prv (PRVAccountant, tighter).

    Raises:
        PrivacyError: for a history that Opacus cannot express: replace-one, raw data, noise that is not Gaussian.
        ConfigError: for a partition or mechanism that is not known.
    """
    from opacus.accountants import PRVAccountant, RDPAccountant

    kinds: dict[str, Callable[[], Any]] = {"rdp": RDPAccountant, "prv": PRVAccountant}
    if mechanism not in kinds:
        raise ConfigError.of("mechanism", mechanism, kinds)
    if account.relation != "add-remove":
        raise PrivacyError(f"the ledger is {account.relation}, and Opacus knows add-remove only; use Account.epsilon")
    result = kinds[mechanism]()
    for charge in merged(account.exposure(partitions)):
        if charge.noise != "gaussian" or charge.noise_multiplier == 0:
            raise PrivacyError(f"Opacus cannot express {charge}; use Account.epsilon")
        result.history.append((charge.noise_multiplier, charge.sampling_rate, charge.steps))
    return result


def unwrapped(model: Any, *, known: bool = True) -> nn.Module:
    """The model inside Opacus's wrapper (hooks or ghost) and any data-parallel one, with the same parameters.

    Hooks and what Opacus left on parameters and modules are removed, so the wrapper is of no further use.

    Args:
        known: whether what Opacus spent on the model is accounted; else `STATEMENT` is a warning.
    """
    if not known:
        warnings.warn(STATEMENT, stacklevel=4)
    from opacus.grad_sample.gsm_base import OPACUS_PARAM_MONKEYPATCH_ATTRS, AbstractGradSampleHooks

    while (inner := _inside(model)) is not None:
        if isinstance(model, AbstractGradSampleHooks):
            model.cleanup()
        model = inner
    for handle in vars(model).pop("autograd_grad_sample_hooks", ()):
        handle.remove()
    for part in model.modules():
        for name in ("activations", "max_batch_len", "ft_compute_sample_grad"):
            vars(part).pop(name, None)
    for param in model.parameters():
        for name in (*OPACUS_PARAM_MONKEYPATCH_ATTRS, "summed_grad"):
            vars(param).pop(name, None)
    return model  # type: ignore[no-any-return]


def _inside(model: Any) -> Any:
    """What a wrapper wraps, or None."""
    from opacus.distributed import DifferentiallyPrivateDistributedDataParallel
    from opacus.grad_sample.gsm_base import AbstractGradSampleHooks

    if isinstance(model, AbstractGradSampleHooks):
        return model._module
    parallel = nn.parallel.DistributedDataParallel | nn.DataParallel | DifferentiallyPrivateDistributedDataParallel
    return model.module if isinstance(model, parallel) else None
