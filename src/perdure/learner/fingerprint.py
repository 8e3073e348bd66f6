"""Fingerprint of a run: all settings that determine it, by name, to be compared at a resume.

The fingerprint maps the name of each setting to a JSON value, and is stored in every checkpoint.
Large values (parameters at the start, labels in order) are stored as digests. If private records
are part of a value, its digest is keyed by the curator's key.

It does not contain, so that they may change: callbacks, folders, the number of torch threads, the
device, and the code of functions; only the noise digest of a private run depends on code.
"""

import hashlib
import json
from collections.abc import Mapping
from dataclasses import fields, is_dataclass
from functools import partial
from itertools import islice

from torch import nn
from torch.optim import Optimizer

from perdure.data.experience import Experience, Stream
from perdure.errors import ConfigError, RunError
from perdure.learner.noise_digest import module_settings
from perdure.learner.optimizers import MakeOptimizer
from perdure.learner.party import Party
from perdure.learner.schedules import MakeSchedule, first_rates
from perdure.privacy.private_sum import PrivateSum
from perdure.types import Tensors
from perdure.utils.hashing import JSONValue, canonical, canonical_text, digest, is_plain
from perdure.utils.modules import trainable_parameters

Fingerprint = dict[str, JSONValue]

VERSION = 1
"""Version of the names in fingerprints; runs of another version are not resumed."""
LONGEST = 200
"""Longest value, in characters, that is stored unchanged; a longer one is stored as a digest."""
RATES_SHOWN = 256
"""Number of learning rates of a schedule that are compared, because it may be any function.

They are the rates of an experience with this many steps, for any length of the stream.
"""
NAMED = 8
"""Most differences that a message names."""
MISSING = "nothing"
OF_THE_PLAN = ("epochs", "iterations", "blocks", "batch_size")
OF_THE_SESSION = ("micro_batch_size", "seed", "precision", "client", "owner")
MAY_GROW = ("stream.experiences", "privacy.epsilon")
"""Settings that are lists and may become longer between two starts."""


def fingerprint_of(
    session: Party,
    *,
    optimizer: MakeOptimizer,
    scheduler: MakeSchedule | None,
    extra: Mapping[str, object],
) -> Fingerprint:
    """Return the fingerprint of a run that is about to start in a session.

    Args:
        session: session with its model before training.
        optimizer: function from parameters to the optimiser.
        scheduler: function from the optimiser and the number of steps to an experience's schedule.
        extra: settings of the caller of the session, such as a federation's.
    """
    training = session.training
    found: Fingerprint = {"version": VERSION}
    found |= flat("strategy", training.strategy)
    found |= flat("privacy", training.privacy)
    found |= flat("adversary", session.adversary)
    found |= flat("views", session.views)
    if session.task.loss is not None:
        found |= flat("loss", session.task.loss)
    for owner, names in ((training, OF_THE_PLAN), (session, OF_THE_SESSION)):
        found |= {name: described(getattr(owner, name)) for name in names}
    for name, value in session.options.items():
        found |= flat(name, value)
    found |= optimizer_settings(optimizer(trainable_parameters(session.model).values()))
    found |= schedule_settings(scheduler, optimizer)
    found |= model_settings(session.model, session.initial or session.model.state_dict())
    found |= stream_settings(session.stream, session.private_sum)
    for name, value in extra.items():
        found |= flat(name, value)
    return found


# --------------------------------------------------------------------------- settings


def optimizer_settings(optimizer: Optimizer) -> Fingerprint:
    """Name and options of an optimiser before its first step."""
    found: Fingerprint = {"optimizer": type(optimizer).__name__}
    groups = optimizer.param_groups
    for index, group in enumerate(groups):
        prefix = "optimizer" if len(groups) == 1 else f"optimizer.group {index}"
        own = {name: value for name, value in group.items() if name != "params"}
        found |= {f"{prefix}.{name}": described(value) for name, value in own.items()}
        found[f"{prefix}.parameters"] = len(group["params"])
    return found


def schedule_settings(
    scheduler: MakeSchedule | None,
    optimizer: MakeOptimizer,
) -> Fingerprint:
    """Settings of a schedule, and its first learning rates."""
    found = flat("scheduler", scheduler)
    if scheduler is not None:
        rates = first_rates(optimizer, scheduler, RATES_SHOWN)
        found["scheduler.learning rates"] = described(rates)
    return found


def model_settings(model: nn.Module, start: Tensors) -> Fingerprint:
    """Modules and shapes of a model, and the digest of its initial values."""
    shapes = {name: [str(value.dtype), *value.shape] for name, value in start.items()}
    modules = [module_settings(path, part) for path, part in model.named_modules()]
    return {
        "model.modules": described(modules),
        "model.shapes": described(shapes),
        "model.start": f"sha256 {digest(start).hex()}",
    }


def stream_settings(stream: Stream, private_sum: PrivateSum | None) -> Fingerprint:
    """Public facts of a stream, and one line of text about the records of each experience."""
    return {
        "stream.scenario": stream.scenario,
        "stream.task": stream.task.name,
        "stream.classes in all": stream.num_classes,
        "stream.input shape": list(stream.input_shape),
        "stream.experiences": [experience_line(each, private_sum) for each in stream],
    }


