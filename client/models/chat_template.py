"""Renders a chat template as transformers does, without transformers.

In: a model folder's template and messages. Out: the prompt's text. A template is a program of somebody else: it runs
in jinja2's sandbox.
"""

from __future__ import annotations

import json
from datetime import datetime
from pathlib import Path
from typing import Any, NoReturn

from jinja2 import TemplateError
from jinja2.sandbox import ImmutableSandboxedEnvironment

from client.errors import ModelError
from client.models.fingerprints import chat_template

SPECIAL = ("bos_token", "eos_token", "unk_token", "sep_token", "pad_token", "cls_token", "mask_token")
"""Names of special tokens that templates may use, from tokenizer_config.json."""


class ChatTemplate:
    """The default chat template of a model folder. Raises ModelError if there is none, or it is invalid."""

    def __init__(self, folder: Path) -> None:
        source = chat_template(folder)
        if not source:
            raise ModelError(f"{folder} has no chat template, so its prompts are unknown; add chat_template.jinja")
        self._folder = folder
        self._tokens = _special_tokens(folder)
        environment = ImmutableSandboxedEnvironment(
            trim_blocks=True, lstrip_blocks=True, extensions=["jinja2.ext.loopcontrols"]
        )
        environment.filters["tojson"] = lambda value, **kwargs: json.dumps(value, ensure_ascii=False, **kwargs)
        environment.globals |= {"raise_exception": _refuse, "strftime_now": lambda form: datetime.now().strftime(form)}
        try:
            self._template = environment.from_string(source)
        except TemplateError as error:
            raise ModelError(f"the chat template of {folder} cannot be read: {error}") from None

    def render(self, system_prompt: str, question: str) -> str:
        """The prompt of a question, up to where the answer begins."""
        messages = [{"role": "system", "content": system_prompt}, {"role": "user", "content": question}]
        try:
            return self._template.render(messages=messages, add_generation_prompt=True, **self._tokens)
        except Exception as error:  # a template is a program: it may raise anything
            raise ModelError(f"the chat template of {self._folder} rejects the prompt: {error}") from None


def _special_tokens(folder: Path) -> dict[str, str]:
    file = folder / "tokenizer_config.json"
    try:
        config: dict[str, Any] = json.loads(file.read_bytes()) if file.is_file() else {}
        named = {name: config.get(name) for name in SPECIAL}
        return {name: token["content"] if isinstance(token, dict) else token for name, token in named.items() if token}
    except (ValueError, AttributeError, KeyError) as error:
        raise ModelError(f"{file} cannot be read ({error!r}); copy the expert's again") from None


def _refuse(message: str) -> NoReturn:
    raise TemplateError(message)
