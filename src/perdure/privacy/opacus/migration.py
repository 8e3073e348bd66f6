"""Conversion of settings, privacy history and wrapped models from Opacus, and of history back.

>>> engine = PrivacyEngine()
>>> model, optimizer, loader = engine.make_private(...)             # trained for a while, then:
>>> privacy = from_opacus(engine, optimizer)                        # continues from its cost
>>> learner = Learner(model=unwrapped(model), ..., privacy=privacy)

Opacus is imported only when a function needs it.
"""

import warnings
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any, Literal

from torch import nn

from perdure.errors import ConfigError, PrivacyError
from perdure.privacy.accounting.charges import Charge, merged
from perdure.privacy.ledger.account import Account
from perdure.privacy.settings import Privacy

if TYPE_CHECKING:
    from torch.optim import Optimizer

STATEMENT = (
    "Releases of perdure's curator are accounted from now on. The privacy that Opacus spent "
    "before is counted only if from_opacus(engine, optimizer) reads its history, and as Opacus "
    "recorded it: Poisson sampling at its rate."
)
"""Statement on the scope of perdure's epsilon for a model that Opacus trained before."""

MECHANISMS = ("rdp", "prv", "gdp")
"""Opacus accountants of Poisson-sampled Gaussian steps under add-remove, whose history can be used.
"""


def from_opacus(engine: Any, optimizer: "Optimizer", *, delta: float = 1e-5) -> Privacy:
    """Return privacy settings that continue the training of an Opacus `PrivacyEngine`.

    The settings have the same noise and clip norm, and the charges of the Opacus history. These
    charges are written to the ledger for every partition, so the stream must hold the same records
    as the Opacus training. Set `epsilon` with `dataclasses.replace` to calibrate the noise, or to
    set a cap.

    Args:
        engine: Opacus engine, or Opacus accountant.
        optimizer: DPOptimizer that `make_private` returned.
        delta: slack of the guarantee, for `Privacy`.

    Raises:
        PrivacyError: if the history or the optimiser has no equivalent in perdure.
    """
    noise_multiplier, clip_norm = settings(optimizer)
    return Privacy(
        noise_multiplier=noise_multiplier, clip_norm=clip_norm, delta=delta, spent=spent(engine)
    )


def spent(engine: Any) -> tuple[Charge, ...]:
    """Read the history of a `PrivacyEngine` (or accountant) of Opacus as charges of one record.

    Guarantee: none. Opacus records Poisson sampling also if `poisson_sampling=False` switched it
    off; call `sampling_rate` with the data loader to check this.

    Raises:
        PrivacyError: if the accountant is not one of Poisson-sampled Gaussian steps under
            add-remove.
    """
    accountant = getattr(engine, "accountant", engine)
    mechanism = accountant.mechanism() if callable(getattr(accountant, "mechanism", None)) else None
    if mechanism not in MECHANISMS:
        raise PrivacyError(
            f"{type(engine).__name__} is not a supported accountant of Opacus (mechanism: "
            f"{mechanism or 'none'}); give a PrivacyEngine or an accountant of Opacus with the "
            f"mechanism {' or '.join(MECHANISMS)}"
        )
    try:
        return tuple(
            Charge(float(rate), float(noise), int(steps))
            for noise, rate, steps in accountant.history
        )
    except (ConfigError, TypeError, ValueError) as error:
        raise PrivacyError(
            f"the history of the Opacus accountant cannot be used: {error}; each row must be "
            "(noise multiplier, sampling rate up to 1, steps)"
        ) from error


