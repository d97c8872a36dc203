"""Token ids as readable text, with the expert's tokenizer.json; needs no model.

In: the bytes of tokenizer.json. Out: text. The text is not escaped: the page that shows it must do that.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import TYPE_CHECKING

from client.errors import RunError

if TYPE_CHECKING:
    from tokenizers import Tokenizer


def tokenizer_of(data: bytes, where: str) -> Tokenizer:
    """The tokenizer of a tokenizer.json. Raises RunError that names `where` it is."""
    from tokenizers import Tokenizer

    try:
        return Tokenizer.from_buffer(data)
    except Exception as error:
        raise RunError(f"{where} is not a tokenizer.json that can be read ({error}); copy the expert's there") from None


class Texts:
    """Tokens as text, alone or in their sequence."""

    def __init__(self, tokenizer: Tokenizer) -> None:
        self._tokenizer = tokenizer
        self._known: dict[int, str] = {}

    def alone(self, token_id: int) -> str:
        """One token with visible spaces and line ends. A part of a character: as the vocabulary writes it."""
        if token_id not in self._known:
            text = self._tokenizer.decode([token_id], skip_special_tokens=False)
            if not text or "\ufffd" in text:
                text = self._tokenizer.id_to_token(token_id) or f"#{token_id}"
            self._known[token_id] = visible(text)
        return self._known[token_id]

    def raw(self, token_id: int) -> str:
        """One token as plain text; '' for a special token."""
        return self._tokenizer.decode([token_id])

    def whole(self, token_ids: Iterable[int]) -> str:
        """A sequence as text."""
        return self._tokenizer.decode([int(token) for token in token_ids], skip_special_tokens=False)

    def pieces(self, token_ids: Iterable[int]) -> list[str]:
        """A sequence token by token. Joined, the pieces are always the text of `whole`.

        A character of several tokens is the piece of the last one; the others are empty. The time grows with the square
        of the length, because each prefix is decoded anew. A streaming decoder would be quicker, but bytes that form no
        character change text that it has already returned.
        """
        ids = [int(token) for token in token_ids]
        whole, pieces, end = self.whole(ids), [], 0
        for count in range(1, len(ids) + 1):
            begin, said = end, self.whole(ids[:count])
            while end < min(len(said), len(whole)) and said[end] == whole[end]:
                end += 1
            pieces.append(whole[begin:end])
        return pieces


def visible(text: str) -> str:
    """Text with visible spaces and line ends: many tokens are nothing else."""
    return text.replace(" ", "␣").replace("\n", "⏎").replace("\t", "⇥").replace("\r", "␍")
