"""Take over settings, history and wrapped models from Opacus, and hand a history back.

>>> engine = PrivacyEngine()
>>> model, optimizer, loader = engine.make_private(...)             # trained for a while, then:
>>> privacy = from_opacus(engine, optimizer)                        # goes on from what was spent
>>> learner = Learner(model=unwrapped(model), ..., privacy=privacy)

Opacus is imported where it is used.
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
    "Releases of perdure's curator are accounted from now on. Earlier spending by Opacus "
    "counts where "
    "from_opacus(engine, optimizer) takes it over, as Opacus recorded it: Poisson "
    "sampling at its rate."
)
"""Statement on the scope of perdure's epsilon for a model that Opacus trained before."""

MECHANISMS = ("rdp", "prv", "gdp")
"""Opacus's accountants of Poisson-sampled Gaussian steps under add/remove; what is taken over is
their history.
"""


def from_opacus(engine: Any, optimizer: "Optimizer", *, delta: float = 1e-5) -> Privacy:
    """Go on where an Opacus `PrivacyEngine` stopped.

    The result has its noise, its clip norm, and its past charges.

    The charges of its history are written to the ledger for every partition, so the records
    that Opacus saw must be those of the stream. Set an `epsilon` with `dataclasses.replace` to
    calibrate, or to cap.

    Args:
        engine: the engine, or an Opacus accountant.
        optimizer: the DPOptimizer that `make_private` returned.
        delta: as in `Privacy`.

    Raises:
        PrivacyError: for a history or an optimiser that cannot be stated so.
    """
    noise_multiplier, clip_norm = settings(optimizer)
    return Privacy(
        noise_multiplier=noise_multiplier, clip_norm=clip_norm, delta=delta, spent=spent(engine)
    )


def spent(engine: Any) -> tuple[Charge, ...]:
    """Read the history of a `PrivacyEngine` (or accountant) of Opacus as charges of one record.

    Guarantee: none of its own. Opacus records Poisson sampling also where `poisson_sampling=False`
    switched it off; `sampling_rate` of the loader tells.

    Raises:
        PrivacyError: for an accountant of anything but Poisson-sampled Gaussian steps under
            add/remove.
    """
    accountant = getattr(engine, "accountant", engine)
    mechanism = accountant.mechanism() if callable(getattr(accountant, "mechanism", None)) else None
    if mechanism not in MECHANISMS:
        raise PrivacyError(
            f"{type(engine).__name__} accounts for "
            f"{mechanism or 'nothing that Opacus knows'}; give a PrivacyEngine or "
            f"accountant of Opacus whose mechanism is one of {', '.join(MECHANISMS)}"
        )
    try:
        return tuple(
            Charge(float(rate), float(noise), int(steps))
            for noise, rate, steps in accountant.history
        )
    except (ConfigError, TypeError, ValueError) as error:
        raise PrivacyError(
            f"the history of the Opacus accountant cannot be taken over: {error}; it must be "
            "(noise multiplier, "
            "sampling rate up to 1, steps)"
        ) from error


def settings(optimizer: Any) -> tuple[float, float]:
    """(noise multiplier, clip norm) of a DPOptimizer of Opacus, flat or ghost.

    As they are now, under a scheduler.

    Raises:
        PrivacyError: for one that two numbers do not describe: per-layer or adaptive clipping, or
            no DPOptimizer.
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
            "moves its clip norm and spends on the count of clipped records; use "
            "Privacy(clipping=Adaptive(...))"
        )
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
            f"{type(loader).__name__} does not do Poisson sampling, although Opacus accounts "
            "for it; use the loader "
            "that make_private(..., poisson_sampling=True) returns"
        )
    return float(loader.sample_rate)


def accountant(
    account: Account, partitions: Sequence[str], *, mechanism: Literal["rdp", "prv"] = "rdp"
) -> Any:
    """An accountant of Opacus with the history of a record that is in all of `partitions`.

    Guarantee: its epsilon bounds what those records were exposed to. It cannot say unit, trust or
    simulation; print `Account.statement` for that. RDP agrees with ours where the best order is one
    that both try (to 1e-3 at noise 1 and more); PRV is about 0.01 above our PLD, which is the error
    that it allows for.

    Args:
        account: a ledger or its reading side.
        partitions: of which the record is in all.
        mechanism: rdp (RDPAccountant) or prv (PRVAccountant, tighter).

    Raises:
        PrivacyError: for a history that Opacus cannot express: replace-one, raw data, noise that is
            not Gaussian.
        ConfigError: for a partition or mechanism that is not known.
    """
    from opacus.accountants import PRVAccountant, RDPAccountant

    kinds: dict[str, Callable[[], Any]] = {"rdp": RDPAccountant, "prv": PRVAccountant}
    if mechanism not in kinds:
        raise ConfigError.of("mechanism", mechanism, kinds)
    if account.relation != "add-remove":
        raise PrivacyError(
            f"the ledger is {account.relation}, and Opacus knows add-remove only; use "
            "Account.epsilon"
        )
    result = kinds[mechanism]()
    for charge in merged(account.exposure(partitions)):
        if charge.noise != "gaussian" or charge.noise_multiplier == 0:
            raise PrivacyError(f"Opacus cannot express {charge}; use Account.epsilon")
        result.history.append((charge.noise_multiplier, charge.sampling_rate, charge.steps))
    return result


def unwrapped(model: Any, *, known: bool = True) -> nn.Module:
    """The model inside Opacus's wrapper (hooks or ghost) and any data-parallel one.

    The parameters are the same.

    Hooks and what Opacus left on parameters and modules are removed, so the wrapper is of no
    further use.

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
    """Return the model inside a wrapper, or None."""
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
