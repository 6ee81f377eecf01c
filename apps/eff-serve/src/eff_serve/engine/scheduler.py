"""Which sequences run: the waiting line, the batch, and who gives way when no block of the cache is free."""

from __future__ import annotations

import collections
import threading
import time

from eff_serve.engine.block_manager import BlockManager
from eff_serve.engine.sequence import Sequence
from eff_serve.engine.types import DrainingError, EngineStats, QueueFullError, Step
from eff_serve.engine_config import EngineConfig


class Scheduler:
    """The line of waiting sequences and the batch of running ones.

    Requests are put in line from any thread; all else is called by the engine's thread alone.

    Args:
        blocks: Gives sequences room for their keys.
        config: Sizes of the batch and of the line.

    Attributes:
        running: The batch, the sequence that was let in first in front.
        changed: Guards the line; notified when there is something to do.
        draining: Whether new requests are refused.
    """

    def __init__(self, blocks: BlockManager, config: EngineConfig) -> None:
        self.blocks, self._config = blocks, config
        self.running: list[Sequence] = []
        self.changed = threading.Condition()
        self.draining = False
        self._waiting: collections.deque[Sequence] = collections.deque()
        self._seconds_per_request = 1.0  # running mean, for Retry-After

    def add(self, sequence: Sequence) -> None:
        """Put a sequence in line, behind those of its priority.

        Raises:
            QueueFullError: too many requests or too many prompt tokens are waiting.
            DrainingError: the engine is shutting down.
        """
        c, line = self._config, self._waiting
        with self.changed:
            if self.draining:
                raise DrainingError("the server is shutting down and takes no new requests")
            tokens = sum(s.pending for s in line) + len(sequence.tokens)
            if len(line) >= c.max_waiting or (line and tokens > c.max_waiting_tokens):
                ahead = (len(line) + 1) / c.max_batch
                raise QueueFullError(min(60.0, max(1.0, ahead * self._seconds_per_request)))
            behind = (i for i, s in enumerate(line) if s.sampling.priority > sequence.sampling.priority)
            line.insert(next(behind, len(line)), sequence)
            self.changed.notify()

    @property
    def idle(self) -> bool:
        """Whether there is nothing to compute."""
        return not (self._waiting or self.running)

    @property
    def all(self) -> list[Sequence]:
        """Every sequence that has not ended, running ones first."""
        return [*self.running, *self._waiting]

    def admit(self) -> None:
        """Let waiting sequences into the batch while there is room for them."""
        with self.changed:
            while self._waiting and len(self.running) < self._config.max_batch:
                # One block beyond the tokens at hand, so that a new sequence is not sent back by its first steps.
                wanted = self.blocks.needed(self._waiting[0].pending + 1) + 1
                if self.running and self.blocks.pool.free < wanted:
                    return
                self.running.append(self._waiting.popleft())

    def prefilling(self) -> Sequence | None:
        """The sequence whose prompt is read next."""
        return next((s for s in self.running if not s.decoding), None)

    def decoding(self) -> list[Sequence]:
        """The sequences that gain a token in this step, all with room for its keys."""
        ready = [s for s in self.running if s.decoding]
        ready = [s for s in ready if s in self.running and self.make_room(s, 1)]
        return [s for s in ready if s in self.running]  # making room may have sent some back to the line

    def make_room(self, sequence: Sequence, count: int) -> bool:
        """Give a running sequence blocks for ``count`` more tokens.

        Where none are free the youngest sequence gives its blocks back and waits; it is recomputed later, from the
        same tokens and the same random state, so that its text does not change.

        Returns:
            False where ``sequence`` itself was sent back to the line.
        """
        while not self.blocks.extend(sequence, count):
            youngest = self.running[-1]
            self.blocks.free(youngest)
            youngest.prompt_scores.clear()
            with self.changed:
                self.running.remove(youngest)
                self._waiting.appendleft(youngest)
            if youngest is sequence:
                return False
        return True

    def finish(self, sequence: Sequence, step: Step) -> None:
        """End a sequence with its last step, and give back what it holds."""
        with self.changed:
            self.blocks.free(sequence)
            if sequence in self.running:
                self.running.remove(sequence)
            else:
                self._waiting.remove(sequence)
        self._seconds_per_request += 0.1 * (time.monotonic() - sequence.submitted - self._seconds_per_request)
        sequence.stream.put(step)

    def wake(self) -> None:
        """Let the engine look again."""
        with self.changed:
            self.changed.notify()

    def stats(self, reusing: int) -> EngineStats:
        """Counts at this moment; ``reusing`` of the running sequences decode with layer reuse."""
        pool = self.blocks.pool
        used = pool.num_blocks - pool.free
        return EngineStats(
            len(self.running), len(self._waiting), used / pool.num_blocks, reusing, pool.kept / pool.num_blocks
        )
