"""serve: checks the pair, then serves it over HTTP until it is told to stop.

In: flags, as `server.configuration` takes them. Out: an HTTP service, and an exit status.
"""

from __future__ import annotations

import socket
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from client.cli.program import importing
from client.environment import check_temporary_folder
from client.errors import LightReasonerError, clean_lines
from server.cli.options import PairOptions, not_installed

if TYPE_CHECKING:
    from server.settings import ServerSettings

STALLED_MILLISECONDS = 60_000
"""A connection whose reader takes nothing for this long is closed."""


def serve(
    pair: PairOptions,
    host: Annotated[str | None, typer.Option(help="Address to listen on.  \\[default: 127.0.0.1]")] = None,
    port: Annotated[int | None, typer.Option(min=0, max=65535, help="Port to listen on.  \\[default: 8000]")] = None,
    bucket: Annotated[
        str | None,
        typer.Option(help="Store of jobs and their RUNs: a path, file://… or s3://bucket/prefix. Without it: no jobs."),
    ] = None,
    api_key_file: Annotated[
        Path | None,
        typer.Option(help="File of API keys, one a line. LIGHTREASONER_API_KEYS adds keys, separated by commas."),
    ] = None,
) -> None:
    """Serve an expert and an amateur over HTTP: POST problems to /v1/trajectories, get both models' log-probabilities.

    Both models are required, by flag, environment variable or configuration file. Every key of server.yaml can also
    come from the environment: LIGHTREASONER_PORT=9000, LIGHTREASONER_EXPERT__MAX_MODEL_LEN=4096 (two underscores
    before a nested key). A flag wins over a variable, and a variable wins over the file.
    """
    try:
        listen_and_serve(pair.settings(host=host, port=port, bucket=bucket, api_key_file=api_key_file))
    except LightReasonerError as error:
        sys.exit(f"error: {clean_lines(str(error))}")
    except ModuleNotFoundError as error:
        sys.exit(f"error: {not_installed(error)}")


def listen_and_serve(settings: ServerSettings) -> None:
    """Check the pair, start it and serve until told to stop. Raises LightReasonerError if the pair cannot serve."""
    from server import watchdog
    from server.api.guard import Guard, load_keys
    from server.engines import forkserver
    from server.engines.preflight import inspect_models
    from server.logs import log

    check_temporary_folder()
    keys = load_keys(settings)
    listener = listen(settings.host, settings.port)
    _watchdog = watchdog.start()  # its pipe closes with this process
    forkserver.start()  # in parallel with the imports and checks below
    settings, facts = inspect_models(settings)

    with importing():
        from server.api.app import create_app
        from server.api.serving import DrainingServer
        from server.engines.start import start_pair

    failures: list[BaseException] = []

    def stop(error: BaseException) -> None:
        failures.append(error)
        server.should_exit = True

    application = create_app(
        settings, lambda stopping: start_pair(settings, facts, stopping), stop, max(1, len(keys.names))
    )
    service = application.state.service
    limits = settings.limits
    guarded = Guard(application, keys, limits.body_bytes, lambda: service.draining, limits.all_bodies_bytes)
    server = DrainingServer(guarded, lambda: service.drain(settings.grace_seconds))
    log.info(
        "listening on http://%s:%d; the models load until /ready answers 200", settings.host, listener.getsockname()[1]
    )
    server.run(sockets=[listener])
    if failures:
        raise failures[0]


def listen(host: str, port: int) -> socket.socket:
    """A listening socket, made before any engine starts. Raises SettingsError if the address is not available."""
    from server.settings import SettingsError

    listener = socket.socket(socket.AF_INET6 if ":" in host else socket.AF_INET)
    listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
    # Connections inherit these: the kernel closes one whose peer is gone or has not taken a byte for a while.
    listener.setsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE, 1)
    listener.setsockopt(socket.IPPROTO_TCP, socket.TCP_USER_TIMEOUT, STALLED_MILLISECONDS)
    try:
        listener.bind((host, port))
        listener.listen()
    except OSError as error:
        raise SettingsError(
            f"cannot listen on {host}:{port}: {error.strerror}; choose another --port or --host"
        ) from None
    return listener
