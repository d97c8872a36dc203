"""The server's log: plain lines on a terminal, JSON elsewhere, with the request or job that a line is about.

vLLM's own lines, in this process and in its engines', take the same form: its logging is configured by the same file.
"""

from __future__ import annotations

import json
import logging
import logging.config
import os
import sys
from contextvars import ContextVar
from pathlib import Path

from pythonjsonlogger.json import JsonFormatter

log = logging.getLogger("lightreasoner.server")

request_id: ContextVar[str | None] = ContextVar("request_id", default=None)
job_id: ContextVar[str | None] = ContextVar("job_id", default=None)
"""What the running task works for; a task inherits it from the one that made it."""

JSON_CONFIG = Path(__file__).with_name("logging.json")


class AboutFilter(logging.Filter):
    """Puts the request's and the job's id on every record."""

    def filter(self, record: logging.LogRecord) -> bool:
        for name, value in (("request_id", request_id.get()), ("job_id", job_id.get())):
            if value:
                setattr(record, name, value)
        return True


class PlainFormatter(logging.Formatter):
    """Time, what happened, and the ids at the end."""

    def format(self, record: logging.LogRecord) -> str:
        ids = [str(value) for name in ("request_id", "job_id") if (value := getattr(record, name, None))]
        return super().format(record) + (f" [{' '.join(ids)}]" if ids else "")


def json_formatter() -> JsonFormatter:
    """A JSON object a line: time, level, logger, message, ids, and what the call adds."""
    return JsonFormatter(
        ("asctime", "levelname", "name", "message"),
        rename_fields={"asctime": "time", "levelname": "level", "name": "logger"},
        datefmt="%Y-%m-%dT%H:%M:%S%z",
    )


def configure() -> None:
    """Set up logging to stderr; before vLLM is imported, which takes its part from the environment."""
    os.environ.setdefault("VLLM_LOGGING_LEVEL", "WARNING")  # what the server says must not drown in what vLLM says
    if sys.stderr.isatty():
        handler = logging.StreamHandler()
        handler.setFormatter(PlainFormatter("%(asctime)s %(name)s %(message)s", "%H:%M:%S"))
        handler.addFilter(AboutFilter())
        logging.basicConfig(level=logging.WARNING, handlers=[handler])
    else:
        logging.config.dictConfig(json.loads(JSON_CONFIG.read_text()))
        os.environ.setdefault("VLLM_LOGGING_CONFIG_PATH", str(JSON_CONFIG))
    logging.getLogger("lightreasoner").setLevel(logging.INFO)
