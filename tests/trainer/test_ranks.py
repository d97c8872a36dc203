"""Two ranks of one training, over gloo on the CPU, are one training."""

import json

import pytest
import torch
from safetensors.torch import load_file
from support.models.tiny_pair import trajectory, write_run
from support.models.unpacked import save_multimodal
from support.training.launch import APART, SHARDED, metrics, ranks, torchrun

from client.storage.bucket import Bucket


@pytest.fixture(scope="module")
def words(tmp_path_factory, expert):
    """13 trajectories in batches of 4: the last of an epoch has one, for two ranks."""
    rows = [trajectory(f"p{index}", index) for index in range(13)]
    run = write_run(tmp_path_factory.mktemp("runs") / "thirteen", expert, trajectories=rows)
    return ["train", run, "--model", expert, "--batch-size", 4, "--max-steps", 9, "--learning-rate", 1e-3,
            "--dropout", 0, "--token-budget", 30, "--save-steps", 5]  # fmt: skip


@pytest.fixture(scope="module")
def alone(tmp_path_factory, words):
    out = tmp_path_factory.mktemp("alone") / "out"
    said = ranks(1, *words, "--output", out)
    assert said.returncode == 0, said.stderr[-3000:]
    return out


def check_the_same(out, alone, tolerance=1e-5):
    lines, expected = metrics(out), metrics(alone)
    for column in ("loss", "grad_norm", "label_entropy", "agreement", "learning_rate", "kept_steps", "tokens", "step"):
        assert [line[column] for line in lines] == pytest.approx([line[column] for line in expected], rel=1e-4), column
    mine, theirs = (load_file(folder / "adapter_model.safetensors") for folder in (out, alone))
    assert mine.keys() == theirs.keys()
    for name in mine:
        torch.testing.assert_close(mine[name], theirs[name], rtol=0, atol=tolerance)


def test_two_ranks_have_the_losses_and_weights_of_one_with_the_same_global_batch(tmp_path, words, alone):
    said = torchrun(2, *words, "--output", tmp_path / "out")  # the others are ranks that were forked
    assert said.returncode == 0, said.stderr[-3000:]
    assert said.stdout.count("9 optimizer steps over 13 trajectories") == 1  # the first rank speaks
    check_the_same(tmp_path / "out", alone)
    assert json.loads((tmp_path / "out" / "lightreasoner.json").read_text())["ranks"] == 2


def test_two_ranks_on_machines_of_their_own_resume_from_their_checkpoint_in_a_bucket(tmp_path, s3, words, alone):
    bucket = Bucket(f"{s3}/of-two-machines")
    shorter = [5 if word == 9 else word for word in words]
    said = ranks(2, *shorter, "--output", bucket, function=APART, machines=tmp_path / "first")
    assert said.returncode == 0, said.stderr[-3000:]
    names = {name.rpartition("/")[2] for name in bucket.names("checkpoints/checkpoint-5")}
    assert names > {"rng_state_0.pth", "rng_state_1.pth"}
    said = ranks(2, *words, "--output", bucket, "--resume", function=APART, machines=tmp_path / "second")
    assert said.returncode == 0 and "resuming after step 5" in said.stdout, said.stderr[-3000:]
    assert not any((tmp_path / "second").glob("*/lightreasoner-*"))
    for name in ("metrics.jsonl", "adapter_model.safetensors"):
        (tmp_path / name).write_bytes(bucket.get(name))
    check_the_same(tmp_path, alone)


def test_two_ranks_with_sharded_weights_have_the_losses_of_one_and_resume(tmp_path, words, alone):
    out, shorter = tmp_path / "out", [5 if word == 9 else word for word in words]
    said = ranks(2, *shorter, "--output", out, function=SHARDED)
    assert said.returncode == 0, said.stderr[-3000:]
    assert list((out / "checkpoints" / "checkpoint-5").glob("*fsdp*"))  # which only sharded weights leave
    said = ranks(2, *words, "--output", out, "--resume", function=SHARDED)
    assert said.returncode == 0 and "resuming after step 5" in said.stdout, said.stderr[-3000:]
    check_the_same(out, alone)


def test_two_ranks_train_the_text_layers_of_a_model_that_reads_pictures_and_no_others(tmp_path):
    model = save_multimodal(tmp_path / "gemma3")
    run = write_run(tmp_path / "run", model, 4)
    words = "train", run, "--model", model, "--output", tmp_path / "out", "--max-steps", 2, "--targets"
    said = ranks(2, *words, "q_proj,v_proj,lm_head")
    assert said.returncode == 0, said.stderr[-3000:]
    weights = load_file(tmp_path / "out" / "adapter_model.safetensors")
    layers = {name.removeprefix("base_model.model.").partition(".lora_")[0] for name in weights}
    text = {f"model.language_model.layers.{n}.self_attn.{which}_proj" for n in range(2) for which in "qv"}
    assert layers == text | {"lm_head"} and all(weights[name].any() for name in weights)


def test_what_is_wrong_ends_every_rank_with_the_reason(tmp_path, words, alone):
    said = ranks(2, *words, "--output", alone)
    assert said.returncode != 0 and f"{alone} is not empty" in said.stderr
