"""What an edit did to a model: modules changed, and modules skipped with the reason."""

from __future__ import annotations

from dataclasses import dataclass, field


class SkippedModulesError(ValueError):
    """A strict edit met modules that it had to leave as they were."""


@dataclass(frozen=True, slots=True)
class Entry:
    """One module of a report. ``reason`` is empty for a changed module; sizes are in bytes."""

    name: str
    reason: str = ""
    bytes_before: int = 0
    bytes_after: int = 0


@dataclass(slots=True)
class Report:
    """What an edit did to a model."""

    action: str
    changed: list[Entry] = field(default_factory=list)
    skipped: list[Entry] = field(default_factory=list)

    def change(self, name: str, *, bytes_before: int = 0, bytes_after: int = 0) -> None:
        """Note a module that was changed."""
        self.changed.append(Entry(name, "", bytes_before, bytes_after))

    def skip(self, name: str, reason: str, *, size: int = 0) -> None:
        """Note a module that was left as it was, and why."""
        self.skipped.append(Entry(name, reason, size, size))

    @property
    def bytes_before(self) -> int:
        """Size of all reported modules before the edit."""
        return sum(e.bytes_before for e in (*self.changed, *self.skipped))

    @property
    def bytes_after(self) -> int:
        """Size of all reported modules after the edit."""
        return sum(e.bytes_after for e in (*self.changed, *self.skipped))

    def raise_if_skipped(self) -> None:
        """Turn skips into an error that names each of them (what ``strict=True`` does)."""
        if self.skipped:
            lines = "\n".join(f"  {e.name}: {e.reason}" for e in self.skipped)
            raise SkippedModulesError(f"{self.action}: {len(self.skipped)} modules were skipped\n{lines}")

    def __str__(self) -> str:
        lines = [f"{self.action}: {len(self.changed)} changed, {len(self.skipped)} skipped"]
        if self.bytes_before:
            lines[0] += f", {self.bytes_before / 2**20:.1f} MiB -> {self.bytes_after / 2**20:.1f} MiB"
        lines += [f"  {e.name}: skipped, {e.reason}" for e in self.skipped]
        return "\n".join(lines)
