"""Running the server: model, worker, port, and a clean end."""

from __future__ import annotations

import logging
import sys
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING

from eff_http import LOOPBACK_HOSTS, DrainingServer, log_to_stderr, read_keys
from rich.console import Console

from eff_studio.api import ServerSettings, create_app
from eff_studio.engine import StudioModel
from eff_studio.store import Jobs, Pictures
from eff_studio.worker import Worker

if TYPE_CHECKING:
    from eff_studio.cli import Serve


def serve(config: Serve, model: StudioModel, data: Path) -> int:
    """Serve until a signal comes; a job under way then waits for the next start."""
    log_to_stderr(logging.INFO, "eff_studio", "eff_http")
    try:
        keys = read_keys(config.api_key_file)
        worker = Worker(model, Jobs(data / "studio.db"), Pictures(data / "pictures"))
    except ValueError as error:
        sys.exit(f"eff-studio: {error}")
    settings = ServerSettings(
        api_keys=keys,
        hosts=LOOPBACK_HOSTS if config.host in LOOPBACK_HOSTS and not keys else None,
        max_waiting=config.max_waiting,
    )
    app = create_app(worker, settings)
    worker.start()

    def drain() -> None:
        app.state.studio.draining = True

    server = DrainingServer(
        app,
        host=config.host,
        port=config.port,
        grace=config.grace,
        on_open=partial(_banner, model, config.host),
        on_drain=drain,
        on_cut=partial(worker.stop, 0.0),
    )
    server.run()
    worker.stop()
    worker.jobs.close()
    return 0


def _banner(model: StudioModel, host: str, port: int) -> None:
    console = Console(soft_wrap=True, highlight=False, markup=False)
    address = f"http://{host}:{port}"
    console.print(f"Drawing with {model.name} on {model.pipe.device}, {model.width} x {model.height} points")
    console.print(f"Page at {address}/ and OpenAI's image API at {address}/v1")
