"""The one way to change a model: choose modules, change them, report what was done, and take it back.

`select` finds modules by name or predicate. `Handle` remembers how to undo each change and restores the model bit for
bit. `Report` lists what was changed and what was skipped with the reason; nothing is skipped silently.
"""

from eff_kernels.edit.handle import Handle
from eff_kernels.edit.report import Entry, Report, SkippedModulesError
from eff_kernels.edit.select import Where, fits, matches, replace_module, select

__all__ = [
    "Entry",
    "Handle",
    "Report",
    "SkippedModulesError",
    "Where",
    "fits",
    "matches",
    "replace_module",
    "select",
]
