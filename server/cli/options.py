"""The options that both commands of the server share, for the pair and its settings; and what to install for them.

In: what a user typed. Out: settings. Imports neither torch nor vLLM.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

if TYPE_CHECKING:
    from server.settings import ServerSettings


@dataclass(frozen=True)
class PairOptions:
    """Which two models, and how their engines run."""

    expert: Annotated[str | None, typer.Option(help="Expert model: a folder or a Hugging Face Hub id.")] = None
    amateur: Annotated[str | None, typer.Option(help="Weaker model with the same tokenizer.")] = None
    chat_template: Annotated[
        Path | None, typer.Option(help="Jinja file that takes the place of the expert's chat template.")
    ] = None
    config: Annotated[
        Path | None,
        typer.Option(
            help="server.yaml: vLLM engine arguments under expert: and amateur:, and host, port, bucket, limits, …"
        ),
    ] = None

    def settings(self, **flags: Any) -> ServerSettings:
        """The settings from flags, variables and file; sets up the log. Raises SettingsError."""
        from server import logs
        from server.configuration import load_settings

        logs.configure()
        pair = {"expert": self.expert, "amateur": self.amateur, "chat_template": self.chat_template}
        return load_settings(self.config, **pair, **flags)


def not_installed(error: ModuleNotFoundError) -> str:
    """The message for a missing package: what to install."""
    from client.errors import missing_extra

    return f"{missing_extra(error, 'server')} (without a GPU: the extra 'cpu')"
