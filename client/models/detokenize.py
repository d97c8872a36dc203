"""Token ids as readable text, with the expert's tokenizer.json; needs no model.

In: the bytes of tokenizer.json. Out: text. The text is not escaped: the page that shows it must do that.
"""

from __future__ import annotations

import re
from collections.abc import Iterable
from typing import TYPE_CHECKING

from client.errors import RunError
from client.protocol.trajectories import most_values

if TYPE_CHECKING:
    from tokenizers import Tokenizer

MOST_TOKENIZER_BYTES, MOST_TOKENIZER_VALUES = 2**26, 3_000_000
"""Most bytes and most JSON values of a tokenizer.json. The largest known has half the bytes and two thirds of the
values."""
WORD_BEGINS = "▁"
"""SentencePiece's sign for a space. Decoding drops it at the beginning of a text."""
PRINTED_AS_THEMSELVES = [*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
BYTE_OF_LETTER = {chr(byte): byte for byte in PRINTED_AS_THEMSELVES} | {
    chr(0x100 + index): byte for index, byte in enumerate(sorted({*range(0x100)} - {*PRINTED_AS_THEMSELVES}))
}
"""The characters with which a byte-level vocabulary, as GPT-2's, writes bytes."""


def has_too_many_values(data: bytes) -> bool:
    """Whether a tokenizer.json has so many JSON values that parsing it would fill the memory."""
    return most_values(data) > MOST_TOKENIZER_VALUES


def tokenizer_of(data: bytes, where: str) -> Tokenizer:
    """Read a tokenizer.json. Raises RunError, with `where` it is, if it is invalid."""
    from tokenizers import Tokenizer

    try:
        if has_too_many_values(data):
            raise ValueError(f"more than {MOST_TOKENIZER_VALUES:,} values")
        return Tokenizer.from_buffer(data)
    except Exception as error:
        raise RunError(f"{where} is not a tokenizer.json that can be read ({error}); copy the expert's there") from None


class Detokenizer:
    """Decodes tokens to text, alone or in sequence."""

    def __init__(self, tokenizer: Tokenizer) -> None:
        self._tokenizer = tokenizer
        self._known: dict[int, str] = {}

    def alone(self, token_id: int) -> str:
        """One token, with visible spaces and line ends. Bytes that are only part of a character become <0xF0>."""
        if token_id not in self._known:
            text = self._tokenizer.decode([token_id], skip_special_tokens=False)
            name = self._tokenizer.id_to_token(token_id)
            if name and name.startswith(WORD_BEGINS) and not text.startswith((" ", WORD_BEGINS)):
                text = f" {text}"
            if not text or "\ufffd" in text:
                text = _with_bytes(name or f"#{token_id}")
            self._known[token_id] = visible(text)
        return self._known[token_id]

    def raw(self, token_id: int) -> str:
        """One token as plain text; '' for a special token."""
        return self._tokenizer.decode([token_id])

    def whole(self, token_ids: Iterable[int]) -> str:
        """A sequence as text."""
        return self._tokenizer.decode([int(token) for token in token_ids], skip_special_tokens=False)

    def tail(self, token_ids: Iterable[int]) -> str:
        """Decode the last tokens of a sequence, without the rest of a character that began before them."""
        return self.whole(token_ids).lstrip("\ufffd")

    def pieces(self, token_ids: Iterable[int]) -> list[str]:
        """A sequence token by token. Joined, the pieces are always the text of `whole`.

        If a character spans several tokens, the last one has it; the pieces of the others are empty. The time grows
        with the square of the length, because each prefix is decoded anew. A streaming decoder would be quicker, but
        bytes that form no character change text that it has already returned.
        """
        ids = [int(token) for token in token_ids]
        whole, pieces, end = self.whole(ids), [], 0
        for count in range(1, len(ids) + 1):
            begin, said = end, self.whole(ids[:count])
            while end < min(len(said), len(whole)) and said[end] == whole[end]:
                end += 1
            pieces.append(whole[begin:end])
        return pieces


def _with_bytes(token: str) -> str:
    """A token of a byte-level vocabulary as characters, with <0xF0> for bytes that form none. Other tokens stay."""
    if re.fullmatch(r"<0x[0-9A-F]{2}>|#\d+", token) or not BYTE_OF_LETTER.keys() >= set(token):
        return token
    text = bytes(map(BYTE_OF_LETTER.__getitem__, token)).decode("utf-8", "backslashreplace")
    return re.sub(r"\\x([89a-f][0-9a-f])", lambda byte: f"<0x{byte[1].upper()}>", text)


def visible(text: str) -> str:
    """Make spaces and line ends visible: many tokens are nothing else."""
    return text.replace(" ", "␣").replace("\n", "⏎").replace("\t", "⇥").replace("\r", "␍")
