"""Reference documentation of config files: every table and key, with type, default and meaning.

It is generated. Types and defaults are read from fields and parameters, and meanings from
docstrings. Allowed values are read from the error message for a wrong value.
"""

import inspect
import re
from collections.abc import Callable, Iterator, Sequence
from dataclasses import MISSING, dataclass, fields, is_dataclass, replace
from typing import Any

import torch
from torch.optim import lr_scheduler

from perdure import adversarial, explain, loggers, models, strategies
from perdure.adversarial import defences
from perdure.data import datasets
from perdure.data.groups import Groups, GroupWeights
from perdure.errors import ConfigError, PerdureError
from perdure.experiment.averaging_config import AVERAGES
from perdure.experiment.calls import REQUIRED, parameters
from perdure.experiment.certified import CertificateConfig
from perdure.experiment.config import ALLOWED_NAMES, COMBINE, Arm, Config
from perdure.experiment.data_config import OF_LOADERS, STREAMS, DataConfig, keys_of
from perdure.experiment.explain_config import ExplainConfig
from perdure.experiment.federation_table import FederationConfig
from perdure.experiment.field_checks import COUNTS
from perdure.experiment.from_tables import described, read_hints
from perdure.experiment.loss_config import LossConfig
from perdure.experiment.mixing_config import MIXINGS
from perdure.experiment.model_config import BUILDERS
from perdure.experiment.model_config import GIVEN as OF_MODELS
from perdure.experiment.overrides import toml_value
from perdure.experiment.search_config import SearchConfig
from perdure.experiment.start_config import StartConfig
from perdure.experiment.training_config import (
    OF_OPTIMIZERS,
    OF_SCHEDULES,
    OPTIMIZERS,
    SCHEDULES,
    STEPS,
    WHOLE,
    TrainingConfig,
)
from perdure.experiment.validation_config import ValidationConfig
from perdure.experiment.views_config import CHANGES, NAMES
from perdure.learner.step_changes import SAM
from perdure.models.config import ModelConfig
from perdure.privacy.accounting.charges import Charge
from perdure.privacy.adaptive_clipping import Adaptive
from perdure.privacy.settings import Privacy
from perdure.tasks import losses

WRONG: dict[type, tuple[Any, ...]] = {int: (-1, 0), float: (-1.0, 1e300), str: ("?",)}
"""Wrong values of each type, which are tried to read the allowed values from the error message."""
CONDITION = "with "
"""Beginning of the allowed values in the error message for a key that another key excludes.

It tells nothing about the values of the key itself.
"""
NEEDED = "required"
LEFT_OUT = "left out"
DERIVED = ("bounds_given", "teacher")


@dataclass(frozen=True, kw_only=True)
class Key:
    """One key of a config's table, as the reference documents it.

    Args:
        name: name of the key.
        type: kind of value, in words.
        default: default value, as TOML writes it; "required", or "left out" for a key without one.
        allowed: values that are allowed, in words; "" if all values of the type are.
        meaning: description of the key, from a docstring.
    """

    name: str
    type: str
    default: str
    allowed: str
    meaning: str


@dataclass(frozen=True, kw_only=True)
class Table:
    """One table of a config, as the reference documents it.

    Args:
        title: heading of the table in a config, such as `[data]`.
        keys: keys of the table, in the order of the class or function that takes them.
    """

    title: str
    keys: tuple[Key, ...]


