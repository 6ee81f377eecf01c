"""Running the app: key file, banner, signals, draining."""

from __future__ import annotations

import logging
import sys
from functools import partial
from typing import TYPE_CHECKING

from eff_http import LOOPBACK_HOSTS, DrainingServer, log_to_stderr, read_keys
from rich.console import Console

from eff_serve.api import Settings, create_app
from eff_serve.api.adapter import ServedTokenizer

if TYPE_CHECKING:
    from eff_serve.cli import Serve
    from eff_serve.engine import LoadedModel


def serve(config: Serve, loaded: LoadedModel) -> int:
    """Serve until SIGTERM or Ctrl-C; running answers get ``config.grace`` seconds to end. Returns the exit status."""
    try:
        keys = read_keys(config.api_key_file)
    except ValueError as error:
        sys.exit(f"eff-serve: {error}")
    if config.adapter_root is not None and not config.adapter_root.is_dir():
        sys.exit(f"eff-serve: --adapter-root {config.adapter_root} is no folder")
    name, *aliases = config.served_model_name or (loaded.name,)
    if not all(given.isprintable() and given.strip() == given != "" for given in (name, *aliases)):
        sys.exit(f"eff-serve: served-model-name {config.served_model_name} must be printable names")
    log_to_stderr(logging.INFO if config.log_requests else logging.WARNING, "eff_serve", "eff_http")
    loaded.engine.start()
    eos = loaded.engine.decoder.config.eos_token_ids
    settings = Settings(
        model_id=name,
        aliases=tuple(aliases),
        family=loaded.engine.decoder.config.architecture.removesuffix("ForCausalLM").lower(),
        quantization=loaded.quantization,
        weight_bytes=loaded.engine.decoder.weight_bytes,
        fingerprint=loaded.fingerprint,
        api_keys=keys,
        hosts=LOOPBACK_HOSTS if config.host in LOOPBACK_HOSTS and not keys else None,
        cors_origins=tuple(config.cors_origins),
        adapter_root=config.adapter_root,
        max_body_bytes=(4 if loaded.eyes is None else 24) * 2**20,
    )
    app = create_app(loaded.engine, ServedTokenizer(loaded.tokenizer, eos), settings, loaded.eyes)
    server = DrainingServer(
        app,
        host=config.host,
        port=config.port,
        grace=config.grace,
        on_open=partial(_banner, loaded, config),
        on_drain=app.state.serving.drain,
        on_cut=partial(loaded.engine.stop, 0),
    )
    server.run()
    loaded.engine.stop(0)
    return 0


def _banner(loaded: LoadedModel, config: Serve, port: int) -> None:
    address = f"http://{config.host}:{port}"
    key = " -H 'Authorization: Bearer <key>'" if config.api_key_file else ""
    body = '{"messages": [{"role": "user", "content": "What is the capital of France?"}], "temperature": 0}'
    console = Console(soft_wrap=True, highlight=False, markup=False)
    console.print(f"Serving {loaded.description}")
    console.print(f"Chat page {address}/ and OpenAI-compatible API at {address}/v1. Try:")
    console.print(f"  curl {address}/v1/chat/completions{key} -H 'Content-Type: application/json' -d '{body}'")
