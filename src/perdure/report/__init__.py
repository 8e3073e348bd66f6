"""Reports of a finished run: a table for the terminal, figures, and one self-contained HTML page.

This package reads `result.json`, and no private file of a run.
"""

from perdure.report.page import write_figures, write_report

__all__ = ["write_figures", "write_report"]