def tables() -> list[Table]:
    """Return all tables of a config, in the order of the reference."""
    return [
        Table(title="outside of tables", keys=_plain_keys(_SMALLEST)),
        Table(title="[data]", keys=_data()),
        *_of_functions("[data] name = {!r}: options", datasets, OF_LOADERS),
        Table(title="[model]", keys=_plain_keys(ModelConfig())),
        *(
            Table(
                title=f'[model] name = "{name}"', keys=_parameters(getattr(models, name), OF_MODELS)
            )
            for name in BUILDERS
        ),
        Table(title="[training]", keys=_plain_keys(TrainingConfig(epochs=1))),
        *_of_torch("[training] optimizer = {!r}: optimizer_options", torch.optim, OPTIMIZERS),
        *_of_torch("[training.schedule] name = {!r}", lr_scheduler, SCHEDULES),
        Table(title="[training.views]", keys=_views()),
        *(
            Table(title=f'[training.mixing] name = "{name}"', keys=_plain_keys(kind()))
            for name, kind in MIXINGS.items()
        ),
        *(
            Table(title=f'[training.averaging] name = "{name}"', keys=_plain_keys(kind()))
            for name, kind in AVERAGES.items()
        ),
        Table(
            title="[training.defence]",
            keys=(_named("name", defences.names(), "name of the defence."),),
        ),
        *_of_extensions("[training.defence] name = {!r}", defences),
        Table(title="[training.sharpness]", keys=_plain_keys(SAM())),
        Table(title="[training.validation]", keys=_plain_keys(ValidationConfig())),
        Table(title="[training.group_weights]", keys=_plain_keys(GroupWeights(attribute="group"))),
        Table(title="[training.loss]", keys=(_named("name", losses.names(), "name of the loss."),)),
        *_of_extensions("[training.loss] and loss of [[arms]]: name = {!r}", losses),
        Table(title="[federation]", keys=_plain_keys(FederationConfig())),
        Table(title="[privacy]", keys=_plain_keys(Privacy(epsilon=1.0))),
        Table(title="[privacy.clipping]", keys=_plain_keys(Adaptive())),
        Table(title="[[privacy.spent]]", keys=_plain_keys(_CHARGE)),
        Table(title="[attack]", keys=(_named("name", adversarial.names(), "name of the attack."),)),
        *_of_extensions(
            "[attack], [training.adversary], [training.validation.attack] name = {!r}", adversarial
        ),
        Table(
            title="[certificate]",
            keys=_plain_keys(CertificateConfig(method="smoothing", epsilon=0.1)),
        ),
        Table(title="[explain]", keys=_explain()),
        *_of_extensions("[explain] method = {!r}", explain),
        Table(title="[fairness]", keys=_plain_keys(Groups(attribute="group"))),
        Table(title="[start]", keys=_plain_keys(StartConfig(run="runs/earlier"))),
        Table(title="[[loggers]]", keys=(_named("name", loggers.names(), "name of the logger."),)),
        *_of_extensions("[[loggers]] name = {!r}", loggers),
        Table(title="[search]", keys=_plain_keys(_SEARCH)),
        Table(title="[[arms]]", keys=_arm()),
        *_of_extensions("[[arms]] strategy = {!r}", strategies),
    ]


def reference_text(table: str | None = None) -> str:
    """Return the reference as plain text, for the terminal.

    Args:
        table: name of one table, such as "training"; None for all.

    Raises:
        ConfigError: for a table that no config has.
    """
    listed = [one for one in tables() if table is None or _belongs(one, table)]
    if not listed:
        known = dict.fromkeys(re.findall(r"\[+([\w.]+)", " ".join(one.title for one in tables())))
        raise ConfigError.of("--table", table, ", ".join(known))
    return "\n".join(_section(one) for one in listed)


def reference_markdown() -> str:
    """Return the reference as Markdown: a section with a table of keys for each config table."""
    return "\n".join(_markdown(one) for one in tables())


def _belongs(one: Table, name: str) -> bool:
    """Return True for the table `[name]`, and for the tables inside it."""
    return f"[{name}]" in one.title or f"[{name}." in one.title


def _section(one: Table) -> str:
    lines = [one.title]
    for key in one.keys:
        default = {NEEDED: NEEDED, LEFT_OUT: "may be left out"}.get(
            key.default, f"default {key.default}"
        )
        allowed = f"; allowed: {key.allowed}" if key.allowed else ""
        lines.append(f"  {key.name}: {key.type}; {default}{allowed}")
        lines += [f"      {key.meaning}"] if key.meaning else []
    return "\n".join([*lines, ""])


