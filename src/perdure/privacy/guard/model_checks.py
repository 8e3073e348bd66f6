"""Refuse parts of a model that break the bound on one record's influence, and repair some of them.

A refusal names the part, the reason and the fix.

The guard checks every module and buffer of a model, tests the loss and every layer on synthetic
records, and tries the optimiser. `fix` replaces the layers that have a safe counterpart.
"""

import copy
from collections import deque
from collections.abc import Iterator

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from perdure.errors import GuardError
from perdure.privacy.guard.repair import groups, repaired, replacements
from perdure.privacy.guard.writes import same_values
from perdure.utils.optimizer_trial import stepped_copy
from perdure.utils.seeding import seed_globally, undisturbed

FIX = "or call perdure.privacy.fix(model)"

_BATCH_STATISTICS = (nn.modules.batchnorm._BatchNorm,)
_INSTANCE_STATISTICS = (nn.modules.instancenorm._InstanceNorm,)
_RECURRENT = (nn.RNNBase, nn.RNNCellBase)


# --------------------------------------------------------------------------- modules


def check_model(model: nn.Module) -> None:
    """Refuse a model with a module or parameter that breaks the bound on one record's influence.

    Buffers are checked by `check_buffers`, which needs inputs.

    Raises:
        GuardError: names the first such part:

            - BatchNorm in any form (also frozen, affine-free or in evaluation mode: its running
              statistics change without noise), and InstanceNorm with running statistics;
            - recurrent layers of torch (no per-record gradients);
            - attention with dropout inside (its random mask is not drawn from the secret seed, as
              the mask of torch.nn.Dropout is);
            - spectral normalisation (its buffers move in every forward pass) and weights computed
              by a hook (no gradients of the parameters behind them);
            - subclasses of Dropout (the guard's tests run with dropout off and would not see them);
            - lazy modules (private records would set their shapes);
            - compiled modules (other code is made for other numbers of records);
            - embeddings with `max_norm` (they write into their weight in every forward pass, also
              frozen), `scale_grad_by_freq` (it counts words in the batch) or `sparse`;
            - parameters in half precision (sums are rounded by more than the clip norm).
    """
    for name, module in model.named_modules():
        for refusal in _REFUSALS:
            if reason := refusal(module):
                raise GuardError(f"{name or 'model'} is {type(module).__name__}{reason}")
    for name, value in model.named_parameters():
        if value.dtype.is_floating_point and value.dtype.itemsize < 4:
            raise GuardError(
                f"parameter {name} is {value.dtype}: a sum in half precision is rounded, and with "
                "this rounding one record can change it by more than the clip norm; call "
                "model.float()"
            )


def _lazy(module: nn.Module) -> str | None:
    if isinstance(module, nn.modules.lazy.LazyModuleMixin) and module.has_uninitialized_params():
        return (
            ": the first private batch would decide the shapes of its parameters; run synthetic "
            "inputs "
            "through the model first"
        )
    return None


def _compiled(module: nn.Module) -> str | None:
    called = getattr(module, "_compiled_call_impl", None)
    if called is not None or type(module).__module__.startswith("torch._dynamo"):
        return (
            ", compiled by torch.compile: other code is made for another number of rows, while "
            "private records run, so the guard cannot test it; give the model without compile()"
        )
    return None


def _statistics(module: nn.Module) -> str | None:
    if isinstance(module, _INSTANCE_STATISTICS):
        # torch updates these buffers if they exist, for any value of track_running_stats
        if not module.track_running_stats and module.running_mean is None:
            return None
        return (
            " with running statistics, which record private inputs without noise; build it with "
            f"track_running_stats=False, {FIX}"
        )
    if isinstance(module, _BATCH_STATISTICS):
        return (
            ": it mixes the records of a batch, so the influence of one record has no bound; "
            "replace it by "
            f"torch.nn.GroupNorm({groups(module)}, {module.num_features}), {FIX}"
        )
    return None


def _recurrent(module: nn.Module) -> str | None:
    if not isinstance(module, _RECURRENT):
        return None
    ways = ", which has no proj_size" if getattr(module, "proj_size", 0) else f", {FIX}"
    return (
        ": torch computes it in fused steps that have no gradients per record; replace it by "
        f"opacus.layers.dp_rnn.DP{type(module).__name__}"
        f"{ways if isinstance(module, nn.RNNBase) else ''}"
    )


