"""Makes `class_table` and its rows importable."""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parent))