def _markdown(one: Table) -> str:
    rows = [
        f"| `{key.name}` | {key.type} | `{key.default}` | {key.allowed} | {key.meaning} |".replace(
            "`required`", "required"
        ).replace("`left out`", "left out")
        for key in one.keys
    ]
    head = "| key | type | default | allowed | meaning |\n|---|---|---|---|---|\n"
    return f"## {_escaped(one.title)}\n\n{head}" + "\n".join(rows) + "\n"


def _escaped(title: str) -> str:
    return f"`{title}`" if title.startswith("[") else title.capitalize()


# --------------------------------------------------------------------------- keys of dataclasses


def _plain_keys(example: Any) -> tuple[Key, ...]:
    """Return the keys that a dataclass adds to a table, in the order of its fields.

    Args:
        example: instance of the dataclass with allowed values.
    """
    kind = type(example)
    hints = read_hints(kind, kind.__name__)
    told = meanings(kind)
    return tuple(
        _key(
            each.name,
            hints[each.name],
            _default(each.default, each.default_factory),
            _refusal(example, each.name, hints[each.name]),
            told.get(each.name, ""),
        )
        for each in fields(kind)
        if each.init and each.name not in DERIVED
    )


def _key(name: str, hint: Any, default: str, allowed: str, meaning: str) -> Key:
    words = described(hint)
    if words.startswith("a table with"):
        words = "a table"
    return Key(
        name=name,
        type=words,
        default=default,
        allowed="" if allowed == words else allowed,
        meaning=meaning,
    )


def _default(value: Any, factory: Any = MISSING) -> str:
    if factory is not MISSING:
        value = factory()
    if value is MISSING or value is REQUIRED:
        return NEEDED
    if value is None:
        return LEFT_OUT
    if is_dataclass(value):
        return "as below"
    return toml_value(list(value) if isinstance(value, tuple) else value)


def _refusal(example: Any, name: str, hint: Any) -> str:
    """Return the allowed values of a field in words, from the error message for a wrong value."""
    for kind, values in WRONG.items():
        if described(kind) not in described(hint).split(" or "):
            continue
        for value in values:
            try:
                replace(example, **{name: value})
            except PerdureError as error:
                told = str(error).partition("allowed: ")[2].replace("|", "/")
                return "" if told.startswith(CONDITION) else told
            except Exception:  # the wrong value broke other code first, so no words are known
                return ""
    return ""


def meanings(kind: Callable[..., Any]) -> dict[str, str]:
    """Return the description of each field or parameter, from `Args:` in the docstrings."""
    found: dict[str, str] = {}
    for each in reversed(inspect.getmro(kind)) if isinstance(kind, type) else (kind,):
        found |= _arguments(inspect.cleandoc(each.__doc__ or ""))
    return found


def _arguments(text: str) -> dict[str, str]:
    part = re.search(r"^Args:\n((?:[ ]{4}.*\n?|\n)+)", text, flags=re.MULTILINE)
    if part is None:
        return {}
    entries = re.split(r"^    (?=\w+: )", part[1], flags=re.MULTILINE)
    pairs = (" ".join(entry.split()).partition(": ") for entry in entries if entry.strip())
    return {name: meaning.replace("|", "/") for name, _, meaning in pairs}


# --------------------------------------------------------------------------- keys of functions


def _parameters(function: Callable[..., Any], without: tuple[str, ...]) -> tuple[Key, ...]:
    told = meanings(function)
    return tuple(
        _key(name, each.hint, _default(each.default), "", told.get(name, ""))
        for name, each in parameters(function, without).items()
    )


def _of_functions(title: str, package: Any, without: tuple[str, ...]) -> Iterator[Table]:
    """Yield a table for each data set that has arguments of its own."""
    for name in package.names():
        keys = _parameters(package.find(name), without)
        if keys:
            yield Table(title=title.format(name).replace("'", '"'), keys=keys)


