"""Running the app: key file, banner, signals, draining."""

from __future__ import annotations

import logging
import sys
from typing import TYPE_CHECKING

import uvicorn
from rich.console import Console

from eff_serve.api import Settings, create_app
from eff_serve.api.adapter import ServedTokenizer

if TYPE_CHECKING:
    from eff_serve.cli import Serve
    from eff_serve.engine import LoadedModel


def serve(config: Serve, loaded: LoadedModel) -> int:
    """Serve until SIGTERM or Ctrl-C; running answers get ``config.grace`` seconds to end. Returns the exit status."""
    keys: tuple[str, ...] = ()
    if config.api_key_file is not None:
        try:
            keys = tuple(line.strip() for line in config.api_key_file.read_text("ascii").splitlines() if line.strip())
        except (OSError, UnicodeDecodeError) as error:
            sys.exit(f"eff-serve: the key file cannot be read: {error}")
        if not keys:
            sys.exit(f"eff-serve: {config.api_key_file} holds no key")
    _log_to_stderr(logging.INFO if config.log_requests else logging.WARNING)
    loaded.engine.start()
    eos = loaded.engine.decoder.config.eos_token_ids
    app = create_app(
        loaded.engine, ServedTokenizer(loaded.tokenizer, eos), Settings(model_id=loaded.name, api_keys=keys)
    )
    uvicorn_config = uvicorn.Config(
        app, host=config.host, port=config.port, log_level="warning", timeout_graceful_shutdown=int(config.grace) + 1
    )
    server = _Server(uvicorn_config, app, loaded, config)
    server.run()
    loaded.engine.stop(0)
    return 0


class _Server(uvicorn.Server):
    """Prints the banner once the port is open; from the first signal on refuses new requests, to end with status 0."""

    def __init__(self, uvicorn_config: uvicorn.Config, app: object, loaded: LoadedModel, config: Serve) -> None:
        super().__init__(uvicorn_config)
        self._app, self._loaded, self._settings = app, loaded, config

    async def startup(self, sockets: object = None) -> None:
        """Open the port, then say where."""
        await super().startup(sockets)  # type: ignore[arg-type]
        if self.started:
            _banner(self._loaded, self._settings, self.servers[0].sockets[0].getsockname()[1])

    def handle_exit(self, sig: int, frame: object) -> None:
        """Begin to drain."""
        self._app.state.serving.drain()  # type: ignore[attr-defined]
        super().handle_exit(sig, frame)  # type: ignore[arg-type]
        self._captured_signals.clear()  # uvicorn would raise the signal once more at the end, and the process die of it


def _log_to_stderr(level: int) -> None:
    handler = logging.StreamHandler()
    handler.setFormatter(logging.Formatter("%(asctime)s %(levelname)s %(message)s"))
    logger = logging.getLogger("eff_serve")
    logger.handlers[:] = [handler]
    logger.setLevel(level)
    logger.propagate = False


def _banner(loaded: LoadedModel, config: Serve, port: int) -> None:
    address = f"http://{config.host}:{port}"
    key = " -H 'Authorization: Bearer <key>'" if config.api_key_file else ""
    body = '{"messages": [{"role": "user", "content": "What is the capital of France?"}], "temperature": 0}'
    console = Console(soft_wrap=True, highlight=False, markup=False)
    console.print(f"Serving {loaded.description}")
    console.print(f"Chat page {address}/ and OpenAI-compatible API at {address}/v1. Try:")
    console.print(f"  curl {address}/v1/chat/completions{key} -H 'Content-Type: application/json' -d '{body}'")
