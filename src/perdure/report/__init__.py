"""Reports of a finished run: a table for the terminal, figures, and one self-contained HTML page.

The tables and the picture of a comparison of runs are here as well. This package reads
`result.json`, and no private file of a run.
"""

from perdure.report.comparison_picture import comparison_picture
from perdure.report.comparison_tables import Grid, comparison_tables, latex, terminal_table
from perdure.report.findings import findings_table, healing_table
from perdure.report.page import write_figures, write_report
from perdure.report.picture import Picture

__all__ = [
    "Grid",
    "Picture",
    "comparison_picture",
    "comparison_tables",
    "findings_table",
    "healing_table",
    "latex",
    "terminal_table",
    "write_figures",
    "write_report",
]
