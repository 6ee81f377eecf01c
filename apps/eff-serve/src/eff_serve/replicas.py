"""Several copies of the model, each in a process of its own, by Ray Serve: on one machine or on the nodes of a cluster.

The server keeps HTTP, tokenizer and text. A replica holds the weights and an engine, which batches the requests that it
is given. What a request draws at random follows a seed, so that an answer whose replica died goes on, on another one,
where it stopped: the tokens that were delivered are made again and skipped.
"""

from __future__ import annotations

import asyncio
import os
import secrets
from collections.abc import AsyncIterator, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from typing import Any

from eff_serve.engine_config import EngineConfig
from eff_serve.names import EYES

_TRIES = 3
"""An answer whose replica died is begun again on another one, so often."""

_DEPLOYMENT = "eff-serve"


@dataclass(frozen=True, slots=True)
class About:
    """What a replica says of its model."""

    description: str
    quantization: str
    fingerprint: str
    architecture: str
    weight_bytes: int
    memory: int
    max_model_len: int
    vocab_size: int
    eos_token_ids: frozenset[int]
    adapters: tuple[str, ...]


class Replica:
    """What runs in a replica's process.

    Args:
        config: `EngineConfig.to_dict` of the model.
        threads: CPU threads; None is PyTorch's choice.
    """

    def __init__(self, config: dict[str, Any], threads: int | None) -> None:
        import torch

        from eff_serve.engine import load_engine

        if threads is not None:
            torch.set_num_threads(threads)
        self.model = load_engine(EngineConfig.from_dict(config), progress=False)
        self.model.engine.start()

    async def about(self) -> About:
        """What it holds."""
        model, shape = self.model, self.model.engine.decoder.config
        return About(
            description=model.description,
            quantization=model.quantization,
            fingerprint=model.fingerprint,
            architecture=shape.architecture,
            weight_bytes=model.engine.decoder.weight_bytes,
            memory=model.memory,
            max_model_len=model.engine.max_model_len,
            vocab_size=shape.vocab_size,
            eos_token_ids=shape.eos_token_ids,
            adapters=model.engine.adapters,
        )

    async def generate(self, prompt: list[int], sampling: Any) -> AsyncIterator[Any]:
        """The steps of one request; its place is free once the caller has gone."""
        from eff_serve.engine.types import Step

        try:
            stream = self.model.engine.submit(prompt, sampling)
        except (ValueError, RuntimeError) as error:
            yield Step(finish_reason="error", error=str(error))
            return
        try:
            async for step in stream:
                yield step
        finally:
            stream.cancel()


class ReplicaStream:
    """The steps of one request, from whichever replica has it.

    Args:
        engine: Whose request it is.
        prompt: Token ids.
        sampling: With a seed.
    """

    def __init__(self, engine: ReplicaEngine, prompt: list[int], sampling: Any) -> None:
        self._engine, self._prompt, self._sampling = engine, prompt, sampling
        self._cancelled = asyncio.Event()
        self._open = True

    def cancel(self) -> None:
        """Give up the request; its replica stops at its next step."""
        if self._open:
            self._open = False
            self._engine.open -= 1
        self._cancelled.set()

    async def __aiter__(self) -> AsyncIterator[Any]:
        """Yield steps until one has a finish_reason."""
        from ray.exceptions import RayActorError

        from eff_serve.engine.types import Step

        delivered = 0
        try:
            for _ in range(_TRIES):
                try:
                    async for step in self._steps(delivered):
                        delivered += 1
                        yield step
                        if step.finish_reason is not None:
                            return
                except RayActorError:
                    continue
            yield Step(finish_reason="error", error=f"{_TRIES} replicas died over this answer")
        finally:
            self.cancel()

    async def _steps(self, known: int) -> AsyncIterator[Any]:
        """Steps of one replica without the first ``known``; ends with "cancelled" once the request was given up."""
        from eff_serve.engine.types import Step

        handle = self._engine.handle.options(stream=True)
        response = handle.generate.remote(self._prompt, self._sampling)
        gone = asyncio.ensure_future(self._cancelled.wait())
        steps = response.__aiter__()
        try:
            while True:
                coming = asyncio.ensure_future(anext(steps))
                await asyncio.wait((coming, gone), return_when=asyncio.FIRST_COMPLETED)
                if not coming.done():
                    coming.cancel()
                    await asyncio.gather(coming, return_exceptions=True)
                    yield Step(finish_reason="cancelled")
                    return
                try:
                    step = coming.result()
                except StopAsyncIteration:
                    yield Step(finish_reason="error", error="a replica ended this answer without a reason")
                    return
                if known:
                    known -= 1
                else:
                    yield step
        finally:
            gone.cancel()
            response.cancel()