def _of_torch(title: str, module: Any, names: tuple[str, ...]) -> Iterator[Table]:
    """Yield a table for each optimiser or schedule of torch."""
    for name in names:
        keys = _parameters(getattr(module, name), (*OF_OPTIMIZERS, *OF_SCHEDULES))
        shares = tuple(
            replace(
                key,
                type="a whole number of steps, or a share of all",
                default="1.0" if key.name in WHOLE else key.default,
            )
            if key.name in STEPS
            else key
            for key in keys
        )
        yield Table(title=title.format(name).replace("'", '"'), keys=shares)


def _of_extensions(title: str, package: Any) -> Iterator[Table]:
    """Yield a table for each attack, explainer, logger or strategy of a package."""
    for name in package.names():
        kind = package.find(name)
        keys = _plain_keys(_example(kind))
        yield Table(title=title.format(name).replace("'", '"'), keys=keys)


def _example(kind: type[Any]) -> Any:
    """Return an instance of a strategy, attack or explainer with allowed values."""
    make = getattr(kind, "example", None)
    if make is not None:
        return make()
    needed = {
        f.name: 1.0 for f in fields(kind) if f.default is MISSING and f.default_factory is MISSING
    }
    return kind(**needed)


def _data() -> tuple[Key, ...]:
    """Return the keys of `[data]`; one that some streams lack has the names of the others."""
    found = []
    for key in _plain_keys(DataConfig()):
        having = [f'"{stream}"' for stream in STREAMS if key.name in keys_of(stream)]
        some = 0 < len(having) < len(STREAMS)
        condition = f"{CONDITION}stream = {' or '.join(having)}" if some else ""
        found.append(replace(key, allowed=key.allowed or condition))
    return tuple(found)


def _views() -> tuple[Key, ...]:
    chosen = Key(
        name="change",
        type="text, or a list of tables, each with name = TRANSFORM and its arguments",
        default=NEEDED,
        allowed=NAMES,
        meaning="function that returns the change, or transforms; its arguments are keys, too.",
    )
    count = Key(
        name="count",
        type="a whole number",
        default=NEEDED,
        allowed="1 or more",
        meaning="number of versions of every record.",
    )
    own = (key for change in CHANGES.values() for key in _parameters(change, ()))
    return (count, chosen, *own)


# --------------------------------------------------------------------------- tables with a name


def _named(name: str, known: Sequence[str], meaning: str) -> Key:
    return Key(
        name=name,
        type="text",
        default=NEEDED,
        allowed=f'{", ".join(known)}, or "module:name"',
        meaning=meaning,
    )


def _explain() -> tuple[Key, ...]:
    told = meanings(ExplainConfig)
    records = _key("records", int, _default(ExplainConfig.records), COUNTS, told["records"])
    drift = _key("drift", bool, _default(ExplainConfig.drift), "true or false", told["drift"])
    baseline = _key("baseline", float, _default(ExplainConfig.baseline), "", told["baseline"])
    tokens = "a list of token numbers from 0"
    kept = _key("kept", tuple[int, ...], _default(ExplainConfig.kept), tokens, told["kept"])
    method = _named("method", explain.names(), "name of the explainer.")
    return (method, records, drift, baseline, kept)


def _arm() -> tuple[Key, ...]:
    told = meanings(Arm)
    name = _key("name", str, LEFT_OUT, ALLOWED_NAMES, told["given_name"])
    known = (*strategies.names(), COMBINE)
    strategy = _named("strategy", known, "name of the strategy; its own fields are keys, too.")
    parts = Key(
        name="parts",
        type="a list of tables, each with strategy = NAME and its fields",
        default=LEFT_OUT,
        allowed=f'with strategy = "{COMBINE}"',
        meaning="strategies that are joined to one.",
    )
    private = _key("private", bool, "false", "", told["private"])
    loss = _key("loss", LossConfig, LEFT_OUT, "", told["loss"])
    return (name, strategy, parts, private, loss)


_CHARGE = Charge(1.0, 1.0, 1, "grid-gaussian")
_SEARCH = SearchConfig(space={"training.learning_rate": [0.001, 1.0]})
_SMALLEST = Config(name="x", arms=(Arm(strategy=strategies.Naive(), file="naive"),))
