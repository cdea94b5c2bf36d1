"""The report of a search: one HTML page and its pictures."""

from mup_megatron.search.page.page import PAGE, PICTURES, Wording, report_files

__all__ = ["PAGE", "PICTURES", "Wording", "report_files"]
