"""The command line of the server: checks the pair, then serves until it is told to stop."""

from __future__ import annotations

import socket
import sys
from pathlib import Path
from typing import Annotated

import typer

from client.errors import LightReasonerError, missing_extra
from server.settings import ServerSettings, SettingsError, load_settings

STALLED_MILLISECONDS = 60_000
"""A reader that takes nothing for this long loses its connection."""

app = typer.Typer(add_completion=False, pretty_exceptions_enable=False, rich_markup_mode="rich")


@app.command()
def serve(
    expert: Annotated[str | None, typer.Option(help="The expert: a model folder or a Hugging Face Hub id.")] = None,
    amateur: Annotated[str | None, typer.Option(help="The weaker model, of the same tokenizer.")] = None,
    host: Annotated[str | None, typer.Option(help="Address to listen on.  [default: 127.0.0.1]")] = None,
    port: Annotated[int | None, typer.Option(min=0, max=65535, help="Port to listen on.  [default: 8000]")] = None,
    bucket: Annotated[
        str | None, typer.Option(help="Where jobs live and write: a path, file://… or s3://bucket/prefix.")
    ] = None,
    api_key_file: Annotated[
        Path | None, typer.Option(help="API keys, one a line; also from LIGHTREASONER_API_KEYS, comma-separated.")
    ] = None,
    config: Annotated[
        Path | None,
        typer.Option(help="server.yaml: sections expert: and amateur: of vLLM engine arguments; host, port, limits: …"),
    ] = None,
) -> None:
    """Serve an expert and an amateur: POST problems to /v1/trajectories, get both models' view of every step.

    The models come from the flags or from expert.model and amateur.model in the configuration; a flag wins.
    """
    try:
        from server import logs

        logs.configure()
        settings = load_settings(
            config, expert=expert, amateur=amateur, host=host, port=port, bucket=bucket, api_key_file=api_key_file
        )
        run(settings)
    except LightReasonerError as error:
        sys.exit(f"error: {error}")
    except ModuleNotFoundError as error:
        sys.exit(f"error: {missing_extra(error, 'server')} (or 'cpu' where there is no GPU)")


def run(settings: ServerSettings) -> None:
    """Check the pair, start it and serve. Returns when told to stop; raises LightReasonerError if it cannot."""
    from client.models.fingerprints import model_folder
    from server import watchdog
    from server.api.guard import Guard, load_keys
    from server.engines.preflight import inspect_pair
    from server.logs import log

    keys = load_keys(settings)
    listener = listen(settings.host, settings.port)
    facts = inspect_pair(model_folder(settings.expert["model"]), model_folder(settings.amateur["model"]))
    log.info("expert %s, amateur %s", facts.expert.folder, facts.amateur.folder)
    if facts.differences:
        listed = ", ".join(f"{entry.id} {entry.expert!r} / {entry.amateur!r}" for entry in facts.differences)
        log.info("added tokens that differ, unknown to the amateur (id expert / amateur): %s", listed)

    from server.api.app import create_app
    from server.api.serving import DrainingServer
    from server.engines.start import start_pair

    failures: list[BaseException] = []

    def stop(error: BaseException) -> None:
        failures.append(error)
        server.should_exit = True

    _watchdog = watchdog.start()  # its pipe closes with this process
    application = create_app(settings, lambda stopping: start_pair(settings, facts, stopping), stop)
    service = application.state.service
    guarded = Guard(application, keys, settings.limits.body_bytes, lambda: service.draining)
    server = DrainingServer(guarded, lambda: service.drain(settings.grace_seconds))
    log.info("listening on http://%s:%d, ready when /ready says so", settings.host, listener.getsockname()[1])
    server.run(sockets=[listener])
    if failures:
        raise failures[0]


def listen(host: str, port: int) -> socket.socket:
    """A bound socket, before any engine starts. Raises SettingsError where the address cannot be had."""
    listener = socket.socket(socket.AF_INET6 if ":" in host else socket.AF_INET)
    listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
    # Connections inherit these: one whose peer is gone, or has not taken a byte for a while, is ended by the kernel.
    listener.setsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE, 1)
    listener.setsockopt(socket.IPPROTO_TCP, socket.TCP_USER_TIMEOUT, STALLED_MILLISECONDS)
    try:
        listener.bind((host, port))
        listener.listen()
    except OSError as error:
        raise SettingsError(
            f"cannot listen on {host}:{port}: {error.strerror}; name another --port or --host"
        ) from None
    return listener


def main() -> None:
    app()


if __name__ == "__main__":
    main()
