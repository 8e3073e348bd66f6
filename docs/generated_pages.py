"""Write the pages of the site that are made from the code and from the stored results.

MkDocs calls `on_files` and `on_page_markdown` (see `hooks` in mkdocs.yml):

    reference/        a page for each package with the names in its `__all__`; the command line
                      and the config of a run
    strategies.md     a table of strategies by tasks, and a section for each strategy: paper,
                      formula, state, privacy cost, results
    changelog.md      CHANGELOG.md as it is
"""

import importlib
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from mkdocs.config.defaults import MkDocsConfig
from mkdocs.structure.files import File, Files

PACKAGES = {
    "perdure": "Names that every program needs",
    "perdure.data": "Data sets, streams of experiences, records",
    "perdure.tasks": "Losses, metrics and targets",
    "perdure.tasks.losses": "Losses to choose",
    "perdure.models": "Models and heads",
    "perdure.contract": "Base classes of extensions",
    "perdure.learner": "The training loop",
    "perdure.privacy": "Privacy settings, ledger, noise, clipping",
    "perdure.queries": "Sums over records",
    "perdure.federated": "Federations",
    "perdure.adversarial": "Attacks and adversarial training",
    "perdure.adversarial.certificates": "Certificates: interval bounds and randomised smoothing",
    "perdure.adversarial.defences": "Losses of adversarial training",
    "perdure.explain": "Explainers",
    "perdure.auditing": "Attacks on the privacy of a run",
    "perdure.loggers": "Curves for TensorBoard, MLflow, Weights & Biases",
    "perdure.avalanche": "From and to Avalanche",
    "perdure.export": "Trained models as files",
    "perdure.doctor": "Examination of a training, findings and remedies",
    "perdure.experiment": "Configured runs and searches",
    "perdure.report": "Reports of runs",
    "perdure.deployment": "Deployments of a federation",
    "perdure.testing": "Checks for extensions of your own",
}
"""Public packages, in the order of the site; `perdure.strategies` has a page of its own."""

RESULTS = Path(__file__).parents[1] / "benchmarks" / "results"
MEASURED = ("split_mnist", "permuted_mnist", "split_cifar10", "dp_continual", "analytic_mnist")
"""Files of stored rows that have one strategy, and its accuracy, in a row."""
ROW_NAMES = {"none": "naive", "er": "replay", "der++": "der"}
"""Strategies that rows give another name than their file."""
FACTS = {"scenario": "{}-incremental", "protocol": "protocol {}", "epsilon": "epsilon {:g}"}
"""Facts of a row that tell it from others, with how they are written."""

EXIT_CODES = """
## Exit codes

| code | meaning |
|---|---|
| 0 | done |
| 1 | `run`: finished, but a training diverged. `audit`: a claim is refuted. \
`doctor`: there are findings. \
`ledger verify`: something is wrong. `ledger show` and `ledger project`: \
a ledger of the run is missing |
| 2 | the command cannot be carried out: wrong option, config, folder or data; one line says why |
| 3 | `ledger verify`: nothing is wrong, but a key is missing, so the history is not proved |
| 130 | stopped by Ctrl-C; give the same command again to continue |
"""


def on_files(files: Files, *, config: MkDocsConfig) -> Files:
    """Add the generated pages."""
    pages = dict(_reference())
    pages["strategies.md"] = _strategies()
    pages["reference/command-line.md"] = command_line()
    pages["reference/config.md"] = run_config()
    pages["changelog.md"] = Path(config.config_file_path).with_name("CHANGELOG.md").read_text()
    for path, text in pages.items():
        files.append(File.generated(config, path, content=text))
    return files


def _reference() -> Iterator[tuple[str, str]]:
    """Yield path and text of the page of every public package."""
    listed = "".join(
        f"| [`{name}`]({_file(name)}) | {title} |\n" for name, title in PACKAGES.items()
    )
    yield (
        "reference/index.md",
        "# Reference\n\nPublic is what a package lists in `__all__`.\n\n"
        f"| package | contents |\n|---|---|\n{listed}"
        "| [`perdure.strategies`](../strategies.md) | Strategies |\n"
        "| [the command line](command-line.md) | Commands, options, exit codes |\n"
        "| [the config](config.md) | Tables and fields of a run's TOML file |\n",
    )
    for name, title in PACKAGES.items():
        package = importlib.import_module(name)
        entries = "".join(f"::: {name}.{entry}\n\n" for entry in sorted(package.__all__))
        yield f"reference/{_file(name)}", f"# {name}\n\n{title}.\n\n{entries}"


def _file(package: str) -> str:
    """File name of the page of a package."""
    return f"{package}.md"


def _strategies() -> str:
    """Text of the page of strategies."""
    from perdure.experiment.strategy_catalogue import cards
    from perdure.strategies import find

    parts = [
        "# Strategies\n\nEvery strategy is one file. Privacy cost and state are read from the "
        "code; state is counted in multiples of the model's parameters. Results are average "
        "accuracies in percent with their standard errors, from the stored rows of the "
        "[benchmarks](benchmarks.md).\n",
        tasks_table(),
    ]
    for card in cards():
        kind = find(card.name)
        parts.append(
            f"## {kind.__name__}\n\n"
            f"- **Use:** `{card.strategy}`\n- **Paper:** {card.paper or 'none'}\n"
            f"- **Under privacy:** {card.privacy}\n- **State and memory:** {card.memory}\n"
            f"{_measured(card.name)}\n"
            f"::: perdure.strategies.{kind.__name__}\n    options:\n"
            "      show_root_heading: false\n      show_root_toc_entry: false\n      members: []\n"
        )
    return "\n".join(parts)


