"""The engine: a pipeline of diffusers with eff's methods around it. It knows nothing of servers."""

from eff_studio.engine.draw import CancelledError, Progress, Result, run_work
from eff_studio.engine.model import StudioModel, load_model

__all__ = ["CancelledError", "Progress", "Result", "StudioModel", "load_model", "run_work"]
