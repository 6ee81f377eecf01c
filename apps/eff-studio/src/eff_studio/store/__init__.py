"""What outlives the process: jobs in one SQLite file, pictures beside it."""

from eff_studio.store.jobs import Job, Jobs, State
from eff_studio.store.pictures import Pictures, Rejected, read_picture, read_settings

__all__ = ["Job", "Jobs", "Pictures", "Rejected", "State", "read_picture", "read_settings"]
