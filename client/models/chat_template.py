"""Renders chat templates as transformers does, without transformers.

In: a template's source, a conversation, and the template's variables. Out: the prompt's text. Server and trainer render
every prompt here, so that the template that they use is the one whose digest they record. A template is a program from
elsewhere: it runs in jinja2's sandbox.
"""

from __future__ import annotations

import datetime
import json
from collections.abc import Callable, Mapping, Sequence
from functools import cached_property
from pathlib import Path
from typing import Any, NoReturn

from jinja2 import TemplateError, meta, nodes
from jinja2.ext import Extension
from jinja2.parser import Parser
from jinja2.sandbox import ImmutableSandboxedEnvironment

from client.errors import ModelError, shorten
from client.models.fingerprints import chat_template, template_in
from client.protocol.requests import NO_VARIABLES

SPECIAL = ("bos_token", "eos_token", "unk_token", "sep_token", "pad_token", "cls_token", "mask_token")
"""Names of special tokens that templates may use."""
GIVEN = frozenset({"strftime_now", "raise_exception", "range", "namespace", "dict", "lipsum", "cycler", "joiner"})
"""Functions that a template may call."""
REASON_SHOWN = 500
"""Most characters of a template's own error in a message."""

TRIED = "a question"
"""Message of a trial conversation, which shows how the template reads messages."""
UNFINISHED = "CONTINUE_FINAL_MESSAGE_TAG "
"""Marks the end of a message that is continued, as in transformers; a template may trim the space."""

Messages = Sequence[Mapping[str, Any]]


class Generation(Extension):
    """The tag `{% generation %}`, which marks an assistant's words for training. Its content is rendered unchanged.

    The content is a scope of its own, as in transformers, which defines the tag; jinja does not know it.
    """

    tags = {"generation"}  # noqa: RUF012 (as jinja declares it)

    def parse(self, parser: Parser) -> nodes.Node:
        line = next(parser.stream).lineno
        body = parser.parse_statements(("name:endgeneration",), drop_needle=True)
        return nodes.CallBlock(self.call_method("_written"), [], [], body).set_lineno(line)

    def _written(self, caller: Callable[[], str]) -> str:
        return caller()


