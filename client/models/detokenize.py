"""Token ids as text a person can read, by the expert's tokenizer.json; needs no model.

In: tokenizer.json's bytes. Out: text. What a tokenizer says is never trusted: escaping is the page's.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import TYPE_CHECKING

from client.errors import RunError

if TYPE_CHECKING:
    from tokenizers import Tokenizer


def tokenizer_of(data: bytes, where: str) -> Tokenizer:
    """The tokenizer that a tokenizer.json holds. Raises RunError naming `where` it came from."""
    from tokenizers import Tokenizer

    try:
        return Tokenizer.from_buffer(data)
    except Exception as error:
        raise RunError(f"{where} is not a tokenizer.json that can be read ({error}); copy the expert's there") from None


class Texts:
    """Tokens as text, one by one or in their context."""

    def __init__(self, tokenizer: Tokenizer) -> None:
        self._tokenizer = tokenizer
        self._known: dict[int, str] = {}

    def alone(self, token_id: int) -> str:
        """One token, its spaces and line ends made visible; a part of a character as the tokenizer writes it."""
        if token_id not in self._known:
            text = self._tokenizer.decode([token_id], skip_special_tokens=False)
            if not text or "\ufffd" in text:
                text = self._tokenizer.id_to_token(token_id) or f"#{token_id}"
            self._known[token_id] = visible(text)
        return self._known[token_id]

    def raw(self, token_id: int) -> str:
        """One token as it stands in a text; '' for a special token."""
        return self._tokenizer.decode([token_id])

    def whole(self, token_ids: Iterable[int]) -> str:
        """A sequence as it reads."""
        return self._tokenizer.decode([int(token) for token in token_ids], skip_special_tokens=False)

    def pieces(self, token_ids: Iterable[int]) -> list[str]:
        """A sequence token by token: joined they are what `whole` says of it, whatever the tokens.

        A piece is what the token lets the beginning say of the whole: a character that several tokens make up stands
        at the last of them, the others are empty. Each beginning is decoded anew, so long sequences take long: a
        stream would be quicker, but bytes that make no character change what it has said already.
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
    """Text whose spaces and line ends can be seen: a token is often nothing else."""
    return text.replace(" ", "␣").replace("\n", "⏎").replace("\t", "⇥").replace("\r", "␍")
