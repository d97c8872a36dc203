"""Engine arguments that name files hold for the whole service, or are refused; only what generates text passes."""

import json
import shutil
from pathlib import Path

import huggingface_hub
import pytest
from support.servers.real_server import DEMO
from transformers import AutoConfig, Gemma3Config, Gemma3TextConfig

from client.errors import ModelError
from client.models.fingerprints import model_folder
from server.engines.preflight import inspect_pair
from server.models import REFUSED, located, trusted
from server.settings import ServerSettings, SettingsError


def settings(**expert):
    return ServerSettings(expert={"model": str(DEMO / "expert"), **expert}, amateur={"model": str(DEMO / "amateur")})


@pytest.mark.parametrize("name", sorted(REFUSED))
def test_an_argument_that_would_hold_for_a_part_alone_is_refused_with_the_remedy(name):
    with pytest.raises(SettingsError) as refused:
        located(settings(**{name: "something"}))
    assert str(refused.value) == f"expert.{name} is not supported: {REFUSED[name]}"


@pytest.mark.parametrize("name", ["dummy", "pt", "gguf", "mistral", "sharded_state"])
def test_weights_that_are_not_those_of_the_fingerprint_are_refused(name):
    with pytest.raises(SettingsError, match=r"expert\.load_format must be one of auto, .*, which read \*\.safetensors"):
        located(settings(load_format=name))


@pytest.mark.parametrize("harmless", [{"tokenizer_mode": "auto"}, {"runner": "generate"}, {"enable_lora": False}])
def test_what_changes_nothing_is_taken(harmless):
    assert located(settings(**harmless)).expert == {"model": str(DEMO / "expert")}


@pytest.mark.parametrize("over", [{"vocab_size": 5}, {"text_config": {"vocab_size": 5}}])
def test_what_the_service_reads_of_config_json_is_not_changed_for_vllm_alone(over):
    with pytest.raises(SettingsError, match=r"expert\.hf_overrides may not change vocab_size"):
        located(settings(hf_overrides=over))
    assert located(settings(hf_overrides={"head_dtype": "float32"})).expert["hf_overrides"]


def test_a_revision_of_a_local_folder_is_refused_and_not_ignored():
    with pytest.raises(SettingsError, match="revision 'main' has no effect on the local folder"):
        located(settings(revision="main"))


def test_what_a_hub_model_is_asked_with_reaches_the_download(monkeypatch):
    """Tests cannot reach the Hub, so this one replaces huggingface_hub's public download function."""
    asked = []

    def download(model, **options):
        asked.append((model, options))
        return str(DEMO / "expert")

    monkeypatch.setattr(huggingface_hub, "snapshot_download", download)
    there = located(
        settings(model="o/n", revision="v2", download_dir="/d", hf_token="t", trust_remote_code=True, seed=3)
    )
    ((model, options),) = asked
    patterns = options.pop("allow_patterns")
    assert (model, options) == ("o/n", {"revision": "v2", "cache_dir": "/d", "token": "t"})
    assert "*.py" in patterns
    assert there.expert == {"model": str(DEMO / "expert"), "trust_remote_code": True, "seed": 3}
    assert trusted(there) == ["expert"]
    model_folder("o/n")
    assert "*.py" not in asked[1][1]["allow_patterns"]


def test_a_revision_that_cannot_be_had_is_named(monkeypatch):
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    with pytest.raises(ModelError, match=r"model 'o/n' at revision 'v2' not found: .*Hub failed: .{20}"):
        model_folder("o/n", revision="v2")
    with pytest.raises(ModelError, match=r"model 'o/n' at revision '1234567' not found: .*snapshot folder"):
        located(settings(model="o/n", revision=1234567))  # as YAML reads a commit of digits


@pytest.fixture
def changed(tmp_path):
    """The demo's expert with another config.json."""

    def change(config) -> Path:
        folder = tmp_path / "expert"
        shutil.copytree(DEMO / "expert", folder, dirs_exist_ok=True)
        (folder / "config.json").write_text(json.dumps(config))
        return folder

    return change


def test_a_multimodal_configuration_that_leaves_defaults_out_has_those_of_transformers(changed, monkeypatch):
    """As Gemma 3's: vocab_size stands nowhere in the file."""
    config = Gemma3Config(text_config=Gemma3TextConfig(vocab_size=262_208)).to_dict()
    kept = {"model_type": "gemma3", "architectures": ["Gemma3ForConditionalGeneration"]}
    folder = changed({**kept, "text_config": {"model_type": "gemma3_text", "hidden_size": 64}})
    expected = AutoConfig.from_pretrained(folder).get_text_config().vocab_size
    assert expected == config["text_config"]["vocab_size"]
    assert inspect_pair(folder, DEMO / "amateur").expert.vocab_size == expected


@pytest.mark.parametrize(
    ("config", "words"),
    [
        ({"model_type": "bert", "architectures": ["BertForMaskedLM"], "vocab_size": 110}, "names BertForMaskedLM"),
        ({"model_type": "qwen2", "architectures": ["Qwen2ForSequenceClassification"], "vocab_size": 110},
         "Qwen2ForSequenceClassification, which generates no text"),
        ({"model_type": "qwen2", "architectures": ["Qwen2ForRewardModel"], "vocab_size": 110}, "Qwen2ForRewardModel"),
        ({"model_type": "llama", "architectures": ["LlamaModel"], "vocab_size": 110}, "LlamaModel"),
        ({"model_type": "t5", "architectures": ["T5ForConditionalGeneration"], "is_encoder_decoder": True,
          "vocab_size": 110}, "describes an encoder-decoder"),
        ({"model_type": "llama", "vocab_size": 110}, "names no architectures"),
        ({"model_type": "llama", "architectures": "LlamaForCausalLM", "vocab_size": 110}, "a list of names was"),
        ({"model_type": "llama", "architectures": ["LlamaForCausalLM"], "vocab_size": "110"}, "vocab_size '110'"),
        ({"model_type": "nobodys", "architectures": ["NobodysForCausalLM"]}, "cannot be read by transformers: "),
    ],
)  # fmt: skip
def test_what_is_no_causal_language_model_is_refused_before_any_engine(changed, config, words):
    with pytest.raises(ModelError) as refused:
        inspect_pair(changed(config), DEMO / "amateur")
    assert words in str(refused.value)


@pytest.mark.parametrize("name", ["ChatGLMModel", "InternVLChatModel", "GPT2LMHeadModel"])
def test_architectures_of_other_names_that_vllm_generates_with_are_taken(changed, name):
    folder = changed({"model_type": "llama", "architectures": [name], "vocab_size": 110})
    assert inspect_pair(folder, DEMO / "amateur").expert.vocab_size == 110
