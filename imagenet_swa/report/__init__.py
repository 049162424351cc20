"""Finished or running runs -> tables beside the paper's, significance, pictures, Markdown, HTML, JSON. Reads files only."""

from imagenet_swa.report.paper import paper_figure
from imagenet_swa.report.plots import learning_rates, plot_paper_schedules, plot_schedule, plot_trajectory
from imagenet_swa.report.runs import TITLES, RunFiles, load_run
from imagenet_swa.report.single import write_report
from imagenet_swa.report.summary import report_runs
from imagenet_swa.report.tables import COLUMNS, RUN_COLUMNS, compare_runs, markdown_table, print_table, table_rows

__all__ = [
    "COLUMNS",
    "RUN_COLUMNS",
    "TITLES",
    "RunFiles",
    "compare_runs",
    "learning_rates",
    "load_run",
    "markdown_table",
    "paper_figure",
    "plot_paper_schedules",
    "plot_schedule",
    "plot_trajectory",
    "print_table",
    "report_runs",
    "table_rows",
    "write_report",
]
