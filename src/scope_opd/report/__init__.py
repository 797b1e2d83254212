"""The report: run folders in, one self-contained HTML file out. Nothing here imports torch."""

from scope_opd.report.build import build_report

__all__ = ["build_report"]
