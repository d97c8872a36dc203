"""What the command lines of all three programs share: --version, shell completion, help that wraps to the terminal.

In: command functions for typer. Out: a `Program`. Imports nothing heavy, because a shell starts the program for each
completion.
"""

from __future__ import annotations

import contextlib
import functools
import gc
import inspect
import re
import signal
import sys
from collections.abc import Callable, Collection, Iterator
from contextvars import ContextVar
from dataclasses import MISSING, fields, is_dataclass
from typing import Annotated, Any, get_type_hints

import typer
from typer.core import TyperCommand, TyperGroup

from client.cli import stop_loading
from client.environment import check_temporary_folder
from client.errors import LightReasonerError

PACKAGE = "lightreasoner"
Function = Callable[..., Any]
EMPTY = inspect.Parameter.empty
"""The default of a required parameter."""


def _print_version(wanted: bool) -> None:
    if wanted:
        from importlib.metadata import version

        print(PACKAGE, version(PACKAGE))
        raise typer.Exit()


Version = Annotated[
    bool, typer.Option("--version", is_eager=True, callback=_print_version, help="Print the version and exit.")
]


@contextlib.contextmanager
def importing() -> Iterator[None]:
    """For imports of torch and vLLM. Raises LightReasonerError without a folder for temporary files: both need one.

    Garbage collection is off meanwhile, because imports leave no garbage. This saves a sixth of the time.
    """
    check_temporary_folder()
    searching = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        if searching:
            gc.enable()


class Program(typer.Typer):
    """A command line, or a part of one.

    `help` describes a program of several commands. Such a program has --version, and so has every command.
    """

    def __init__(self, help: str | None = None) -> None:
        super().__init__(
            cls=_Group, help=help, no_args_is_help=help is not None, pretty_exceptions_enable=False,
            rich_markup_mode="rich",
        )  # fmt: skip
        if help is not None:
            self.callback(help=help)(_with_version)

    def __call__(self, *words: Any, **options: Any) -> Any:
        """Run the command that the user typed. From here on Ctrl-C raises KeyboardInterrupt, Python's default."""
        if signal.getsignal(signal.SIGINT) is stop_loading:
            signal.signal(signal.SIGINT, signal.default_int_handler)
        return super().__call__(*words, **options)

    def command(self, name: str | None = None, **options: Any) -> Callable[[Function], Function]:  # type: ignore[override]
        """Register a command. Its docstring becomes its help; fields of a dataclass parameter become options."""

        def register(function: Function) -> Function:
            help = flowing(function.__doc__ or "")
            super(Program, self).command(name, cls=_Command, help=help, **options)(spread(function))
            return function

        return register

    def default(self, function: Function) -> None:
        """Register the command that runs if the user names none. The program's own help shows its options."""
        command = spread(function)
        inner = inspect.signature(command).parameters.values()

        def alone(context: typer.Context, **values: Any) -> None:
            if context.invoked_subcommand is None:
                return command(**values)
            for name in values:
                if (source := context.get_parameter_source(name)) and source.name == "COMMANDLINE":
                    option, word = f"--{name.replace('_', '-')}", context.invoked_subcommand
                    raise typer.BadParameter(f"name the command first: {word} {option} …", param_hint=option)

        own = inspect.Parameter("context", inspect.Parameter.KEYWORD_ONLY, annotation=typer.Context)
        alone.__annotations__ = {parameter.name: parameter.annotation for parameter in (own, *inner)}
        alone.__signature__ = inspect.Signature([own, *inner])  # type: ignore[attr-defined]
        self.callback(
            invoke_without_command=True,
            help=flowing(function.__doc__ or ""),
            subcommand_metavar="[COMMAND] [ARGS]...",
        )(alone)
        self.command()(function)


class _PlainWords:
    """Base of commands and programs: the help shows no type for flags, and errors avoid pydantic's wording."""

    def get_params(self, ctx: Any) -> list[Any]:
        params: list[Any] = super().get_params(ctx)  # type: ignore[misc]
        for param in params:
            if getattr(param, "is_flag", False):
                param.metavar = ""
            if isinstance(words := getattr(param, "show_default", None), str):
                param._get_default_string = functools.partial(_as_written, words)
        return params

    def parse_args(self, ctx: Any, args: list[str]) -> list[str]:
        try:
            return super().parse_args(ctx, args)  # type: ignore[misc, no-any-return]
        except typer.BadParameter as error:
            from pydantic import ValidationError

            from client.errors import fault_words, shown

            if isinstance(error.__cause__, ValidationError):
                fault = error.__cause__.errors()[0]
                said = fault_words(fault)
                error.message = said if fault["type"] == "value_error" else f"{shown(fault['input'])}: {said}"
            raise


