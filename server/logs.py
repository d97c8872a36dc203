"""The server's log: plain lines on a terminal, JSON elsewhere, each with the id of its request or job.

`logging.json` also configures vLLM's logging, in this process and in the engines, so that vLLM's lines look the same.
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
"""The request and the job that the current task works for. A task inherits them from its creator."""

JSON_CONFIG = Path(__file__).with_name("logging.json")


class AboutFilter(logging.Filter):
    """Adds the request's and the job's id to every record."""

    def filter(self, record: logging.LogRecord) -> bool:
        for name, value in (("request_id", request_id.get()), ("job_id", job_id.get())):
            if value:
                setattr(record, name, value)
        return True


class PlainFormatter(logging.Formatter):
    """Formats a line: time, message, and the ids at the end."""

    def format(self, record: logging.LogRecord) -> str:
        ids = [str(value) for name in ("request_id", "job_id") if (value := getattr(record, name, None))]
        return super().format(record) + (f" [{' '.join(ids)}]" if ids else "")


def json_formatter() -> JsonFormatter:
    """Formats a line as a JSON object: time, level, logger, message, ids, and the call's extra fields."""
    return JsonFormatter(
        ("asctime", "levelname", "name", "message"),
        rename_fields={"asctime": "time", "levelname": "level", "name": "logger"},
        datefmt="%Y-%m-%dT%H:%M:%S%z",
    )


def configure() -> None:
    """Set up logging to stderr. Call it before vLLM is imported: vLLM reads its settings from the environment."""
    os.environ.setdefault("VLLM_LOGGING_LEVEL", "WARNING")  # else vLLM's lines hide the server's
    if sys.stderr.isatty():
        handler = logging.StreamHandler()
        handler.setFormatter(PlainFormatter("%(asctime)s %(name)s %(message)s", "%H:%M:%S"))
        handler.addFilter(AboutFilter())
        logging.basicConfig(level=logging.WARNING, handlers=[handler])
    else:
        logging.config.dictConfig(json.loads(JSON_CONFIG.read_text()))
        os.environ.setdefault("VLLM_LOGGING_CONFIG_PATH", str(JSON_CONFIG))
    logging.getLogger("lightreasoner").setLevel(logging.INFO)
