"""The one way to change a model: choose modules, change them, report what was done, and take it back.

`select` finds modules by name or predicate. `Handle` remembers how to undo each change and restores the model bit for
bit. `Report` lists what was changed and what was skipped with the reason; nothing is skipped silently.

`Settings` are configs that check themselves and travel as JSON, `Record` is a small result in one file. `calibrate`
runs a model over batches and looks at its modules; `Distiller` compares them with those of a teacher.
"""

from eff_kernels.edit.calibrate import ModuleCall, Run, calibrate, evaluating
from eff_kernels.edit.compiled import uncompiled
from eff_kernels.edit.distill import Distiller, cosine
from eff_kernels.edit.files import Record, write_whole
from eff_kernels.edit.handle import Handle
from eff_kernels.edit.report import Entry, Report, SkippedModulesError
from eff_kernels.edit.select import Where, fits, matches, replace_module, select
from eff_kernels.edit.settings import Settings

__all__ = [
    "Distiller",
    "Entry",
    "Handle",
    "ModuleCall",
    "Record",
    "Report",
    "Run",
    "Settings",
    "SkippedModulesError",
    "Where",
    "calibrate",
    "cosine",
    "evaluating",
    "fits",
    "matches",
    "replace_module",
    "select",
    "uncompiled",
    "write_whole",
]
