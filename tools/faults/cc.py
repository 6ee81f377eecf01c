"""A compiler that keeps the objects it made: of all C files only those that a fault changed are compiled again.

Called like cc with sources and ``-o``; the objects lie in the folder that FAULTS_OBJECTS names.
"""

from __future__ import annotations

import hashlib
import os
import subprocess
import sys
from pathlib import Path


def main() -> int:
    """Compile each source that is new, then link."""
    arguments = sys.argv[1:]
    at = arguments.index("-o")
    out, folder = arguments[at + 1], Path(os.environ["FAULTS_OBJECTS"])
    sources = [a for a in arguments[:at] if a.endswith(".c")]
    flags = [a for a in arguments[:at] if not a.endswith(".c")]
    objects = []
    for source in sources:
        whole = subprocess.run(["cc", *flags, "-E", "-P", source], capture_output=True, check=True).stdout
        made = folder / f"{hashlib.sha256(' '.join(flags).encode() + whole).hexdigest()[:24]}.o"
        if not made.is_file():
            compiler = [f for f in flags if f != "-shared"]
            if code := subprocess.run(["cc", *compiler, "-c", source, "-o", str(made)]).returncode:
                return code
        objects.append(str(made))
    return subprocess.run(["cc", *flags, *objects, "-o", out, *arguments[at + 2 :]]).returncode


if __name__ == "__main__":
    sys.exit(main())