def settings(optimizer: Any) -> tuple[float, float]:
    """Return (noise multiplier, clip norm) of a DPOptimizer of Opacus, with flat or ghost clipping.

    If a scheduler changes them, the present values are returned.

    Raises:
        PrivacyError: if two numbers do not describe the optimiser: per-layer or adaptive clipping,
            or no DPOptimizer.
    """
    from opacus import optimizers as of_opacus

    kind = type(optimizer)
    flat = (
        of_opacus.DPOptimizer,
        of_opacus.DistributedDPOptimizer,
        of_opacus.DPOptimizerFastGradientClipping,
        of_opacus.DistributedDPOptimizerFastGradientClipping,
        of_opacus.FSDPOptimizerFastGradientClipping,
    )
    if issubclass(kind, of_opacus.AdaClipDPOptimizer) or hasattr(
        optimizer, "_adjusted_noise_multiplier"
    ):
        reason = (
            "changes its clip norm, and the count of clipped records has a privacy cost of its "
            "own; use "
            "Privacy(clipping=Adaptive(...))"
        )
    elif isinstance(getattr(optimizer, "max_grad_norms", None), list):
        reason = "has one clip norm per parameter; use Privacy(clipping='per-layer')"
    elif kind not in flat:
        reason = "is not known; give the DPOptimizer that PrivacyEngine.make_private returned"
    else:
        return float(optimizer.noise_multiplier), float(optimizer.max_grad_norm)
    raise PrivacyError(f"optimizer {kind.__name__} {reason}")


def sampling_rate(loader: Any) -> float:
    """Poisson sampling rate of a data loader of Opacus.

    Raises:
        PrivacyError: if the loader does not do Poisson sampling, although Opacus accounts for it.
    """
    from opacus.data_loader import DPDataLoader

    if not isinstance(loader, DPDataLoader):
        raise PrivacyError(
            f"{type(loader).__name__} does not do Poisson sampling, although Opacus accounts for "
            "it; use the data loader "
            "that make_private(..., poisson_sampling=True) returns"
        )
    return float(loader.sample_rate)


def accountant(
    account: Account, partitions: Sequence[str], *, mechanism: Literal["rdp", "prv"] = "rdp"
) -> Any:
    """Opacus accountant with the history of a record that is in all `partitions`.

    Guarantee: its epsilon is an upper bound for such a record. It contains no unit, trust model or
    note of a simulation; print `Account.statement` for these. Its RDP epsilon agrees with the RDP
    epsilon of perdure to 1e-3, at noise 1 or more and if both try the best order. Its PRV epsilon
    is about 0.01 above the PLD epsilon of perdure, which is the error allowance of PRV.

    Args:
        account: a ledger, or another account.
        partitions: names of the partitions; the record is in all of them.
        mechanism: rdp (RDPAccountant) or prv (PRVAccountant, tighter).

    Raises:
        PrivacyError: if Opacus cannot express the history: replace-one, raw data, or noise that is
            not Gaussian.
        ConfigError: if a partition or the mechanism is not known.
    """
    from opacus.accountants import PRVAccountant, RDPAccountant

    kinds: dict[str, Callable[[], Any]] = {"rdp": RDPAccountant, "prv": PRVAccountant}
    if mechanism not in kinds:
        raise ConfigError.of("mechanism", mechanism, kinds)
    if account.relation != "add-remove":
        raise PrivacyError(
            f"the ledger has the relation {account.relation}, but Opacus has only add-remove; use "
            "Account.epsilon"
        )
    result = kinds[mechanism]()
    for charge in merged(account.exposure(partitions)):
        if charge.noise != "gaussian" or charge.noise_multiplier == 0:
            raise PrivacyError(f"Opacus cannot express {charge}; use Account.epsilon")
        result.history.append((charge.noise_multiplier, charge.sampling_rate, charge.steps))
    return result


def unwrapped(model: Any, *, known: bool = True) -> nn.Module:
    """Return the model inside a wrapper of Opacus (hooks or ghost clipping).

    A data-parallel wrapper is removed, too. The returned model has the same parameters. The hooks
    and attributes that Opacus added are removed, so do not use the wrapper afterwards.

    Args:
        known: True if a ledger counts the privacy that Opacus spent on the model; if False,
            `STATEMENT` is given as a warning.
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
    """Return the model inside a wrapper of Opacus or torch; None if it is not wrapped."""
    from opacus.distributed import DifferentiallyPrivateDistributedDataParallel
    from opacus.grad_sample.gsm_base import AbstractGradSampleHooks

    if isinstance(model, AbstractGradSampleHooks):
        return model._module
    parallel = (
        nn.parallel.DistributedDataParallel
        | nn.DataParallel
        | DifferentiallyPrivateDistributedDataParallel
    )
    return model.module if isinstance(model, parallel) else None
