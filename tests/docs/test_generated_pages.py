"""Generated pages name every command, option and table."""

import importlib.util
import re
import warnings
from dataclasses import fields
from pathlib import Path
from types import ModuleType

import pytest

from helpers.pages import ROOT
from perdure import strategies, tasks
from perdure.errors import ConfigError
from perdure.experiment import Config


@pytest.fixture(scope="module")
def hook() -> ModuleType:
    path = ROOT / "docs" / "generated_pages.py"
    spec = importlib.util.spec_from_file_location(Path(path).stem, path)
    assert spec and spec.loader
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_the_command_line_page_names_every_option(hook: ModuleType) -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # typer imports what click will remove
        import typer

        from perdure.cli.main import app
    page = hook.command_line()
    top = typer.main.get_command(app)
    commands = {f"perdure {name}": each for name, each in vars(top)["commands"].items()}
    ledger = vars(commands.pop("perdure ledger"))["commands"]
    commands |= {f"perdure ledger {name}": each for name, each in ledger.items()}
    assert len(commands) > 8
    for path, command in commands.items():
        section = page.partition(f"## {path}\n")[2].partition("\n## ")[0]
        for option in command.params:
            shown = option.opts[0] if option.opts[0].startswith("--") else option.name.upper()
            assert shown in section, (path, shown)


def test_the_tasks_table_shows_the_tasks_a_strategy_refuses(hook: ModuleType) -> None:
    kinds = [tasks.find(name)() for name in tasks.names()]
    rows = hook.tasks_table().partition("|---|")[2].splitlines()[1:]
    assert len(rows) == len(strategies.names())
    for name, row in zip(strategies.names(), rows, strict=True):
        strategy = strategies.find(name).example()
        _, title, *served, reason, _ = (cell.strip() for cell in row.split("|"))
        assert strategy.name in title
        for task, answer in zip(kinds, served, strict=True):
            if answer == "yes":
                strategy.refuse_task(task)
            else:
                with pytest.raises(ConfigError, match=re.escape(reason)):
                    strategy.refuse_task(task)


def test_the_config_page_names_every_field(hook: ModuleType) -> None:
    page = hook.run_config()
    for field in fields(Config):
        assert f"[{field.name}]" in page or f"`{field.name}`" in page, field.name


def test_the_config_page_lists_built_in_data_sets_and_attacks(hook: ModuleType) -> None:
    page = hook.run_config()
    for name in ("breast_cancer", "pgd", "kernel_shap", "replay"):
        assert f"`{name}`" in page
