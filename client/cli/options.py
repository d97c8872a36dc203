"""Arguments and options that several of the client's commands share, their help texts, and the settings they become.

In: what a user typed. Out: settings of the protocol, or a problem set; or an error that names the option.
`SamplingOptions` are the options of `sample` and `submit`. `WorkOptions` are further options of both `sample` commands,
the client's and the server's.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Annotated, Any, TypeVar

import orjson
import typer
from pydantic import BaseModel, ValidationError

from client.cli.program import as_typed, option_of
from client.contrast import DEFAULT_GAMMA, Labels
from client.errors import LightReasonerError, fault_words, shown
from client.protocol.requests import (
    BOX_SYSTEM_PROMPT,
    NO_VARIABLES,
    SYSTEM_PROMPT,
    AmateurPrompt,
    ContrastSettings,
    SamplingSettings,
)

if TYPE_CHECKING:
    from client.problems.problem_set import ProblemSet
    from client.sampling.shards import Shard

Settings = TypeVar("Settings", bound=BaseModel)

SAMPLING, CONTRAST = SamplingSettings(), ContrastSettings()
"""The protocol's defaults, which the options share."""
SOLUTIONS = SamplingSettings(n=8, temperature=0.8, max_tokens=1024, system_prompt=BOX_SYSTEM_PROMPT)
"""The defaults with --solutions."""
PROBLEM_PANEL, DECODING_PANEL, CONTRAST_PANEL = "Problems", "Trajectories", "Samples"
WORK_PANEL = "Shards, failures and outages"
"""Groups of options in --help."""

Problems = Annotated[
    str,
    typer.Argument(
        metavar="PROBLEMS",
        help="One problem a row: a .jsonl, .json, .csv or .parquet file, by path or URL; a folder of such files, a "
        "quoted glob, - for standard input, or a data set of the Hugging Face Hub, hf://NAME?config=…&split=…",
    ),
]
SOURCE = "A RUN with trajectories: a path, or a bucket's URL (s3://…, gs://…, az://…)."
TARGET = "Where to write: a path, or a bucket's URL (s3://…, gs://…, az://…)."
SourceRun = Annotated[str, typer.Argument(metavar="RUN", help=SOURCE)]
TargetRun = Annotated[str, typer.Argument(metavar="RUN", help=TARGET)]
JobId = Annotated[str, typer.Argument(metavar="JOB", help="The id that submit printed.")]

Server = Annotated[str, typer.Option(help="URL of the server.")]
Servers = Annotated[
    list[str],
    typer.Option(
        "--server",
        help="URL of a server. Repeat it for several servers of the same pair; http+dns://NAME:PORT means a server at "
        "each address of NAME.",
    ),
]
ApiKey = Annotated[
    str | None,
    typer.Option(
        envvar="LIGHTREASONER_API_KEY", show_envvar=True, show_default=False, help="API key, if the server needs one."
    ),
]

CHOICE_OF_PROBLEMS = "limit", "shuffle", "question_field", "id_field"
"""Fields of `SamplingOptions` that select problems, or say which fields of a row to read."""
CHANGED_BY_SOLUTIONS = "n", "temperature", "max_tokens", "system_prompt"
"""Fields whose defaults --solutions changes."""

ALPHA = "A token is plausible if it has at least this share of the best token's probability."
BETA = "Keep a step if its KL divergence is provably above this, in nats."
FIRST_STEP = "Never keep the steps before this one."
LABELS = (
    "Labels: contrast; expert, the expert's probabilities; tilt, the expert's probabilities moved by the contrast; or "
    "onehot, the token that it chose."
)
GAMMA = "How far --labels tilt moves the expert; 0 gives the expert's own labels."
MAX_SHIFT = "Bound labels: at most this KL divergence from the expert's own probabilities, in nats."
TEMPLATE_VARIABLES = 'Variables of the chat template, as {"enable_thinking": false}.'
KEEP_INCOMPLETE = "Also keep steps whose plausible set may be incomplete."


