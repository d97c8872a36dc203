"""Where a trajectory ends: at the tokenizer's end token, the generation config's, and the chat template's end of turn.

In: end tokens in a model's files, and its chat template. Out: token ids. A base model's tokenizer and generation config
often name `<|endoftext|>` alone, while its template closes every turn with another token. Such a model closes its turn
and continues, unless it is stopped there.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from itertools import takewhile
from typing import Any

from client.models.chat_template import ChatTemplate, Messages

USER, ASSISTANT, NEXT = "first-question", "first-answer", "second-question"
"""Messages of a trial conversation, which shows what the template writes between them. No template contains these
words."""


def end_token_ids(
    end_token: int | None,
    configured: int | Sequence[int] | None,
    template: ChatTemplate | None,
    added: Mapping[str, int],
) -> list[int]:
    """Every token id that ends a trajectory, in ascending order.

    Args:
        end_token: the tokenizer's end token. configured: eos_token_id of the generation config. added: the tokenizer's
        added tokens and their ids.
    """
    turn = end_of_turn(template, added) if template else None
    listed = configured if isinstance(configured, Sequence) else [configured]
    return sorted({index for index in (end_token, *listed, turn) if index is not None and index >= 0})  # -1: none


def end_of_turn(template: ChatTemplate, added: Mapping[str, int]) -> int | None:
    """The id of the token that closes an assistant's turn; None if no added token closes it.

    The template writes tokens after an answer, at the conversation's end and before a next question. Their common
    beginning closes the turn, and its last token is returned. Without a common beginning, the first token at the
    conversation's end is returned: before a next question, a template may close a message within a turn instead
    (gpt-oss).

    If the template writes no generation prompt, the first of these tokens is returned, unless it opens a question.
    """
    longest_first = sorted(filter(str.strip, added), key=len, reverse=True)  # some are nothing but spaces
    if not longest_first:
        return None
    tokens_in = re.compile("|".join(map(re.escape, longest_first))).findall
    asked, answered = [_user(USER)], [_user(USER), {"role": "assistant", "content": ASSISTANT}]
    told, prompt = _rendered(template, asked, False), _rendered(template, asked, True)
    before = tokens_in(prompt.partition(USER)[0])
    at_end = tokens_in(_rendered(template, answered, False).partition(ASSISTANT)[2])
    between = _rendered(template, [*answered, _user(NEXT)], False).partition(ASSISTANT)[2]
    in_middle = tokens_in(between.partition(NEXT)[0])
    shared = [one for one, _ in takewhile(lambda pair: pair[0] == pair[1], zip(at_end, in_middle, strict=False))]
    waits = told and prompt.startswith(told) and prompt != told  # so the end does not open an answer
    if waits and at_end:
        return added[shared[-1] if shared else at_end[0]]
    found = shared or in_middle or at_end
    return added[found[0]] if found and not _opens(found[0], in_middle, before) else None


def _opens(token: str, in_middle: list[str], before: list[str]) -> bool:
    """Whether a token opens a question: it stands before the first question, too."""
    first, rest = before[: -len(in_middle)], before[-len(in_middle) :]
    return before[-1:] == [token] or (rest == in_middle != [] and not set(first) & set(in_middle))


def _user(content: str) -> dict[str, Any]:
    return {"role": "user", "content": content}


def _rendered(template: ChatTemplate, messages: Messages, add_generation_prompt: bool) -> str:
    """Render a conversation; empty if the template rejects it."""
    try:
        return template.conversation(messages, add_generation_prompt)
    except Exception:  # a template is a program: it may raise anything
        return ""
