"""Write the pages of the site that are made from the code and from the stored results.

MkDocs calls `on_files` and `on_page_markdown` (see `hooks` in mkdocs.yml):

    reference/        a page for each package with the names in its `__all__`
    strategies.md     a section for each strategy: paper, formula, state, privacy cost
    changelog.md      CHANGELOG.md as it is
"""

import importlib
from collections.abc import Iterator
from pathlib import Path

from mkdocs.config.defaults import MkDocsConfig
from mkdocs.structure.files import File, Files

PACKAGES = {
    "perdure": "Names that every program needs",
    "perdure.data": "Data sets, streams of experiences, records",
    "perdure.models": "Models and heads",
    "perdure.contract": "Base classes of extensions",
    "perdure.learner": "The training loop",
    "perdure.privacy": "Privacy settings, ledger, noise, clipping",
    "perdure.queries": "Sums over records",
    "perdure.federated": "Federations",
    "perdure.adversarial": "Attacks and adversarial training",
    "perdure.explain": "Explainers",
    "perdure.auditing": "Attacks on the privacy of a run",
    "perdure.avalanche": "From and to Avalanche",
    "perdure.experiment": "Configured runs and searches",
    "perdure.report": "Reports of runs",
    "perdure.testing": "Checks for extensions of your own",
}
"""Public packages, in the order of the site; `perdure.strategies` has a page of its own."""


def on_files(files: Files, *, config: MkDocsConfig) -> Files:
    """Add the generated pages."""
    pages = dict(_reference())
    pages["strategies.md"] = _strategies()
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
        "| [`perdure.strategies`](../strategies.md) | Strategies |\n",
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
        "code; state is counted in multiples of the model's parameters.\n"
    ]
    for card in cards():
        kind = find(card.name)
        parts.append(
            f"## {kind.__name__}\n\n"
            f"| | |\n|---|---|\n| use | `{card.strategy}` |\n| paper | {card.paper or 'none'} |\n"
            f"| under privacy | {card.privacy} |\n| state and memory | {card.memory} |\n\n"
            f"::: perdure.strategies.{kind.__name__}\n    options:\n"
            "      show_root_heading: false\n      show_root_toc_entry: false\n"
        )
    return "\n".join(parts)
