"""Whether two models may be contrasted is said before an engine starts, in one message."""

import json
import shutil

import pytest
from support.models.small_models import save_small_model
from support.servers.real_server import DEMO, command

from client.errors import ModelError
from client.models.fingerprints import model_folder
from server.engines.preflight import inspect_models, inspect_pair
from server.settings import ServerSettings


def test_the_demo_pair_shares_every_token():
    facts = inspect_pair(DEMO / "expert", DEMO / "amateur")
    assert facts.differences == [] and facts.known.all() and len(facts.known) == 110


def test_the_first_ordinary_token_that_differs_is_named_and_stops_the_server(tmp_path):
    amateur = save_small_model(tmp_path / "amateur", 110, 1, renamed={40: "zebra", 70: "yak"})
    said = command("server", "--expert", DEMO / "expert", "--amateur", amateur, "--port", 0)
    assert said.returncode != 0
    assert "error: expert and amateur disagree on token 40: " in said.stderr and "'zebra'" in said.stderr
    assert "Traceback" not in said.stderr


def test_an_ordinary_token_that_the_amateur_lacks_is_refused(tmp_path):
    amateur = save_small_model(tmp_path / "amateur", 110, 1)
    file = amateur / "tokenizer.json"
    tokenizer = json.loads(file.read_text())
    last = max(tokenizer["model"]["vocab"], key=tokenizer["model"]["vocab"].get)
    del tokenizer["model"]["vocab"][last]
    file.write_text(json.dumps(tokenizer))
    with pytest.raises(ModelError, match=r"disagree on token 109: .* against no token"):
        inspect_pair(DEMO / "expert", amateur)


def test_added_tokens_may_differ_and_ids_beyond_the_head_are_unknown(tmp_path):
    expert = save_small_model(tmp_path / "expert", 114, 1, {110: "<|think|>", 111: "<|same|>"})
    amateur = save_small_model(tmp_path / "amateur", 112, 2, {110: "<|other|>", 111: "<|same|>"})
    facts = inspect_pair(expert, amateur)
    assert [entry.id for entry in facts.differences] == [110]
    assert [index for index in range(114) if not facts.known[index]] == [110, 112, 113]


@pytest.mark.parametrize("missing", ["tokenizer.json", "model.safetensors", "config.json"])
def test_a_folder_that_lacks_a_file_is_named_with_the_remedy(tmp_path, missing):
    amateur = tmp_path / "amateur"
    shutil.copytree(DEMO / "amateur", amateur)
    (amateur / missing).unlink()
    with pytest.raises(ModelError, match=r"no \*\.safetensors" if "safe" in missing else f"{missing} is missing"):
        inspect_pair(DEMO / "expert", amateur)


@pytest.mark.parametrize("content", ["{}", "[]", '{"model": {"vocab": 1}}', '{"model": {"vocab": {"a": "x"}}}', "{"])
def test_a_damaged_tokenizer_is_named(tmp_path, content):
    amateur = tmp_path / "amateur"
    shutil.copytree(DEMO / "amateur", amateur)
    (amateur / "tokenizer.json").write_text(content)
    with pytest.raises(ModelError, match=r"tokenizer\.json"):
        inspect_pair(DEMO / "expert", amateur)


def test_a_model_that_is_no_folder_is_named(tmp_path):
    said = command("server", "--expert", tmp_path / "nowhere", "--amateur", DEMO / "amateur", "--port", 0)
    assert said.returncode != 0 and f"no model folder at '{tmp_path}/nowhere'" in said.stderr
    with pytest.raises(ModelError, match=r"expert/model\.safetensors is a file, and a model is a folder"):
        model_folder(str(DEMO / "expert" / "model.safetensors"))
    long = str(tmp_path / ("x" * 300))
    with pytest.raises(ModelError, match=r"a model cannot be read \(.*File name too long"):
        inspect_models(ServerSettings(expert={"model": long}, amateur={"model": str(DEMO / "amateur")}))


@pytest.mark.parametrize("sharded", [False, True])
def test_weights_that_lie_in_a_folder_twice_count_once(tmp_path, sharded):
    """Mistral's folders hold them again as `consolidated`, for its own library."""
    expert = tmp_path / "expert"
    shutil.copytree(DEMO / "expert", expert)
    once = inspect_pair(expert, DEMO / "amateur").expert.weight_bytes
    assert once == (expert / "model.safetensors").stat().st_size
    shutil.copy(expert / "model.safetensors", expert / "consolidated.safetensors")
    if sharded:
        (expert / "model.safetensors").rename(expert / "model-00001-of-00001.safetensors")
        index = {"weight_map": {"model.embed_tokens.weight": "model-00001-of-00001.safetensors"}}
        (expert / "model.safetensors.index.json").write_text(json.dumps(index))
    assert inspect_pair(expert, DEMO / "amateur").expert.weight_bytes == once
    if sharded:
        (expert / "model.safetensors.index.json").unlink()
        (expert / "consolidated.safetensors").rename(expert / "consolidated-00001-of-00001.safetensors")
        assert inspect_pair(expert, DEMO / "amateur").expert.weight_bytes == once


def test_weights_that_are_not_whole_are_named_before_an_engine_loads_them(tmp_path):
    expert = tmp_path / "expert"
    shutil.copytree(DEMO / "expert", expert)
    (expert / "model.safetensors").rename(expert / "model-00001-of-00002.safetensors")
    listed = {"a": "model-00001-of-00002.safetensors", "b": "model-00002-of-00002.safetensors"}
    (expert / "model.safetensors.index.json").write_text(json.dumps({"weight_map": listed}))
    with pytest.raises(ModelError, match=r"model-00002-of-00002\.safetensors is missing, which .* lists"):
        inspect_pair(expert, DEMO / "amateur")
    (expert / "model.safetensors.index.json").unlink()
    with pytest.raises(ModelError, match=r"model-00002-of-00002\.safetensors is missing, by the names of the others"):
        inspect_pair(expert, DEMO / "amateur")
    (expert / "model-00001-of-00002.safetensors").rename(expert / "model-00001-of-00001.safetensors")
    half = (expert / "model-00001-of-00001.safetensors").read_bytes()[:-1]
    (expert / "model-00001-of-00001.safetensors").write_bytes(half)
    with pytest.raises(ModelError, match=r"model-00001-of-00001\.safetensors is not a readable safetensors file"):
        inspect_pair(expert, DEMO / "amateur")