def experience_line(experience: Experience, private_sum: PrivateSum | None) -> str:
    """Partition, declared size and classes of an experience, and a digest of ids and labels.

    Guarantee: under privacy the digest is keyed, and reveals nothing without the curator's key.
    """
    records = experience.train
    shown = {"ids": records.ids, "labels": records.labels}
    if records.weights is not None:
        shown["weights"] = records.weights
    seen = digest(shown).hex() if private_sum is None else private_sum.fingerprint(shown)
    classes = ",".join(map(str, experience.classes))
    return (
        f"partition {records.partition}, declared size {records.declared_size}, "
        f"classes {classes}, stage {experience.stage}, ids and labels {seen[:32]}"
    )


# --------------------------------------------------------------------------- descriptions


def described(value: object) -> JSONValue:
    """Describe a value in JSON: a short value unchanged, a long one by its digest.

    A value without comparable content is described by its type.
    """
    try:
        plain = canonical(value)
        text = canonical_text(plain)
    except (ConfigError, RecursionError, ValueError):
        return f"a {type(value).__qualname__}"
    if len(text) <= LONGEST:
        loaded: JSONValue = json.loads(text)  # as it is read from the disk
        return loaded
    return f"sha256 {hashlib.sha256(text.encode()).hexdigest()}"


def flat(name: str, value: object) -> Fingerprint:
    """Settings of a value by dotted name: `strategy`, `strategy.strength`, and so on."""
    if is_dataclass(value) and not isinstance(value, type):
        found: Fingerprint = {name: type(value).__name__}
        for each in fields(value):
            found |= flat(f"{name}.{each.name}", getattr(value, each.name))
        return found
    if isinstance(value, tuple | list) and any(map(is_dataclass, value)):
        found = {name: len(value)}
        for index, item in enumerate(value):
            found |= flat(f"{name}.{index}", item)
        return found
    if isinstance(value, Mapping):
        # A user knows the type of an object, not how many attributes it has.
        found = {name: value.get("type", len(value))}
        for key, item in value.items():
            found |= {} if key == "type" else flat(f"{name}.{key}", item)
        return found
    if isinstance(value, partial):
        found = flat(name, value.func) | flat(f"{name}.arguments", list(value.args))
        for key, item in value.keywords.items():
            found |= flat(f"{name}.{key}", item)
        return found
    return {name: described(value)}


def plain_attributes(value: object) -> dict[str, object]:
    """Type of an object, and its attributes that consist of numbers and text only."""
    own = {name: item for name, item in vars(value).items() if is_plain(item)}
    return {"type": type(value).__name__, **own}


# --------------------------------------------------------------------------- comparison


def differences(
    given: Mapping[str, JSONValue], stored: Mapping[str, JSONValue]
) -> dict[str, tuple[JSONValue, JSONValue]]:
    """Return the settings that differ, each with the given and the stored value.

    A list that may grow does not differ if the stored list is the beginning of the given one.
    """
    found: dict[str, tuple[JSONValue, JSONValue]] = {}
    for name in sorted(given.keys() | stored.keys()):
        new = given.get(name, MISSING)
        old = stored.get(name, MISSING)
        if name in MAY_GROW and isinstance(new, list) and isinstance(old, list):
            found |= _grown(name, new, old)
        elif new != old and not (MISSING in (new, old) and _inside(name, found)):
            found[name] = (new, old)
    return found


def _inside(name: str, found: Mapping[str, object]) -> bool:
    """Return True if a setting is a field of one that is already named as different."""
    parts = name.split(".")
    return any(".".join(parts[:count]) in found for count in range(1, len(parts)))


def _grown(
    name: str, new: list[JSONValue], old: list[JSONValue]
) -> dict[str, tuple[JSONValue, JSONValue]]:
    """First place where a growing list differs from the stored one, or its length if shorter."""
    for index, (mine, theirs) in enumerate(zip(new, old, strict=False)):
        if mine != theirs:
            return {f"{name}[{index}]": (mine, theirs)}
    return {f"{name} (number)": (len(new), len(old))} if len(new) < len(old) else {}


def refuse_other_run(
    given: Mapping[str, JSONValue], stored: object, *, where: object, fix: str
) -> None:
    """Refuse to continue a run that has other settings.

    Args:
        given: fingerprint of the run that is asked for now.
        stored: fingerprint of the run in the folder.
        where: the folder, for the message.
        fix: end of the message, with the advice.

    Raises:
        RunError: names each difference, with the given and the stored value.
    """
    if not isinstance(stored, dict) or stored.get("version") != given.get("version"):
        raise RunError(
            f"{where} has a run of another version of perdure, whose settings are not recorded; "
            f"{fix}"
        )
    found = differences(given, stored)
    if not found:
        return
    told = [
        f"{name} (given {shown(new)}, stored {shown(old)})"
        for name, (new, old) in islice(found.items(), NAMED)
    ]
    more = f" and {len(found) - NAMED} more" if len(found) > NAMED else ""
    raise RunError(f"{where} has a run that differs in {', '.join(told)}{more}; {fix}")


def shown(value: JSONValue) -> str:
    """Format a value for a message."""
    return value if isinstance(value, str) else json.dumps(value)
