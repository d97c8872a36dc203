"""The pairs of the paper, laid out as they are published, with tiny weights: the whole way, by public commands."""

import json

import pytest
from support.models.families import FAMILIES, save_family
from support.servers.real_server import command, running_server
from word_problems import rows

from client.runs.run import Run

pytestmark = pytest.mark.long
MATH, R1, QWEN = (FAMILIES[name] for name in ("Qwen2.5-Math, base", "DeepSeek-R1-Distill-Qwen", "Qwen2.5, base"))
PAIRS = {
    "Qwen2.5-Math with Qwen2.5": (MATH, "Qwen2Tokenizer", [110, 112], "same"),
    "R1-Distill with Qwen2.5": (R1, "LlamaTokenizerFast", [113], "own"),
}


def publish(folder, family, role, tokenizer_class, **changed):
    """The chat template stands in tokenizer_config.json, beside the tokenizer's class and its tokens as objects."""
    save_family(folder, family, role, **changed)
    template, file = folder / "chat_template.jinja", folder / "tokenizer_config.json"
    config = json.loads(file.read_text())
    tokens = {
        name: {"__type": "AddedToken", "content": config[name], "lstrip": False, "normalized": True, "rstrip": False}
        for name in ("bos_token", "eos_token")
        if config.get(name)
    }
    about = {"tokenizer_class": tokenizer_class, "chat_template": template.read_text(), "add_bos_token": True}
    file.write_text(json.dumps(config | tokens | about))
    template.unlink()
    return folder


@pytest.mark.parametrize("name", PAIRS)
def test_a_newcomer_samples_reports_trains_evaluates_and_merges(name, tmp_path):
    family, tokenizer_class, ends, amateur_prompt = PAIRS[name]
    expert = publish(tmp_path / "expert", family, "expert", tokenizer_class)
    amateur = publish(tmp_path / "amateur", QWEN, "amateur", "Qwen2Tokenizer", vocab_size=120)
    files = {split: tmp_path / f"{split}.jsonl" for split in ("sample", "test")}
    for split, file in files.items():
        file.write_text("".join(json.dumps(row) + "\n" for row in rows(split, 16)))
    run, out, merged, results = (tmp_path / name for name in ("run", "adapter", "merged", "results.json"))

    def do(package, *words):
        said = command(package, *words)
        assert said.returncode == 0, said.stderr
        return said.stdout + said.stderr

    with running_server(expert, amateur, tmp_path) as server:
        do("client", "sample", files["sample"], run, *server.options, "--max-tokens", 32)
    do("client", "report", run, "-o", tmp_path / "report.html")
    do("trainer", "train", run, "--model", expert, "--output", out, "--max-steps", 3, "--batch-size", 4)
    benchmark = f"unseen={files['test']}"
    words = "--benchmark", benchmark, "--limit", 8, "--max-tokens", 32, "-o", results
    do("trainer", "evaluate", expert, "--adapter", out, *words)
    do("trainer", "merge", expert, out, merged)

    manifest, totals = Run(str(run)).manifest(), Run(str(run)).completion().totals
    assert (manifest.end_token_ids, manifest.amateur_prompt) == (ends, amateur_prompt)
    assert totals.problems == 16 and totals.failed == 0 and totals.kept > 0
    assert "How many" in (tmp_path / "report.html").read_text()
    unseen = json.loads(results.read_text())["benchmarks"]["unseen"]
    assert unseen["n"] == 8 and "paired" in unseen
    assert (merged / "model.safetensors").is_file()
    for line in Run(str(run)).trajectories():
        assert not set(ends) & set(line.token_ids[:-1].tolist())