@dataclass(frozen=True)
class SamplingOptions:
    """The options of `sample` and `submit`: which problems to sample, how to sample them, which steps to keep."""

    limit: Annotated[
        int | None,
        typer.Option(
            min=1, rich_help_panel=PROBLEM_PANEL, help="Only the first N problems; with --shuffle, N random ones."
        ),
    ] = None
    shuffle: Annotated[
        int | None,
        typer.Option(
            metavar="SEED",
            rich_help_panel=PROBLEM_PANEL,
            help="Shuffle the problems. The same SEED gives the same order everywhere.",
        ),
    ] = None
    question_field: Annotated[
        str | None,
        typer.Option(
            rich_help_panel=PROBLEM_PANEL,
            help="The field with the question or the messages.",
            show_default="question, problem, input, Body and Question, or prompt with messages",
        ),
    ] = None
    id_field: Annotated[
        str | None,
        typer.Option(
            rich_help_panel=PROBLEM_PANEL,
            help="The field with the id, as meta.uid for a nested one. Every row must have it.",
            show_default="id; where there is none, a digest of the question",
        ),
    ] = None
    solutions: Annotated[
        bool,
        typer.Option(
            "--solutions",
            rich_help_panel=DECODING_PANEL,
            help=f"Sample whole solutions, for SFT. Unless you give them: --n {SOLUTIONS.n}, "
            f"--temperature {SOLUTIONS.temperature:g}, --max-tokens {SOLUTIONS.max_tokens}, and a system prompt that "
            "asks for a boxed answer.",
        ),
    ] = False
    n: Annotated[
        int | None,
        typer.Option(
            rich_help_panel=DECODING_PANEL,
            help="Trajectories a problem, at most 256. More than 1 needs --temperature above 0.",
            show_default=f"{SAMPLING.n}",
        ),
    ] = None
    temperature: Annotated[
        float | None,
        typer.Option(
            rich_help_panel=DECODING_PANEL,
            help="Sampling temperature; 0 is greedy.",
            show_default=f"{SAMPLING.temperature:g}",
        ),
    ] = None
    top_p: Annotated[
        float, typer.Option(rich_help_panel=DECODING_PANEL, help="Nucleus sampling, with --temperature above 0.")
    ] = SAMPLING.top_p
    seed: Annotated[
        int | None, typer.Option(rich_help_panel=DECODING_PANEL, help="Seed for --temperature above 0.")
    ] = None
    max_tokens: Annotated[
        int | None,
        typer.Option(
            rich_help_panel=DECODING_PANEL,
            help="Maximum length of a trajectory, in tokens.",
            show_default=f"{SAMPLING.max_tokens}",
        ),
    ] = None
    top_k: Annotated[
        int,
        typer.Option(
            min=1,
            rich_help_panel=DECODING_PANEL,
            help="Tokens a step that both models score; at most the server's max_logprobs.",
        ),
    ] = SAMPLING.top_k
    system_prompt: Annotated[
        str | None,
        typer.Option(
            rich_help_panel=DECODING_PANEL,
            help='System prompt; "" for none.',
            show_default=SYSTEM_PROMPT,
        ),
    ] = None
    chat_template_kwargs: Annotated[
        str | None, typer.Option(metavar="JSON", rich_help_panel=DECODING_PANEL, help=TEMPLATE_VARIABLES)
    ] = None
    stop_token_ids: Annotated[
        str | None,
        typer.Option(
            metavar="IDS",
            rich_help_panel=DECODING_PANEL,
            help="End trajectories at these token ids too, separated by commas.",
        ),
    ] = None
    amateur_prompt: Annotated[
        AmateurPrompt | None,
        typer.Option(
            rich_help_panel=DECODING_PANEL,
            help="What the amateur reads: the same prompt as the expert, or its own chat template's.",
            show_default="own if the amateur does not know the expert's chat tokens",
        ),
    ] = None
    alpha: Annotated[float, typer.Option(rich_help_panel=CONTRAST_PANEL, help=ALPHA)] = CONTRAST.alpha
    beta: Annotated[float, typer.Option(rich_help_panel=CONTRAST_PANEL, help=BETA)] = CONTRAST.beta
    first_step: Annotated[int, typer.Option(rich_help_panel=CONTRAST_PANEL, help=FIRST_STEP)] = CONTRAST.first_step
    labels: Annotated[Labels, typer.Option(rich_help_panel=CONTRAST_PANEL, help=LABELS)] = "contrast"
    gamma: Annotated[
        float | None, typer.Option(rich_help_panel=CONTRAST_PANEL, help=GAMMA, show_default=f"{DEFAULT_GAMMA:g}")
    ] = None
    max_shift: Annotated[float | None, typer.Option(metavar="NATS", rich_help_panel=CONTRAST_PANEL, help=MAX_SHIFT)] = (
        None
    )
    keep_incomplete: Annotated[
        bool, typer.Option("--keep-incomplete", rich_help_panel=CONTRAST_PANEL, help=KEEP_INCOMPLETE)
    ] = False

    @property
    def chooses(self) -> bool:
        """Whether an option selects problems of the set, or names the field of their question or id."""
        return any(getattr(self, name) is not None for name in CHOICE_OF_PROBLEMS)

    def read(self, problems: str, most: int | None = None) -> ProblemSet:
        """Read the problems: at most --limit of them, or `most` without --limit. Raises ProblemSetError."""
        from client.cli.progress import warn
        from client.problems.reader import read_problem_set

        limit = most if self.limit is None else self.limit
        return read_problem_set(
            problems,
            limit,
            question_field=self.question_field,
            id_field=self.id_field,
            shuffle=self.shuffle,
            tell=warn,
        )

    def fields(self) -> dict[str, Any]:
        """A request's fields except its problems, by the protocol's names. Raises LightReasonerError."""
        unsaid = SOLUTIONS if self.solutions else SAMPLING
        if self.solutions and self.n is None and self.temperature == 0:
            raise LightReasonerError(
                f"--solutions samples {SOLUTIONS.n} solutions a problem, and --temperature 0 makes them all the same; "
                "add --n 1, or leave out --temperature"
            )
        values = {name: value for name, value in vars(self).items() if name not in (*CHOICE_OF_PROBLEMS, "solutions")}
        values |= {name: getattr(unsaid, name) for name in CHANGED_BY_SOLUTIONS if values[name] is None}
        try:
            values["system_prompt"].encode()
        except UnicodeEncodeError:
            raise LightReasonerError(f"--system-prompt: {self.system_prompt!r} is not valid UTF-8") from None
        return values | {
            "system_prompt": values["system_prompt"] or None,
            "chat_template_kwargs": template_variables(self.chat_template_kwargs),
            "stop_token_ids": token_ids("--stop-token-ids", self.stop_token_ids),
        }

    def settings(self) -> SamplingSettings:
        """The sampling settings. Raises LightReasonerError naming the invalid option."""
        return self._checked(SamplingSettings)

    def contrast(self) -> ContrastSettings:
        """The settings for samples. Raises LightReasonerError naming the invalid option."""
        return self._checked(ContrastSettings)

    def _checked(self, model: type[Settings]) -> Settings:
        return checked(model, **{name: value for name, value in self.fields().items() if name in model.model_fields})


