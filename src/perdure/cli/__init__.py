"""The command line: `perdure`, or `python -m perdure.cli.main`. It offers nothing to import."""

__all__: list[str] = []
