"""Are the scores that lm-eval wrote well above chance? Run it as ``python check.py FOLDER``."""

import json
import sys
from pathlib import Path

LEAST = {"capitals": ("acc,none", 0.5), "capitals_generated": ("exact_match,words", 0.3)}  # chance: 0.25 and 0


def main() -> None:
    """Print each score; exit with status 1 where one is too low or missing."""
    files = sorted(Path(sys.argv[1]).rglob("results*.json"))
    if not files:
        sys.exit(f"{sys.argv[1]} holds no results of lm-eval")
    results = json.loads(files[-1].read_text(encoding="utf-8"))["results"]
    low = []
    for task, (metric, least) in LEAST.items():
        value = results.get(task, {}).get(metric)
        sys.stdout.write(f"{task}: {metric} {value}\n")
        if value is None or value < least:
            low.append(f"{task} {metric} is {value}, {least} or more is wanted")
    if low:
        sys.exit("; ".join(low))


if __name__ == "__main__":
    main()