@dataclass(frozen=True)
class WorkOptions:
    """Options of both `sample` commands, the client's and the server's: shards, failures and outages."""

    shard: Annotated[
        str | None,
        typer.Option(
            metavar="I/N",
            rich_help_panel=WORK_PANEL,
            help="Sample only part I of N of the problems, for example 2/3; other processes sample the others.",
        ),
    ] = None
    retry_failed: Annotated[
        bool,
        typer.Option(
            "--retry-failed",
            rich_help_panel=WORK_PANEL,
            help="Also sample what failed in earlier attempts, even if RUN is complete; not together with --shard.",
        ),
    ] = False
    max_failures: Annotated[
        int | None,
        typer.Option(min=0, rich_help_panel=WORK_PANEL, help="Stop after more than this many failed trajectories."),
    ] = None
    patience: Annotated[
        float,
        typer.Option(
            min=0.0,
            rich_help_panel=WORK_PANEL,
            help="Seconds to wait for the bucket or a server: at the start until it is ready, later for any response.",
        ),
    ] = 1800.0

    def part(self) -> Shard:
        """The shard to sample; without --shard, the whole set. Raises LightReasonerError."""
        from client.sampling.shards import WHOLE_SET, Shard

        part = Shard.parse(self.shard) if self.shard else WHOLE_SET
        if self.retry_failed and part.count > 1:
            raise LightReasonerError("--retry-failed cannot be combined with --shard: one process retries all failures")
        return part


def template_variables(text: str | None) -> dict[str, Any]:
    """The value of --chat-template-kwargs. Raises LightReasonerError if it is not a JSON object of variables."""
    try:
        value = orjson.loads(text or "{}")  # rejects NaN, which JSON cannot hold
    except ValueError as error:
        raise LightReasonerError(f"--chat-template-kwargs {shown(text)} is not JSON: {error}") from None
    if not isinstance(value, dict):
        raise LightReasonerError(f"--chat-template-kwargs {shown(text)}: give a JSON object, {{NAME: VALUE, …}}")
    for name in sorted(value.keys() & NO_VARIABLES):
        raise LightReasonerError(f"--chat-template-kwargs: {name} is not a variable of a chat template; leave it out")
    return value


def token_ids(option: str, text: str | None) -> list[int]:
    """Token ids separated by commas. Raises LightReasonerError naming the option."""
    try:
        return [int(one) for one in text.split(",")] if text else []
    except ValueError:
        raise LightReasonerError(f"{option} {shown(text)}: give token ids separated by commas, as 1,2") from None


def checked(model: type[Settings], **values: Any) -> Settings:
    """Settings from options, or an error that names the option."""
    try:
        return model(**values)
    except ValidationError as error:
        first = error.errors()[0]
        said = as_typed(fault_words(first), model.model_fields)
        option = f"{option_of(str(first['loc'][0]))}: {shown(first['input'])}: " if first["loc"] else ""
        raise LightReasonerError(f"{option}{said}") from None
