"""Reports of a finished run: a table for the terminal, figures, and one self-contained HTML page.

The tables and the pictures of a comparison of runs and of a search are here as well. This package
reads `result.json`, and no private file of a run.
"""

from perdure.report.comparison_picture import comparison_picture
from perdure.report.comparison_tables import Grid, comparison_tables, latex, terminal_table
from perdure.report.findings import findings_table, healing_table
from perdure.report.groups import groups_table
from perdure.report.page import write_figures, write_report
from perdure.report.picture import Picture
from perdure.report.searches import front_picture, search_table

__all__ = [
    "Grid",
    "Picture",
    "comparison_picture",
    "comparison_tables",
    "findings_table",
    "front_picture",
    "groups_table",
    "healing_table",
    "latex",
    "search_table",
    "terminal_table",
    "write_figures",
    "write_report",
]
