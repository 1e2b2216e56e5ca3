"""One self-contained HTML page about annotated cells."""

from evercell.reporting.report import write_report

__all__ = ["write_report"]
