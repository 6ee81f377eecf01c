"""Running the app: key file, banner, signals, draining."""

from __future__ import annotations

import logging
import sys
from contextlib import suppress
from functools import partial
from typing import TYPE_CHECKING

from eff_http import LOOPBACK_HOSTS, DrainingServer, log_to_stderr, read_keys
from rich.console import Console

from eff_serve.api import Settings
from eff_serve.api.app import create_models_app
from eff_serve.serving_plan import one_model, replicated_model, several_models

if TYPE_CHECKING:
    from collections.abc import Sequence

    from eff_serve.api.models import Models
    from eff_serve.cli import Serve
    from eff_serve.engine import EngineConfig, LoadedModel


def serve_one(config: Serve, loaded: LoadedModel, names: Sequence[str]) -> int:
    """Serve a model until SIGTERM or Ctrl-C; running answers get ``config.grace`` seconds to end.

    Args:
        config: What the command line says.
        loaded: The model.
        names: What requests call it: its name and aliases.

    Returns:
        The exit status.
    """
    settings = _settings(config, names, eyes=loaded.eyes is not None)
    return _run(config, one_model(loaded, settings), f"Serving {loaded.description}")


def serve_several(config: Serve, configs: Sequence[tuple[str, EngineConfig]], *, eyes: bool) -> int:
    """Serve several models by name; see `serve_one`."""
    names = [name for name, _ in configs]
    limit = None if config.memory_limit is None else int(config.memory_limit * 2**30)
    models = several_models(
        configs, _settings(config, names, eyes=eyes), memory_limit=limit, load_timeout=config.load_timeout
    )
    within = "" if limit is None else f", within {config.memory_limit:g} GiB"
    return _run(config, models, f"Serving {', '.join(names)}, each loaded when it is asked for{within}")


def serve_replicas(config: Serve, name: str, engine_config: EngineConfig) -> int:
    """Serve a model with several replicas; see `serve_one`."""
    from eff_serve.replicas import started

    try:
        running = started(engine_config, config.replicas, threads=config.model.threads, address=config.ray_address)
        with running as engine:
            settings = _settings(config, config.served_model_name or (name,), eyes=False)
            banner = f"Serving {config.replicas} replicas of {engine.about.description}"
            return _run(config, replicated_model(engine, settings), banner)
    except ImportError as error:
        sys.exit(f"eff-serve: replicas need Ray Serve, pip install 'eff-serve[replicas]': {error}")
    except ValueError as error:
        sys.exit(f"eff-serve: {error}")


def _settings(config: Serve, names: Sequence[str], *, eyes: bool) -> Settings:
    try:
        keys = read_keys(config.api_key_file)
    except ValueError as error:
        sys.exit(f"eff-serve: {error}")
    if config.adapter_root is not None and not config.adapter_root.is_dir():
        sys.exit(f"eff-serve: --adapter-root {config.adapter_root} is no folder")
    if not all(name.isprintable() and name.strip() == name != "" for name in names):
        sys.exit(f"eff-serve: served-model-name {config.served_model_name} must be printable names")
    return Settings(
        model_id=names[0],
        aliases=tuple(names[1:]),
        api_keys=keys,
        hosts=LOOPBACK_HOSTS if config.host in LOOPBACK_HOSTS and not keys else None,
        cors_origins=tuple(config.cors_origins),
        adapter_root=config.adapter_root,
        max_body_bytes=(24 if eyes else 4) * 2**20,
    )


def _run(config: Serve, models: Models, banner: str) -> int:
    names = ("eff_serve", "eff_http")
    log_to_stderr(logging.INFO if config.log_requests else logging.WARNING, *names)
    server = DrainingServer(
        create_models_app(models, models.default.settings),
        host=config.host,
        port=config.port,
        grace=config.grace,
        on_open=partial(_banner, banner, config),
        on_drain=models.drain,
        on_cut=partial(models.stop, 0),
    )
    server.run()
    models.stop(0)
    return 0


def _banner(text: str, config: Serve, port: int) -> None:
    address = f"http://{config.host}:{port}"
    key = " -H 'Authorization: Bearer <key>'" if config.api_key_file else ""
    body = '{"messages": [{"role": "user", "content": "What is the capital of France?"}], "temperature": 0}'
    console = Console(soft_wrap=True, highlight=False, markup=False)
    with suppress(OSError):  # a full disk behind standard output: the server is there all the same
        console.print(text)
        console.print(f"Chat page {address}/ and OpenAI-compatible API at {address}/v1. Try:")
        console.print(f"  curl {address}/v1/chat/completions{key} -H 'Content-Type: application/json' -d '{body}'")
