"""The end of turn, found in chat templates as the families of models publish them."""

import pytest
from support.models.chat_templates import ASKS, CHATML, TEMPLATES

from client.errors import ModelError
from client.models.chat_template import ChatTemplate
from client.models.ends import end_of_turn, end_token_ids
from client.models.fingerprints import check_generation_config

TOKENS = {"bos_token": "<s>", "eos_token": "</s>"}
ADDED = [
    "<s>", "</s>", "<|im_start|>", "<|im_end|>", "<think>", "</think>", "<｜User｜>", "<｜Assistant｜>",
    "<｜end▁of▁sentence｜>", "<|start_header_id|>", "<|end_header_id|>", "<|eot_id|>", "[INST]", "[/INST]",
    "<start_of_turn>", "<end_of_turn>", "<|end|>", "<|endoftext|>", "<|start_of_role|>", "<|end_of_role|>",
    "<|end_of_text|>", "<|START_OF_TURN_TOKEN|>", "<|END_OF_TURN_TOKEN|>", "<|USER_TOKEN|>", "<|CHATBOT_TOKEN|>",
    "<|START_RESPONSE|>", "<|END_RESPONSE|>", "<|start|>", "<|message|>", "<|channel|>", "<|return|>", "[gMASK]",
    "<sop>", "\n\n", "  ",
]  # fmt: skip
ROLES = ["<|user|>", "<|assistant|>"]


def added_tokens(family):
    """Of OLMo 2 the roles are no tokens."""
    return {token: index for index, token in enumerate(ADDED + ([] if "OLMo" in family else ROLES), 100)}


@pytest.fixture
def template_of(tmp_path):
    """The template of a family."""

    def made(source, **tokens):
        (tmp_path / "template.jinja").write_text(source, encoding="utf-8")
        return ChatTemplate(tmp_path, tmp_path / "template.jinja", TOKENS | tokens)

    return made


@pytest.mark.parametrize("family", TEMPLATES)
def test_the_end_of_turn_is_found_in_the_template(family, template_of):
    source, closing = TEMPLATES[family]
    added = added_tokens(family)
    found = end_of_turn(template_of(source), added)
    assert {index: token for token, index in added.items()}.get(found) == closing


def test_ends_are_the_tokenizers_the_generation_configs_and_the_templates(template_of):
    added, template = added_tokens("Qwen"), template_of(CHATML + ASKS)
    im_end = added["<|im_end|>"]
    assert end_token_ids(7, 7, template, added) == [7, im_end]
    assert end_token_ids(7, [9, 8], template, added) == [7, 8, 9, im_end]
    assert end_token_ids(im_end, None, template, added) == [im_end]
    assert end_token_ids(None, None, None, added) == []
    assert end_token_ids(0, 0, template, {}) == [0]
    assert end_token_ids(7, [-1, None], None, added) == [7], "-1 is none"


@pytest.mark.parametrize(
    "said", ['{"eos_token_id": "2"}', '{"eos_token_id": [[2]]}', '{"eos_token_id": 1e3}', "[]", "{"]
)
def test_a_generation_config_whose_ends_would_be_passed_over_is_named(tmp_path, said):
    check_generation_config(tmp_path)
    for fine in ('{"eos_token_id": [2, -1]}', '{"eos_token_id": 2}', '{"eos_token_id": null}', "{}"):
        (tmp_path / "generation_config.json").write_text(fine)
        check_generation_config(tmp_path)
    (tmp_path / "generation_config.json").write_text(said)
    with pytest.raises(ModelError, match=r"generation_config\.json"):
        check_generation_config(tmp_path)
