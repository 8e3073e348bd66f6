"""The report room: a finished run as a terminal table, as pictures, and as one self-contained page.

It reads `result.json` and nothing that a run keeps private.
"""

from perdure.report.page import write_figures, write_report

__all__ = ["write_figures", "write_report"]