class ReplicaEngine:
    """The replicas as the HTTP layer sees them: like an engine.

    Args:
        handle: Ray Serve's handle.
        count: How many replicas there are.
        config: Of each.
    """

    adapters: tuple[str, ...]
    steering: tuple[str, ...] = ()

    def __init__(self, handle: Any, count: int, config: EngineConfig) -> None:
        self.handle, self.count, self.config = handle, count, config
        self.about: About = handle.about.remote().result()
        self.max_model_len, self.adapters = self.about.max_model_len, self.about.adapters
        self.open = 0
        self._draining = False

    def submit(self, prompt: list[int], sampling: Any, pictures: Any = None) -> ReplicaStream:
        """See `Engine.submit`.

        Raises:
            ValueError: the prompt has ids outside the vocabulary, is too long, or asks for steering or pictures.
            QueueFullError: all replicas and their lines are full.
            DrainingError: `stop` was called.
        """
        from eff_serve.engine.types import DrainingError, QueueFullError, check_prompt

        if pictures is not None or sampling.steering is not None:
            raise ValueError("replicas take neither pictures nor steering")
        vocab = self.about.vocab_size
        check_prompt(prompt, sampling.max_tokens, vocab_size=vocab, max_model_len=self.max_model_len)
        if self._draining:
            raise DrainingError("the server is shutting down and takes no new requests")
        if self.open >= self.count * self.config.max_batch + self.config.max_waiting:
            raise QueueFullError(1.0)
        if sampling.seed is None:
            sampling = replace(sampling, seed=secrets.randbits(62))
        self.open += 1
        return ReplicaStream(self, prompt, sampling)

    def stats(self) -> Any:
        """Requests that run and wait, of all replicas together; what their caches hold is not known here."""
        from eff_serve.engine.types import EngineStats

        running = min(self.open, self.count * self.config.max_batch)
        return EngineStats(running, self.open - running, 0.0)

    def start(self) -> None:
        """The replicas run already."""

    def stop(self, grace: float) -> None:
        """Refuse new requests; those that run end with the replicas."""
        self._draining = True


def check_replicas(config: EngineConfig) -> None:
    """Raise ValueError for what replicas do not do."""
    if config.model == EYES:
        raise ValueError(f"replicas read text only, and {EYES} has eyes")


@contextmanager
def started(
    config: EngineConfig, count: int, *, threads: int | None = None, address: str | None = None
) -> Iterator[ReplicaEngine]:
    """Replicas for as long as the context lives.

    Args:
        config: The model, and how each replica runs it.
        count: How many.
        threads: CPU threads of each; by default the processor's, shared evenly.
        address: Of a running Ray cluster, such as "auto"; None starts one on this machine.

    Raises:
        ImportError: Ray is not installed.
        ValueError: the model has eyes.
    """
    check_replicas(config)
    os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")
    import ray
    from ray import serve

    cores = threads or max(1, (os.cpu_count() or 1) // count)
    ray.init(address=address, log_to_driver=False, **({} if address else {"include_dashboard": False}))
    deployment = serve.deployment(
        Replica,
        name=_DEPLOYMENT,
        num_replicas=count,
        max_ongoing_requests=config.max_batch + config.max_waiting,
        # On one machine the threads are what matters: more cores might be asked for than there are.
        ray_actor_options={"num_cpus": 1 if address is None else cores},
    )
    try:
        bound = deployment.bind(config.to_dict(), cores)
        yield ReplicaEngine(serve.run(bound, name=_DEPLOYMENT, route_prefix=None), count, config)
    finally:
        serve.delete(_DEPLOYMENT)
        if address is None:
            serve.shutdown()
        ray.shutdown()
