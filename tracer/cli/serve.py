"""``tracer serve``: a page with questions to a store, and the same answers as JSON."""

from __future__ import annotations

import importlib
import socket
from typing import Any

import click

from tracer._core.validation import check_device
from tracer.cli.app import ExampleCommand
from tracer.cli.stores import find_store
from tracer.errors import MissingDependencyError
from tracer.store import Store

LOOPBACK = ("127.0.0.1", "localhost", "::1")


def _imported(name: str) -> Any:
    """Import a module that needs the extra, or raise MissingDependencyError."""
    try:
        return importlib.import_module(name)
    except ImportError as error:
        raise MissingDependencyError("tracer serve needs FastAPI and uvicorn: pip install 'tracin[serve]'") from error


@click.command("serve", cls=ExampleCommand)
@click.argument("store")
@click.option("--host", default=LOOPBACK[0], show_default=True, help="The address to listen on.")
@click.option(
    "--port", type=click.IntRange(0, 65535), default=8765, show_default=True, help="The port; 0 takes any free one."
)
@click.option("--device", default="cpu", show_default=True, help="Device to compute on, such as cuda:0.")
def serve(store: str, host: str, port: int, device: str) -> None:
    """Serve a page with questions to a store, and the same answers as JSON.

    Several people can ask at once. A new question is computed part by part, with its progress, and can be cancelled;
    answers stay in the store. Only this machine can connect, unless --host names another address: there is no password,
    so whoever can connect can read scores and labels. Nothing but the store is read. STORE is a store's directory or
    URL, or the TOML file of its run. Needs pip install 'tracin[serve]'; Ctrl-C stops it.

    Examples:
        tracer serve runs/first
        curl 'http://127.0.0.1:8765/api/top?target=3&k=5&estimator=influence'
    """
    serving, uvicorn = (_imported(name) for name in ("tracer.cli.serving", "uvicorn"))
    opened = Store.open_existing(find_store(store)[0])
    hosts = [*LOOPBACK, host] if host not in ("0.0.0.0", "::") else ["*"]
    app = serving.make_app(opened, check_device(device), hosts)
    config = uvicorn.Config(app, log_level="warning", timeout_graceful_shutdown=2)
    with socket.create_server((host, port), family=socket.AF_INET6 if ":" in host else socket.AF_INET) as listening:
        shown = f"[{host}]" if ":" in host else host
        click.echo(f"Serving {opened.path} at http://{shown}:{listening.getsockname()[1]}/ (Ctrl-C stops)")
        uvicorn.Server(config).run([listening])