def tasks_table() -> str:
    """Table of strategies by the tasks that they serve, from their class attributes."""
    from perdure import strategies, tasks

    kinds = [tasks.find(name) for name in tasks.names()]
    rows = []
    for name in strategies.names():
        kind = strategies.find(name)
        served = ["yes" if issubclass(task, kind.tasks) else "no" for task in kinds]
        reason = kind.tasks_because if "no" in served else ""
        link = f"[{kind.__name__}](#{kind.__name__.lower()})"
        rows.append(f"| {' | '.join([link, *served, reason])} |")
    heads = ["strategy", *(f"`{kind.__name__}`" for kind in kinds), "reason"]
    return (
        "## By task\n\nRecords of a [task](concepts/tasks.md) that a strategy does not serve are "
        "refused when a session is built, with the reason. A task of your own is served by those "
        f"that serve all.\n\n| {' | '.join(heads)} |\n|{'---|' * len(heads)}\n"
        + "\n".join(rows)
        + "\n"
    )


def _measured(strategy: str) -> str:
    """Stored results of a strategy as one item of a list; "" where there is none."""
    found = []
    for file in MEASURED:
        for row in json.loads((RESULTS / f"{file}.json").read_text())["rows"]:
            if ROW_NAMES.get(row["strategy"], row["strategy"]) != strategy:
                continue
            facts = [form.format(row[key]) for key, form in FACTS.items() if row.get(key)]
            accuracy = f"{row['average_accuracy']:.1f} ({row['standard_error']:.1f})"
            found.append(f"    - {', '.join([file, *facts])}: {accuracy}, `{row['options']}`\n")
    return f"- **Results:**\n\n{''.join(found)}" if found else ""


def command_line() -> str:
    """Text of the page of commands, from their own help."""
    import typer

    from perdure.cli.main import app

    intro = (
        "# Command line\n\nEvery command prints the same with `--help`. RUN is the folder of a "
        "run, CONFIG a [TOML file](config.md).\n\n"
    )
    return intro + "".join(_commands(typer.main.get_command(app), "perdure")) + EXIT_CODES


def _commands(command: Any, path: str) -> Iterator[str]:
    """Yield the section of a command that does something, or those of the group's commands."""
    inner = getattr(command, "commands", {})
    for name, each in inner.items():
        yield from _commands(each, f"{path} {name}")
    if inner:
        return
    arguments = [p.name.upper() for p in command.params if p.param_type_name == "argument"]
    options = [p for p in command.params if p.param_type_name == "option"]
    usage = " ".join([path, *arguments, *(["[OPTIONS]"] if options else [])])
    yield f"## {path}\n\n```sh\n{usage}\n```\n\n"
    yield f"{command.help}\n\n"
    if options:
        yield "| option | meaning |\n|---|---|\n"
        yield "".join(f"| `{_written(option)}` | {_meaning(option)} |\n" for option in options)
        yield "\n"


def _written(option: Any) -> str:
    """Name of an option with the kind of its value, as `--steps INTEGER`."""
    return option.opts[0] if option.is_flag else f"{option.opts[0]} {option.type.name.upper()}"


def _meaning(option: Any) -> str:
    """Help of an option, with its default or that it must be given."""
    if option.required:
        return f"{option.help} Required."
    known = option.default is not None and not option.is_flag
    return f"{option.help} Default: {option.default}." if known else str(option.help)


def run_config() -> str:
    """Text of the page of a run's config: the example of its module, then every table."""
    from perdure.experiment import config
    from perdure.experiment.reference import reference_markdown

    example = str(config.__doc__).partition("\n\n")[2].strip()
    listed = "".join(
        f"| {kind} | {', '.join(f'`{name}`' for name in names)} |\n"
        for kind, names in _extensions().items()
    )
    return (
        "# Config of a run\n\nA run is described by one TOML file. `perdure demo --show-config` "
        "prints one to change; `perdure run FILE` runs it, and `perdure config FILE` checks it. A "
        "key that is unknown or out of range is refused with the file, its name, its value and "
        "what is allowed. `perdure config --reference` prints this page in a terminal."
        f"\n\n```toml\n{example}\n```\n\n"
        "`[private_training]` has the keys of `[training]` and replaces it for the private arms. "
        'An extension of your own is named `"my_package.my_module:MyClass"`; modules are also '
        "searched in the folder where the command is given. These are found by name:\n\n"
        f"| in | names |\n|---|---|\n{listed}\n{reference_markdown()}"
    )


def _extensions() -> dict[str, tuple[str, ...]]:
    """Names of the extensions that come with the library, by the place where a config has them."""
    from perdure import adversarial, explain, loggers, strategies
    from perdure.data import datasets

    return {
        "`[data]`, `name`": datasets.names(),
        "`[attack]` and `adversary`, `name`": adversarial.names(),
        "`defence`, `name`": adversarial.defences.names(),
        "`[explain]`, `method`": explain.names(),
        "`[[loggers]]`, `name`": loggers.names(),
        "`[[arms]]`, `strategy`": strategies.names(),
    }
