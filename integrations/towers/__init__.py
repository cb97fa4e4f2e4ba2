"""Conv towers of any model found, and an IFRHead put in place of each."""

from .replace import replace_towers
from .report import Replacement, Report, Skipped

__all__ = ["Replacement", "Report", "Skipped", "replace_towers"]
