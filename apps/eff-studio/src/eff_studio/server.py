"""Running the server: model, worker, port, and a clean end."""

from __future__ import annotations

import importlib.util
import logging
import sys
from collections.abc import Callable
from functools import partial
from typing import TYPE_CHECKING, Any

from eff_http import LOOPBACK_HOSTS, DrainingServer, log_to_stderr, read_keys
from rich.console import Console

from eff_studio.api import ServerSettings, create_app
from eff_studio.engine import run_work
from eff_studio.engine.model import device_for
from eff_studio.store import Jobs, Pictures
from eff_studio.worker import Drawer, Worker

if TYPE_CHECKING:
    from eff_studio.cli import Serve
    from eff_studio.engine import Result


def serve(config: Serve) -> int:
    """Serve until a signal comes; a job under way then waits for the next start."""
    if config.replicas < 1:
        sys.exit(f"eff-studio: replicas={config.replicas}; wanted 1 or more")
    if config.replicas == 1 and config.ray_address is None:
        model = config.model.load()
        return _serve(config, model, f"{model.name} on {model.pipe.device}", run=partial(run_work, model))
    if importlib.util.find_spec("ray") is None:
        sys.exit("eff-studio: several replicas need Ray Serve; install eff-studio[replicas]")
    from eff_studio.replicas import started

    gpus = int(device_for(config.model.device).startswith("cuda"))
    with started(config.model.load, config.replicas, address=config.ray_address, gpus=gpus) as replicas:
        title = f"{replicas.count} replicas of {replicas.name} on {replicas.device}"
        return _serve(config, replicas, title, run=replicas.run, lanes=replicas.count)


def _serve(config: Serve, model: Drawer, title: str, *, run: Callable[..., Result], lanes: int = 1) -> int:
    data = config.model.folder
    log_to_stderr(logging.INFO, "eff_studio", "eff_http")
    try:
        keys = read_keys(config.api_key_file)
        worker = Worker(model, Jobs(data / "studio.db"), Pictures(data / "pictures"), run=run, lanes=lanes)
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
        on_open=partial(_banner, title, model.facts(), config.host),
        on_drain=drain,
        on_cut=partial(worker.stop, 0.0),
    )
    server.run()
    worker.stop()
    worker.jobs.close()
    return 0


def _banner(title: str, facts: dict[str, Any], host: str, port: int) -> None:
    console = Console(soft_wrap=True, highlight=False, markup=False)
    address = f"http://{host}:{port}"
    console.print(f"Drawing with {title}, {facts['width']} x {facts['height']} points")
    console.print(f"Page at {address}/ and OpenAI's image API at {address}/v1")