class ChatTemplate:
    """The default chat template of a model folder, or a template file in its place.

    Raises ModelError if there is no template, or if it is invalid.
    """

    def __init__(self, folder: Path, file: Path | None = None, tokens: Mapping[str, str] | None = None) -> None:
        """`file`: a template in place of the folder's. `tokens`: special tokens by name, if already known."""
        source = template_in(file) if file else chat_template(folder)
        if not source:
            raise ModelError(
                f"{file or folder} has no chat template, so its prompts are unknown; add chat_template.jinja to the"
                " model folder, or give --chat-template FILE"
            )
        self.name = str(file or f"the chat template of {folder}")
        self._tokens = dict(_special_tokens(folder) if tokens is None else tokens)
        environment = ImmutableSandboxedEnvironment(
            trim_blocks=True, lstrip_blocks=True, extensions=[Generation, "jinja2.ext.loopcontrols"]
        )
        environment.filters["tojson"] = _as_json
        environment.globals["raise_exception"] = _refuse
        try:
            self._template = environment.from_string(source)
            named = meta.find_undeclared_variables(environment.parse(source))
        except TemplateError as error:
            raise ModelError(f"{self.name} cannot be read as a chat template: {error}") from None
        self.writes_date = "strftime_now" in named
        """Whether prompts depend on the date."""
        self.variables = sorted(named - GIVEN - NO_VARIABLES - {*SPECIAL, *self._tokens})
        """Names of variables that the template takes, as `enable_thinking`."""

    def render(
        self,
        system_prompt: str | None,
        question: str,
        variables: Mapping[str, Any] | None = None,
        date: str | None = None,
    ) -> str:
        """Render a question to a prompt, with `prompt`."""
        system: Messages = [{"role": "system", "content": system_prompt}] if system_prompt else []
        return self.prompt([*system, {"role": "user", "content": question}], variables, date)

    def prompt(self, messages: Messages, variables: Mapping[str, Any] | None = None, date: str | None = None) -> str:
        """Render a conversation up to where the answer begins; it continues a last message of the assistant.

        `date`: the day that the template writes; None: today. Raises ModelError, with the remedy, if the template
        rejects the conversation.
        """
        *before, last = messages
        unfinished = last["role"] == "assistant"
        asked = [*before, {**last, "content": last["content"] + UNFINISHED}] if unfinished else messages
        try:
            text = self.conversation(asked, not unfinished, variables, date)
        except Exception as error:  # a template is a program: it may raise anything
            remedy = "change the template, or what is given to it (--chat-template-kwargs, --system-prompt)"
            if messages[0]["role"] == "system" and self._renders(asked[1:], not unfinished, variables, date):
                remedy = 'it takes no system prompt: give --system-prompt "" (over HTTP: "system_prompt": null)'
            raise ModelError(f"{self.name} rejects the prompt: {shorten(str(error), REASON_SHOWN)}; {remedy}") from None
        if unfinished:
            text, mark, rest = text.rpartition(UNFINISHED.strip())
            if not mark:
                raise ModelError(f"{self.name} does not end in an assistant's last message, so it cannot be continued")
            text = text if rest.startswith(" ") else text.rstrip()  # as transformers does where the template trims
        if not text:
            raise ModelError(f"{self.name} renders the question to nothing; use another")
        return text

    def conversation(
        self,
        messages: Messages,
        add_generation_prompt: bool,
        variables: Mapping[str, Any] | None = None,
        date: str | None = None,
    ) -> str:
        """Render a conversation with the template. Raises whatever the template raises."""
        day = datetime.datetime.fromisoformat(date) if date else datetime.datetime.now()
        given = {"tools": None, "documents": None, "strftime_now": day.strftime} | self._tokens | dict(variables or {})
        if self._reads_parts:
            messages = [{**message, "content": _parts(message["content"])} for message in messages]
        return self._template.render(given, messages=messages, add_generation_prompt=add_generation_prompt)

    @cached_property
    def _reads_parts(self) -> bool:
        """Whether the template reads a message only as a list of parts, and drops plain text.

        Templates of models that read images do so (LLaVA).
        """

        def written(content: Any) -> str:
            try:
                asked = [{"role": "user", "content": content}]
                text = self._template.render(self._tokens, messages=asked, add_generation_prompt=True)
            except Exception:  # a template is a program: it may raise anything
                return ""
            return text if TRIED in text and "'type'" not in text else ""  # 'type': it wrote the list itself

        return bool(not written(TRIED) and written(_parts(TRIED)))

    def _renders(self, messages: Messages, *how: Any) -> bool:
        try:
            return bool(self.conversation(messages, *how))
        except Exception:
            return False


def _parts(text: str) -> list[dict[str, str]]:
    return [{"type": "text", "text": text}]


def _special_tokens(folder: Path) -> dict[str, str]:
    """Special tokens by name, from tokenizer_config.json; early versions wrote some to special_tokens_map.json."""
    config = _json_of(folder / "tokenizer_config.json")
    if "added_tokens_decoder" not in config:
        config |= _json_of(folder / "special_tokens_map.json")
    own = config.get("extra_special_tokens")  # by the model's own names, as image_token
    try:
        named = {name: config.get(name) for name in SPECIAL} | (own if isinstance(own, dict) else {})
        return {name: token["content"] if isinstance(token, dict) else token for name, token in named.items() if token}
    except KeyError as error:
        raise ModelError(f"{folder}: a special token has no {error}; copy the tokenizer's files again") from None


def _json_of(file: Path) -> dict[str, Any]:
    try:
        return dict(json.loads(file.read_bytes())) if file.is_file() else {}
    except (ValueError, TypeError) as error:
        raise ModelError(f"{file} cannot be read ({error!r}); copy the expert's again") from None


def _as_json(value: Any, ensure_ascii: bool = False, indent: Any = None, separators: Any = None,
             sort_keys: bool = False) -> str:  # fmt: skip
    return json.dumps(value, ensure_ascii=ensure_ascii, indent=indent, separators=separators, sort_keys=sort_keys)


def _refuse(message: str) -> NoReturn:
    raise TemplateError(message)
