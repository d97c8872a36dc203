"""Options that several of the client's commands share, and how their values are checked."""

from __future__ import annotations

from typing import Annotated, Any, TypeVar

import typer
from pydantic import BaseModel, ValidationError

from client.errors import LightReasonerError

Settings = TypeVar("Settings", bound=BaseModel)

Server = Annotated[str, typer.Option(help="The server's URL.")]
Servers = Annotated[
    list[str],
    typer.Option("--server", help="A server's URL; given again for each of several that serve the same pair."),
]
ApiKey = Annotated[
    str | None,
    typer.Option(
        envvar="LIGHTREASONER_API_KEY", show_envvar=True, show_default=False, help="Where the server asks for one."
    ),
]
Limit = Annotated[int | None, typer.Option(min=1, help="Only the first N problems; of a shuffled set, N at random.")]
Shuffle = Annotated[
    int | None, typer.Option(metavar="SEED", help="Ask in an order drawn by SEED, the same in every client.")
]
QuestionField = Annotated[
    str | None,
    typer.Option(help="What the question is called, where not question, problem, input, or Body and Question."),
]
N = Annotated[int, typer.Option(help="Trajectories a problem; more than 1 needs a temperature.")]
Temperature = Annotated[float, typer.Option(help="0 is greedy.")]
TopP = Annotated[float, typer.Option(help="Nucleus sampling, with a temperature.")]
Seed = Annotated[int | None, typer.Option(help="Makes sampling with a temperature repeatable.")]
MaxTokens = Annotated[int, typer.Option(help="Longest trajectory.")]
TopK = Annotated[int, typer.Option(min=1, help="Ids a step that both models score.")]
Alpha = Annotated[float, typer.Option(help="Plausible: at least this share of the best token's probability.")]
Beta = Annotated[float, typer.Option(help="A step is kept when its KL, in nats, is proved to be above this.")]
FirstStep = Annotated[int, typer.Option(help="Steps before this one are never kept.")]
KeepIncomplete = Annotated[
    bool, typer.Option("--keep-incomplete", help="Also keep steps whose plausible set is not proved whole.")
]
Patience = Annotated[
    float,
    typer.Option(min=0.0, help="Give up when servers, or the bucket, have answered nothing for this many seconds."),
]
SystemPrompt = Annotated[str, typer.Option(help="Empty: none.")]


def checked(model: type[Settings], **values: Any) -> Settings:
    """Settings from options, or an error that names the option."""
    try:
        return model(**values)
    except ValidationError as error:
        first = error.errors()[0]
        option = f"--{str(first['loc'][0]).replace('_', '-')}: " if first["loc"] else ""
        raise LightReasonerError(f"{option}{first['msg'].removeprefix('Value error, ')}") from None


def check_text(option: str, value: str) -> None:
    """Raises LightReasonerError naming the option whose text cannot be sent."""
    try:
        value.encode()
    except UnicodeEncodeError:
        raise LightReasonerError(f"{option}: {value!r} is not valid UTF-8") from None
