"""Chat templates: wherever a folder holds them, rendered as transformers renders them, and what a refusal says."""

import json
import shutil

import pytest
from support.servers.real_server import DEMO

from client.errors import ModelError
from client.models.chat_template import ChatTemplate
from client.models.fingerprints import chat_template, chat_template_digest

SOURCE = "{% for m in messages %}{{ m.content }}{% endfor %}"
MESSAGES = [{"role": "system", "content": "Think."}, {"role": "user", "content": "What is 7×8?"}]
LISTED = [{"name": "rag", "template": "x"}, {"name": "default", "template": SOURCE}]
TEMPLATES = {
    "generation": (
        "{% for m in messages %}{% set said = 'no' %}{% generation %}{% set said = 'yes' %}{{ m.content }}\n"
        "{% endgeneration %}{{ said }}{% endfor %}"
    ),
    "no tools": "{{ tools is none }}{{ documents is none }}{% if x is defined %}{{ x }}{% endif %}{{ messages[1] }}",
    "the day": "{{ strftime_now('%d %b %Y') }}{% macro day() %}{{ strftime_now('%Y') }}{% endmacro %}{{ day() }}",
    "json": "{{ messages | tojson(indent=2) }}",
    "special": "{{ bos_token }}{{ eos_token }}{{ pad_token }}{{ unk_token }}{{ image_token }}{{ messages[1].content }}",
}


@pytest.fixture
def folder(tmp_path):
    """A model folder without a chat template."""
    made = shutil.copytree(DEMO / "expert", tmp_path / "model")
    (made / "chat_template.jinja").unlink()
    return made


@pytest.mark.parametrize("name", TEMPLATES)
def test_a_template_is_rendered_as_transformers_renders_it(name, folder):
    transformers = pytest.importorskip("transformers")
    (folder / "chat_template.jinja").write_text(TEMPLATES[name])
    bos = {"__type": "AddedToken", "content": "<|system|>", "lstrip": False, "rstrip": False, "special": True}
    config = json.loads((folder / "tokenizer_config.json").read_text())
    (folder / "tokenizer_config.json").write_text(
        json.dumps(config | {"bos_token": bos, "extra_special_tokens": {"image_token": "<|user|>"}})
    )
    tokenizer = transformers.AutoTokenizer.from_pretrained(folder)
    theirs = tokenizer.apply_chat_template(MESSAGES, add_generation_prompt=True, tokenize=False, x=[1, {"a": "é"}])
    assert ChatTemplate(folder).render("Think.", "What is 7×8?", {"x": [1, {"a": "é"}]}) == theirs


PARTS = (
    "{% for m in messages %}{{ m.role }}: {% for part in m.content | selectattr('type', 'equalto', 'text') %}"
    "{{ part.text }}{% endfor %};{% endfor %}"
)


def test_a_template_that_reads_lists_of_parts_alone_is_given_lists(folder):
    """As those of models that read pictures; a text would be left out of the prompt without a word."""
    (folder / "chat_template.jinja").write_text(PARTS)
    assert ChatTemplate(folder).render("Think.", "What is 7×8?") == "system: Think.;user: What is 7×8?;"
    asked = [{"role": "user", "content": "q"}, {"role": "assistant", "content": "The ans"}]
    assert ChatTemplate(folder).prompt(asked) == "user: q;assistant: The ans"
    for both in ("{{ messages[-1].content }}", "{% if messages[-1].content is string %}" + SOURCE + "{% endif %}"):
        (folder / "chat_template.jinja").write_text(both)
        assert ChatTemplate(folder).render(None, "q") == "q"


def test_special_tokens_of_early_versions_are_read(folder):
    (folder / "tokenizer_config.json").write_text('{"eos_token": "<|end|>", "chat_template": "{{ bos_token }}-"}')
    (folder / "special_tokens_map.json").write_text('{"bos_token": {"content": "<s>", "lstrip": false}}')
    assert ChatTemplate(folder).render(None, "q") == "<s>-"


@pytest.mark.parametrize(
    ("file", "content"),
    [
        ("chat_template.jinja", SOURCE),
        ("additional_chat_templates/default.jinja", SOURCE),
        ("tokenizer_config.json", json.dumps({"chat_template": SOURCE})),
        ("tokenizer_config.json", json.dumps({"chat_template": LISTED})),
        ("tokenizer_config.json", json.dumps({"chat_template": {"tool_use": "x", "default": SOURCE}})),
        ("chat_template.json", json.dumps({"chat_template": SOURCE})),
    ],
)  # fmt: skip
def test_the_template_is_found_wherever_it_is_kept(folder, file, content):
    (folder / file).parent.mkdir(exist_ok=True)
    (folder / file).write_text(content)
    assert chat_template(folder) == SOURCE


@pytest.mark.parametrize("kept", [5, [1], [{}], {"default": 5}])
def test_what_is_no_template_is_named(folder, kept):
    (folder / "tokenizer_config.json").write_text(json.dumps({"chat_template": kept}))
    with pytest.raises(ModelError, match=r"tokenizer_config\.json: chat_template is neither a text nor texts"):
        chat_template(folder)


def test_a_file_takes_the_place_of_the_folders_template_and_its_digest(folder, tmp_path):
    mine = tmp_path / "mine.jinja"
    mine.write_text(SOURCE)
    assert ChatTemplate(folder, mine).render("a", "b") == "ab" and chat_template_digest(folder) is None
    (folder / "chat_template.jinja").write_text(SOURCE)
    assert chat_template_digest(folder) == chat_template_digest(tmp_path, mine) is not None
    for file, words in ((tmp_path / "none.jinja", "No such file"), (tmp_path / "empty.jinja", "has no chat template")):
        if "empty" in file.name:
            file.write_text("")
        with pytest.raises(ModelError, match=rf"{file.name}.*{words}"):
            ChatTemplate(folder, file)


def test_the_day_that_is_given_is_written_and_whether_one_is_written_is_known(folder):
    (folder / "chat_template.jinja").write_text(
        "{% if strftime_now is defined %}{{ strftime_now('%d.%m.%y') }}{% endif %}"
    )
    template = ChatTemplate(folder)
    assert template.writes_date and template.render(None, "q", date="2026-01-31") == "31.01.26"
    (folder / "chat_template.jinja").write_text(SOURCE)
    assert not ChatTemplate(folder).writes_date


def test_a_template_that_takes_no_system_prompt_says_how_to_go_on(folder):
    gemma = (
        "{% if messages[0].role == 'system' %}{{ raise_exception('System role not supported') }}{% endif %}" + SOURCE
    )
    (folder / "chat_template.jinja").write_text(gemma)
    assert ChatTemplate(folder).render("", "q") == "q"
    with pytest.raises(
        ModelError, match=r'System role not supported; it takes no system prompt: give --system-prompt ""'
    ):
        ChatTemplate(folder).render("Think.", "q")
    (folder / "chat_template.jinja").write_text("{{ raise_exception('x' * 10000) }}")
    with pytest.raises(ModelError, match="change the template") as refused:
        ChatTemplate(folder).render("Think.", "q")
    assert len(str(refused.value)) < 1000
    (folder / "chat_template.jinja").write_text("{# nothing #}")
    with pytest.raises(ModelError, match="renders the question to nothing"):
        ChatTemplate(folder).render("Think.", "q")
