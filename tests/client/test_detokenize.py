"""Texts of tokens: pieces that joined are the whole, whatever the tokenizer."""

import numpy as np
import pytest
from tokenizers import Tokenizer, decoders, models, pre_tokenizers

from client.models.detokenize import Detokenizer, tokenizer_of


@pytest.fixture(scope="module")
def bytes_tokenizer():
    """Every byte a token, as in GPT-2's alphabet: most characters beyond ASCII take several."""
    vocabulary = {character: index for index, character in enumerate(sorted(pre_tokenizers.ByteLevel.alphabet()))}
    tokenizer = Tokenizer(models.BPE(vocabulary, []))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    return tokenizer


def test_tokens_read_as_the_whole_does_though_characters_span_several(bytes_tokenizer):
    texts = Detokenizer(tokenizer_of(bytes_tokenizer.to_str().encode(), "here"))
    said = "2 × 3 = 6,\n naïve 數"
    ids = bytes_tokenizer.encode(said).ids
    pieces = texts.pieces(ids)
    assert "".join(pieces) == said == texts.whole(ids) and len(pieces) == len(ids) and "" in pieces
    assert (
        texts.alone(bytes_tokenizer.encode(" ").ids[0]) == "␣"
        and texts.alone(bytes_tokenizer.encode("\n").ids[0]) == "⏎"
    )
    assert texts.alone(10_000) == "#10000"


def test_parts_of_an_emoji_are_shown_as_bytes_and_a_slice_does_not_begin_with_one(bytes_tokenizer):
    texts, ids = Detokenizer(bytes_tokenizer), bytes_tokenizer.encode("🙂 é").ids
    assert [texts.alone(token) for token in ids] == ["<0xF0>", "<0x9F>", "<0x99>", "<0x82>", "␣", "<0xC3>", "<0xA9>"]
    assert [texts.tail(ids[begin:]) for begin in range(5)] == ["🙂 é", " é", " é", " é", " é"]
    assert texts.tail(ids[2:6]) == " \ufffd"  # the step stands within the last character
    merged = {"ðŁ": 0, "ĻĤĠ": 1, "Ġb": 2, "\ufffd": 3}
    tokenizer = Tokenizer(models.BPE(merged, []))
    tokenizer.decoder = decoders.ByteLevel()
    several = Detokenizer(tokenizer)
    assert [several.alone(token) for token in range(4)] == ["<0xF0><0x9F>", "<0x99><0x82>␣", "␣b", "\ufffd"]


@pytest.fixture(scope="module", params=["kept", "stripped"])
def fallback_tokenizer(request):
    """Bytes as tokens beside words, as in Llama 2, Gemma and Mistral: a run of bytes is a text or it is none."""
    words = ["<unk>", "<s>", "</s>", *(f"<0x{byte:02X}>" for byte in range(256)), "▁", "▁so", "b", "é", "▁▁", "."]
    vocabulary = {word: index for index, word in enumerate(words)}
    tokenizer = Tokenizer(models.BPE(vocabulary, [], byte_fallback=True, unk_token="<unk>"))
    parts = [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse()]
    tokenizer.decoder = decoders.Sequence(parts + [decoders.Strip(" ", 1, 0)] * (request.param == "stripped"))
    tokenizer.add_special_tokens(["<s>", "</s>"])
    return tokenizer


def test_bytes_that_make_no_character_are_read_too(fallback_tokenizer, bytes_tokenizer):
    texts = Detokenizer(fallback_tokenizer)
    ids, accented = (
        [fallback_tokenizer.token_to_id(token) for token in tokens]
        for tokens in (("b", "<0x0A>", "<0xF0>", "<0x9F>", "b"), ("<0xC3>", "<0xA9>", "b"))
    )
    assert "".join(texts.pieces(ids)) == texts.whole(ids) == "b\ufffd\ufffd\ufffdb"
    assert texts.pieces(ids[:1] + ids[2:4]) == ["b", "\ufffd", "\ufffd"]  # an answer cut within a character
    assert texts.pieces(accented) == ["", "é", "b"]
    cut = bytes_tokenizer.encode("2 ×").ids[:-1]
    assert Detokenizer(bytes_tokenizer).pieces(cut) == ["2", " ", "\ufffd"]


def test_whatever_the_tokens_their_pieces_joined_are_the_whole(fallback_tokenizer, bytes_tokenizer):
    random = np.random.default_rng(7)
    for tokenizer in (fallback_tokenizer, bytes_tokenizer):
        texts, size = Detokenizer(tokenizer), tokenizer.get_vocab_size()
        said = tokenizer.encode("b b naïve 數 🙂\n×").ids
        for _ in range(400):
            begin, end, count = random.integers(0, [len(said), len(said) + 1, 9])
            strange = random.integers(0, size + 2, count)  # two ids are no token's
            ids = random.permutation([*said[begin:end], *strange]) if begin % 2 else [*said[begin:end], *strange]
            pieces = texts.pieces(ids)
            assert len(pieces) == len(ids) and "".join(pieces) == texts.whole(ids), ids