def _attention(module: nn.Module) -> str | None:
    if not isinstance(module, nn.MultiheadAttention) or not module.dropout:
        return None
    plain = module.bias_k is None and not module.add_zero_attn
    return (
        " with dropout inside, whose random mask is not drawn from the secret seed, as the mask "
        "of torch.nn.Dropout is; build it with "
        f"dropout=0.0{', ' + FIX if plain else ''}"
    )


def _computed_weight(module: nn.Module) -> str | None:
    if isinstance(module, torch.nn.utils.parametrizations._SpectralNorm):
        return (
            ": its buffers change in every forward pass, and the number of passes per step "
            "depends on the size of the private batch; remove it by "
            "torch.nn.utils.parametrize.remove_parametrizations(layer, 'weight')"
        )
    if not isinstance(vars(module).get("weight"), Tensor):
        return None
    return (
        " with a weight that a hook computes (torch.nn.utils.weight_norm, spectral_norm or "
        "prune), so gradients per "
        "record would miss its parameters; use torch.nn.utils.parametrizations.weight_norm, "
        "or make the weight a "
        "parameter again by remove_weight_norm, remove_spectral_norm or prune.remove"
    )


def _embedding(module: nn.Module) -> str | None:
    if not isinstance(module, nn.Embedding | nn.EmbeddingBag):
        return None
    if module.max_norm is not None:
        return (
            " with max_norm, which writes into the used rows of its weight in every forward pass, "
            "also if frozen, and so reveals the tokens of single records; build it with "
            "max_norm=None"
        )
    if module.scale_grad_by_freq:
        return (
            " with scale_grad_by_freq, which divides by the number of times that a token is in "
            "the batch, so one record scales the gradients of others; build it with "
            "scale_grad_by_freq=False"
        )
    if module.sparse:
        return (
            " with sparse=True, whose gradient has entries for the tokens of the batch only, but "
            "noise must be on all entries; build it with sparse=False"
        )
    return None


def _dropout_subclass(module: nn.Module) -> str | None:
    own = type(module).__module__ == nn.modules.dropout.__name__
    if own or not isinstance(module, nn.modules.dropout._DropoutNd):
        return None
    return (
        ", a subclass of torch's Dropout: the guard tests models without dropout, so it would not "
        "test this layer; use torch.nn.Dropout"
    )


_REFUSALS = (
    _lazy,
    _compiled,
    _statistics,
    _recurrent,
    _attention,
    _computed_weight,
    _embedding,
    _dropout_subclass,
)
"""Checks of one module: each returns the text after the class name of a refusal, or None."""


# ---------------------------------------------------------------- what a forward pass leaves behind


