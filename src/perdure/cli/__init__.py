"""The command line: `perdure`, or `python -m perdure.cli.main`; there is nothing to import."""

__all__: list[str] = []
