"""Continuous batching: each step prefills a piece of one prompt and decodes one token for every running sequence.

Which sequences run, and in which blocks of the cache, is the `Scheduler`'s matter; what a text has in common with
earlier ones from its beginning on is not computed again, see `prefix`.
"""

from __future__ import annotations

import functools
import logging
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from eff_serve.engine.adapters import Adapters
from eff_serve.engine.block_manager import BlockManager
from eff_serve.engine.decoder import PAGE, Decoder
from eff_serve.engine.grammar import GrammarMatcher
from eff_serve.engine.hf import HFDecoder
from eff_serve.engine.lookup import guess_for
from eff_serve.engine.sampler import Sampler, sample_batch, score
from eff_serve.engine.scheduler import Scheduler
from eff_serve.engine.sequence import Sequence, TokenStream
from eff_serve.engine.types import EngineStats, Sampling, Step, check_prompt
from eff_serve.engine_config import EngineConfig
from eff_serve.pictures.prompt import PromptPictures

_log = logging.getLogger("eff_serve.engine")


class BatchEngine:
    """Runs many requests at once on a `Decoder`, on a thread of its own.

    Args:
        decoder: The model.
        config: Sizes of the batch, the line and the pieces of prompts, and what is shared and guessed. Decoders without
            ``copy_page`` share nothing.
        tokenizer_file: tokenizer.json, for grammars.

    Raises:
        ValueError: the model reads fewer tokens than ``max_model_len``, the cache has no room for so many, or the model
            cannot guess ahead.
    """

    def __init__(self, decoder: Decoder | HFDecoder, config: EngineConfig, *, tokenizer_file: Path) -> None:
        self.decoder, self.config = decoder, config
        if config.lookup and (isinstance(decoder, HFDecoder) or getattr(decoder, "reuse", None) is not None):
            raise ValueError(f"lookup={config.lookup} is for models on eff's own decoder, without layer reuse")
        limit = decoder.config.max_model_len
        self.max_model_len = limit if config.max_model_len is None else config.max_model_len
        if self.max_model_len > limit:
            raise ValueError(
                f"max_model_len must be 1 to {limit}, the most this model reads, got {config.max_model_len}"
            )
        blocks = BlockManager(decoder, PAGE, prefix_cache=config.prefix_cache)
        if (needed := blocks.needed(self.max_model_len)) > decoder.num_pages:
            raise ValueError(
                f"a sequence of {self.max_model_len} tokens needs {needed} pages, the cache has {decoder.num_pages}; "
                "lower max_model_len or give the cache more memory"
            )
        self.scheduler = Scheduler(blocks, config)
        self._tokenizer_file = tokenizer_file
        self._stop_at: float | None = None
        self._thread = threading.Thread(target=self._run, name="eff-engine", daemon=True)

    def submit(self, prompt: list[int], sampling: Sampling, pictures: PromptPictures | None = None) -> TokenStream:
        """Put a request in line; see `Engine.submit`.

        Raises:
            ValueError: the prompt is empty, too long, or has ids outside the vocabulary; the grammar is invalid; the
                model has no eyes, or pictures stand outside the prompt.
            QueueFullError: too many requests or too many prompt tokens are waiting.
            DrainingError: `stop` was called.
        """
        vocab = self.decoder.config.vocab_size
        check_prompt(prompt, sampling.max_tokens, vocab_size=vocab, max_model_len=self.max_model_len)
        if pictures is not None:
            if getattr(self.decoder, "behind_pictures", None) is None:
                raise ValueError("this model reads text only, and the prompt holds pictures")
            if not 0 <= pictures.first <= int(pictures.places[-1]) < len(prompt):
                raise ValueError(f"pictures must stand inside the prompt of {len(prompt)} tokens")
        adapter = None if sampling.adapter is None else self._shelf().get(sampling.adapter)
        if sampling.ruled:
            if (steerer := getattr(self.decoder, "steerer", None)) is None:
                raise ValueError("this model takes no steering")
            steerer.check(sampling.steering, pictures, sampling.watch)
        eos = self.decoder.config.eos_token_ids
        grammar = None
        if sampling.grammar is not None:
            grammar = GrammarMatcher(sampling.grammar, self._tokenizer_file, vocab, min(eos, default=0))
        stream = TokenStream(self.scheduler.wake)
        sequence = Sequence(
            len(prompt), list(prompt), sampling, Sampler(sampling, eos), stream, grammar, pictures, adapter
        )
        self.scheduler.add(sequence)
        return stream

    @property
    def adapters(self) -> tuple[str, ...]:
        """Names of the LoRA adapters that new requests may use."""
        held = getattr(self.decoder, "adapters", None)
        return () if held is None else held.names

    def load_adapter(self, name: str, folder: Path, *, replace: bool = False) -> None:
        """Offer one more adapter, while requests run; see `Adapters.load`."""
        if getattr(self.decoder, "adapters", None) is None and isinstance(self.decoder, Decoder):
            self.decoder.load_adapters({})
        self._shelf().load(name, folder, replace=replace)

    def unload_adapter(self, name: str) -> None:
        """Offer an adapter no longer; requests that have it keep it. See `Adapters.unload`."""
        self._shelf().unload(name)

    def _shelf(self) -> Adapters:
        """What holds the adapters.

        Raises:
            ValueError: the model runs through transformers, or holds none.
        """
        held: Adapters | None = getattr(self.decoder, "adapters", None)
        if held is None:
            raise ValueError("this model holds no adapters")
        return held

    @property
    def steering(self) -> tuple[str, ...]:
        """Ways in which requests may steer the attention of this model."""
        steerer = getattr(self.decoder, "steerer", None)
        return () if steerer is None else steerer.takes

    def _number(self, sequence: Sequence) -> int:
        """Number of a sequence's adapter; -1 for none."""
        return -1 if sequence.adapter is None else sequence.adapter.number

    def stats(self) -> EngineStats:
        """Counts at this moment."""
        reuse = getattr(self.decoder, "reuse", None)
        running = [len(s.tokens) for s in list(self.scheduler.running) if s.decoding]
        return self.scheduler.stats(0 if reuse is None else reuse.count(running))

    def start(self) -> None:
        """Start the engine's thread."""
        self._thread.start()

    def stop(self, grace: float) -> None:
        """Refuse new requests, let running ones end for up to ``grace`` seconds, then cancel them and join."""
        with self.scheduler.changed:
            self.scheduler.draining = True
            self._stop_at = time.monotonic() + grace
            self.scheduler.changed.notify()
        if self._thread.is_alive():
            self._thread.join()

    def _run(self) -> None:
        scheduler = self.scheduler
        while True:
            with scheduler.changed:
                while scheduler.idle and not scheduler.draining:
                    scheduler.changed.wait()
                expired = self._stop_at is not None and time.monotonic() >= self._stop_at
                if scheduler.draining and (expired or scheduler.idle):
                    break
            self._step()
        for sequence in scheduler.all:
            scheduler.finish(sequence, Step(finish_reason="cancelled"))

    def _step(self) -> None:
        scheduler = self.scheduler
        for sequence in scheduler.all:
            if sequence.stream.cancelled.is_set():
                scheduler.finish(sequence, Step(finish_reason="cancelled"))
        scheduler.admit()
        if (prefilling := scheduler.prefilling()) is not None:
            self._guarded([prefilling], lambda: self._prefill(prefilling))
        if decoding := scheduler.decoding():
            self._guarded(decoding, lambda: self._decode(decoding))

    def _guarded(self, sequences: list[Sequence], step: Callable[[], None]) -> None:
        """Run a step; an error ends the sequences that it was for, and the engine goes on."""
        try:
            step()
        except Exception as error:
            _log.exception("a step of the model failed")
            for sequence in sequences:
                if sequence in self.scheduler.running:
                    self.scheduler.finish(
                        sequence, Step(finish_reason="error", error=f"{type(error).__name__}: {error}")
                    )

    def _prefill(self, sequence: Sequence) -> None:
        if not sequence.block_table:
            self.scheduler.blocks.begin(sequence, self._number(sequence))
        count = self._piece(sequence)
        if not self.scheduler.make_room(sequence, count):
            return
        start = sequence.cached
        wants_scores = sequence.sampling.prompt_logprobs is not None and not sequence.output
        tokens = torch.tensor(sequence.tokens[start : start + count])
        seen = self._seen(sequence)
        if sequence.sampling.ruled:
            if start == 0:
                prompt, sampling = torch.tensor(sequence.prompt), sequence.sampling
                sequence.steered = self.decoder.steerer.begin(
                    sampling.steering, prompt, sequence.pictures, self._number(sequence), sampling.watch
                )
            seen["steered"] = sequence.steered
        logits = self.decoder.prefill(
            tokens, start, torch.tensor(sequence.block_table), all_logits=wants_scores, **seen
        )
        sequence.cached += count
        self.scheduler.blocks.share(sequence)
        if wants_scores:
            following, top = sequence.prompt[start + 1 : sequence.cached + 1], sequence.sampling.prompt_logprobs or 0
            sequence.prompt_scores += [score(row, t, top) for row, t in zip(logits, following, strict=False)]
            if sequence.pending == 0:
                sequence.stream.put(Step(prompt_scores=tuple(sequence.prompt_scores)))
        if sequence.pending == 0:
            self._advance_all([sequence], logits[-1:])

    def _seen(self, sequence: Sequence) -> dict[str, Any]:
        """What the decoder is to know of a sequence whose tokens it reads."""
        seen: dict[str, Any] = {} if sequence.pictures is None else {"pictures": sequence.pictures}
        return seen if sequence.sampling.adapter is None else {**seen, "adapter": self._number(sequence)}

    def _piece(self, sequence: Sequence) -> int:
        """Tokens of the next step of a sequence that is behind. Rules want a prompt whole, and an answer bit by bit."""
        if not sequence.sampling.ruled:
            return min(self.config.chunk, sequence.pending)
        return max(1, sequence.prompt_length - sequence.cached)

    def _guess(self, sequence: Sequence) -> list[int]:
        """Tokens that may follow those of a sequence that runs alone, if there is room for their keys."""
        guess = guess_for(sequence, self.config.lookup)
        wanted = self.scheduler.blocks.needed(sequence.cached + 1 + len(guess)) - len(sequence.block_table)
        return (
            guess
            if wanted <= self.scheduler.blocks.pool.free and self.scheduler.make_room(sequence, 1 + len(guess))
            else []
        )

    def _verify(self, sequence: Sequence, guess: list[int]) -> None:
        """Read a guess in one pass, and go on with what the model chooses for as long as that is what was guessed."""
        seen = self._seen(sequence)
        tokens, pages = torch.tensor([sequence.tokens[-1], *guess]), torch.tensor(sequence.block_table)
        logits = self.decoder.prefill(tokens, sequence.cached, pages, all_logits=True, **seen)
        right = 0
        for row, guessed in zip(logits, [*guess, -1], strict=True):
            sequence.cached += 1
            self.scheduler.blocks.share(sequence)
            self._advance_all([sequence], row[None])
            if sequence not in self.scheduler.running or sequence.tokens[-1] != guessed:
                break
            right += 1
        if sequence.guesser is not None:
            sequence.guesser.came_true(right)

    def _decode(self, sequences: list[Sequence]) -> None:
        if self.config.lookup and len(sequences) == 1 and (guess := self._guess(sequences[0])):
            self._verify(sequences[0], guess)
            return
        tokens = torch.tensor([s.tokens[-1] for s in sequences])
        positions = torch.tensor([s.cached for s in sequences])
        width = max(len(s.block_table) for s in sequences)
        table = torch.tensor([s.block_table + [0] * (width - len(s.block_table)) for s in sequences], dtype=torch.int32)
        behind = [row for row, s in enumerate(sequences) if s.pictures is not None]
        seen: dict[str, Any] = {"behind": torch.tensor(behind)} if behind else {}
        if any(s.sampling.adapter is not None for s in sequences):
            seen["adapters"] = torch.tensor([self._number(s) for s in sequences])
        if steered := {row: s.steered for row, s in enumerate(sequences) if s.steered is not None}:
            seen["steered"] = steered
        logits = self.decoder.decode(tokens, positions, table, **seen)
        for sequence in sequences:
            sequence.cached += 1
            if sequence.cached % PAGE == 0:
                self.scheduler.blocks.share(sequence)
        self._advance_all(sequences, logits)

    def _advance_all(self, sequences: list[Sequence], logits: Tensor) -> None:
        """Choose the next token of each sequence, all in one pass, and go on with it."""
        ready: list[tuple[Sequence, Tensor, Tensor]] = []

        def prepare(sequence: Sequence, row: Tensor) -> None:
            if sequence.sampling.max_tokens == 0:
                self.scheduler.finish(sequence, Step(finish_reason="length", cached_tokens=sequence.reused or 0))
                return
            wanted = row
            if not sequence.sampler.plain:
                allowed = None if sequence.grammar is None else sequence.grammar.allowed()
                wanted = sequence.sampler.prepare(row, sequence.prompt, sequence.output, allowed)
            sequence.sampler.check(wanted)
            ready.append((sequence, row, wanted))

        for sequence, row in zip(sequences, logits, strict=True):
            self._guarded([sequence], functools.partial(prepare, sequence, row))
        if not ready:
            return
        as_they_are = len(ready) == len(sequences) and all(wanted is row for _, row, wanted in ready)
        wanted = logits if as_they_are else torch.stack([wanted for _, _, wanted in ready])
        tokens = sample_batch([sequence.sampler for sequence, _, _ in ready], wanted)
        for (sequence, row, _), token in zip(ready, tokens, strict=True):
            self._guarded([sequence], functools.partial(self._advance, sequence, row, token))

    def _advance(self, sequence: Sequence, logits: Tensor, token: int) -> None:
        """Deliver the next token, which was chosen from the logits, and end the sequence where it ends."""
        s = sequence.sampling
        scored = None if s.logprobs is None else score(logits, token, s.logprobs)
        if sequence.grammar is not None:
            sequence.grammar.accept(token)
        sequence.tokens.append(token)
        ended = token in s.stop_token_ids or (not s.ignore_eos and token in self.decoder.config.eos_token_ids)
        reused = sequence.reused or 0
        if ended or (sequence.grammar is not None and sequence.grammar.done):
            self.scheduler.finish(sequence, Step(token, scored, finish_reason="stop", cached_tokens=reused))
        elif len(sequence.output) >= s.max_tokens:
            self.scheduler.finish(sequence, Step(token, scored, finish_reason="length", cached_tokens=reused))
        else:
            sequence.stream.put(Step(token, scored, cached_tokens=reused))