def check_buffers(model: nn.Module, inputs: Tensor, *others: Tensor) -> None:
    """Run synthetic inputs through copies of the model, and refuse one that stores its inputs.

    The copies are in training mode. The model itself does not run.

    Args:
        model: model to check; it is not changed.
        inputs: (n, ...) synthetic inputs.
        others: other inputs, in batches of the same shape. Default: copies of one row of `inputs`.

    Raises:
        GuardError: names a buffer that changes, or an attribute (a tensor or number, also inside a
            list or dict) whose content depends on the inputs.
    """
    before = dict(model.named_buffers())
    # Both copies run equally often, so a counter of passes is equal in both.
    one, other = (copy.deepcopy(model).train() for _ in range(2))
    for changed in others or (inputs[len(inputs) // 2].expand_as(inputs).contiguous(),):
        _run(one, inputs)
        _run(other, changed)
        for trial in (one, other):
            _refuse_moved(before, trial)
        _refuse_kept(_kept(one), _kept(other))


def _refuse_moved(before: dict[str, Tensor], trial: nn.Module) -> None:
    """Refuse a buffer of the copied model that a forward pass changed."""
    for name, value in trial.named_buffers():
        if name not in before or not same_values(before[name], value):
            raise GuardError(
                f"buffer {name} of the model changes in a forward pass: it records private "
                "inputs without noise; "
                "remove it, or compute it from public data and freeze it"
            )


def _refuse_kept(one: dict[str, object], other: dict[str, object]) -> None:
    """Refuse an attribute that differs between forward passes over different records."""
    for name in one.keys() | other.keys():
        if name not in one or name not in other or not _equal(one[name], other[name]):
            raise GuardError(
                f"attribute {name} of the model depends on the records of the last forward "
                "pass: it keeps private "
                "inputs without noise; return it instead of keeping it"
            )


def _run(trial: nn.Module, inputs: Tensor) -> None:
    with torch.no_grad(), undisturbed():
        seed_globally(0)
        trial(inputs)


def _kept(model: nn.Module) -> dict[str, object]:
    """Tensors and numbers that modules hold as attributes of their own, by dotted name."""
    usual = vars(nn.Module()).keys()
    return {
        f"{name}.{path}" if name else path: leaf
        for name, module in model.named_modules()
        for attribute, value in vars(module).items()
        if attribute not in usual
        for path, leaf in _leaves(attribute, value)
    }


def _leaves(path: str, value: object) -> Iterator[tuple[str, object]]:
    """Tensors and numbers in a value, also inside lists and dicts, each with its dotted path."""
    if isinstance(value, Tensor | int | float):
        yield path, value
    elif isinstance(value, dict):
        for key, inner in value.items():
            yield from _leaves(f"{path}[{key!r}]", inner)
    elif isinstance(value, list | tuple | deque):
        for index, inner in enumerate(value):
            yield from _leaves(f"{path}[{index}]", inner)


def _equal(one: object, other: object) -> bool:
    if isinstance(one, Tensor) and isinstance(other, Tensor):
        return same_values(one, other)
    return repr(one) == repr(other)  # NaN equals NaN here


# --------------------------------------------------------------------------- optimiser


def check_optimizer(optimizer: Optimizer) -> None:
    """Refuse an optimiser that cannot make its step from one released gradient.

    The optimiser is not changed.

    Raises:
        GuardError: if the optimiser belongs to Opacus (it adds its own noise), needs a closure or
            several gradients per step (LBFGS, sharpness-aware minimisation), or needs sparse
            gradients (SparseAdam).
    """
    kind = type(optimizer).__name__
    if any(base.__module__.startswith("opacus.") for base in type(optimizer).__mro__):
        raise GuardError(
            f"optimizer is {kind} of Opacus, which would add noise a second time, outside the "
            "ledger; give optimizer.original_optimizer, and its settings as Privacy(...)"
        )
    reason = "" if isinstance(optimizer, torch.optim.LBFGS) else _failure(optimizer)
    if reason is not None:
        raise GuardError(
            f"optimizer is {kind}, which does not step from one gradient{reason}: every further "
            "gradient in a step is another release of the private records; use torch.optim.SGD, "
            "Adam or another optimiser that needs one gradient per step"
        )


def _failure(optimizer: Optimizer) -> str | None:
    """Reason why a copy of the optimiser cannot step with one gradient; None if it can."""
    if hasattr(optimizer, "first_step"):
        return " (it has a first_step)"
    try:
        stepped_copy(optimizer)
    except Exception as error:  # any error of a user's optimiser
        return f" ({str(error).splitlines()[0] if str(error) else type(error).__name__})"
    return None


# --------------------------------------------------------------------------- repairs


def fix(model: nn.Module) -> nn.Module:
    """Return a copy of the model that may be trained privately; the given model is not changed.

    BatchNorm becomes GroupNorm with the same scale and shift, InstanceNorm loses its running
    statistics, torch.nn.LSTM, GRU and RNN become layers of Opacus, and attention becomes
    `perdure.privacy.guard.repair.RepairedAttention`, which is built from linear layers and faster.
    Recurrent layers and attention keep their weights and compute the same as before, except that
    Opacus applies dropout also inside the recurrence. GroupNorm does not compute the same as
    BatchNorm.

    Guarantee: `check_model` accepts the result.

    Raises:
        GuardError: as `check_model`, if a part of the model has no safe replacement.

    >>> model = nn.Sequential(nn.Conv2d(1, 8, 3), nn.BatchNorm2d(8))
    >>> fixes(model)
    ('1: BatchNorm2d -> GroupNorm(8, 8, eps=1e-05, affine=True, bias=True)',)
    >>> model = fix(model)
    """
    result = repaired(model)
    check_model(result)
    return result


def fixes(model: nn.Module) -> tuple[str, ...]:
    """List the replacements that `fix` would make, one line each: name, old layer, new layer."""
    return tuple(
        f"{name or 'model'}: {type(old).__name__} -> {repr(new).splitlines()[0].rstrip('(')}"
        for name, (old, new) in replacements(model).items()
    )