def _as_written(words: str, **_: Any) -> str:
    """A default in words, without the brackets that typer adds."""
    return words


class _Group(_PlainWords, TyperGroup):
    """A program of several commands."""


class _Command(_PlainWords, TyperCommand):
    """A command whose usage line shows an argument as PROBLEMS, where typer writes {PROBLEMS}."""

    def collect_usage_pieces(self, ctx: Any) -> list[str]:
        return [piece.replace("{", "").replace("}", "") for piece in super().collect_usage_pieces(ctx)]

    def invoke(self, ctx: Any) -> Any:
        before = _RUNNING.set(self)
        try:
            return super().invoke(ctx)
        except LightReasonerError as error:
            error.args = (as_typed(str(error)),)
            raise
        except KeyboardInterrupt:
            print("\nstopped", file=sys.stderr)
            raise
        finally:
            _RUNNING.reset(before)


_RUNNING: ContextVar[_Command | None] = ContextVar("running", default=None)
"""The running command."""


def option_of(field: str) -> str:
    """The option or argument for a field of a request: --max-shift for max_shift, RUN for run."""
    return _options().get(field, f"--{field.replace('_', '-')}")


def as_typed(text: str, fields: Collection[str] = ()) -> str:
    """An error's text with the command's options in place of field names: --max-shift for max_shift.

    A name that is also a plain word, as keep, is replaced only before its value, as in `keep: 0.1 against 0.2`, or if
    it is one of `fields`. Quoted text is not changed: it is not ours.
    """
    options = {name: typed for name, typed in _options().items() if typed.startswith("--")}
    if not options:
        return text
    sure = "|".join(name for name in options if "_" in name or name in fields)
    quoted = r"(?<!\w)'[^'\n]*'|\"[^\"\n]*\""
    alone = rf"(?<![\w.=/-])(?:decoding\.)?({sure or '(?!)'})(?![\w=/-]|\.\w)"
    valued = rf"(?:^|(?<=[:;] )|(?<=\n  ))(?:decoding\.|lora\.)?({'|'.join(options)})(?=: |[^;]* there, )"
    return re.sub(f"{quoted}|{alone}|{valued}", lambda found: options.get(found[1] or found[2], found[0]), text)


def _options() -> dict[str, str]:
    """The option or argument for each parameter of the running command."""
    command = _RUNNING.get()
    return {
        param.name: max(param.opts, key=len) if param.param_type_name == "option" else param.metavar or param.name
        for param in (command.params if command else ())
        if param.name and not param.is_eager
    }


def _with_version(version: Version = False) -> None:
    """The callback of a program of several commands: it takes --version before a command's name."""


def flowing(docstring: str) -> str:
    """Join each paragraph to one line, so that the terminal decides where lines break."""
    return "\n\n".join(" ".join(paragraph.split()) for paragraph in inspect.cleandoc(docstring).split("\n\n"))


def spread(function: Function) -> Function:
    """The same command with --version, and with one keyword for each field of a dataclass parameter."""
    parameters: list[inspect.Parameter] = []
    groups: dict[str, type] = {}
    for parameter in inspect.signature(function, eval_str=True).parameters.values():
        if is_dataclass(group := parameter.annotation) and isinstance(group, type):
            groups[parameter.name] = group
            types = get_type_hints(group, include_extras=True)
            taken = [
                (field.name, EMPTY if field.default is MISSING else field.default, types[field.name])
                for field in fields(group)
            ]
        else:
            taken = [(parameter.name, parameter.default, parameter.annotation)]
        parameters += [
            inspect.Parameter(name, inspect.Parameter.KEYWORD_ONLY, default=default, annotation=annotation)
            for name, default, annotation in taken
        ]
    parameters.append(inspect.Parameter("version", inspect.Parameter.KEYWORD_ONLY, default=False, annotation=Version))

    @functools.wraps(function)
    def gathered(version: bool = False, **values: Any) -> Any:
        for name, group in groups.items():
            values[name] = group(**{field.name: values.pop(field.name) for field in fields(group)})
        return function(**values)

    gathered.__annotations__ = {parameter.name: parameter.annotation for parameter in parameters}
    gathered.__signature__ = inspect.Signature(parameters)  # type: ignore[attr-defined]
    return gathered
