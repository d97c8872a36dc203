"""Evaluation through a real vLLM engine, against transformers and peft on the same prompts."""

import io
import json
import os
import re
import shutil
import signal
import sys
from contextlib import redirect_stdout, suppress
from dataclasses import dataclass
from datetime import date
from pathlib import Path

import numpy as np
import pytest
import torch
from peft import PeftModel
from safetensors.torch import load_file, save_file
from support.models.tiny_pair import WORDS, load, save_adapter, save_model, save_tokenizer
from transformers import AutoTokenizer
from vllm import SamplingParams
from vllm.lora.request import LoRARequest

from client.errors import LightReasonerError, ModelError
from client.models.fingerprints import model_fingerprint
from trainer.__main__ import main
from trainer.adapters.model_folder import ModelFolder
from trainer.evaluation.answer_engine import AnswerEngine
from trainer.evaluation.benchmarks import render
from trainer.evaluation.evaluate import benchmarks_of, check
from trainer.evaluation.records import Records
from trainer.grading.gold import Gold
from trainer.grading.grader import Grade, grade
from trainer.settings import Examination

pytestmark = pytest.mark.engine
CONTEXT, NEW_TOKENS, PROBLEMS = 96, 16, 24
SYSTEM = "The answer is"


@pytest.fixture(scope="module")
def adapter(tmp_path_factory, expert):
    return save_adapter(tmp_path_factory.mktemp("adapters") / "adapter", expert)


@pytest.fixture(scope="module")
def questions():
    rng = np.random.default_rng(4)
    return [f"Ann has {' + '.join(map(str, rng.integers(0, 10, 4)))} apples How many ?" for _ in range(PROBLEMS)]


@pytest.fixture(scope="module")
def prompts(expert, questions):
    tokenizer = AutoTokenizer.from_pretrained(expert)
    system = {"role": "system", "content": SYSTEM}
    conversations = [[system, {"role": "user", "content": question}] for question in questions]
    return tokenizer.apply_chat_template(conversations, add_generation_prompt=True, return_dict=False)


@pytest.fixture(scope="module")
def base_layout(tmp_path_factory, expert):
    """The expert as a base model is published: its files end at <|pad|>, and only its template closes with <|end|>.

    It names a wrong class for its tokenizer.
    """
    folder = shutil.copytree(expert, tmp_path_factory.mktemp("base") / "base")
    for name, ends in (
        ("tokenizer_config.json", {"eos_token": "<|pad|>", "tokenizer_class": "LlamaTokenizerFast"}),
        ("config.json", {"eos_token_id": 0}),
        ("generation_config.json", {"eos_token_id": 0}),
    ):
        (folder / name).write_text(json.dumps(json.loads((folder / name).read_text()) | ends))
    return folder


@pytest.fixture(scope="module")
def models(expert, adapter):
    return {False: load(expert), True: PeftModel.from_pretrained(load(expert), adapter)}


def greedy(model, tokenizer, prompt):
    with torch.no_grad():
        out = model.generate(
            input_ids=torch.tensor([prompt]), attention_mask=torch.ones(1, len(prompt), dtype=torch.long),
            max_new_tokens=NEW_TOKENS, do_sample=False, eos_token_id=[0, 2],
        )  # fmt: skip
    return tokenizer.decode(out[0, len(prompt) :], skip_special_tokens=True)


@dataclass(frozen=True)
class Evaluation:
    """One `evaluate` on the command line, and the engine that it used, still alive."""

    golds: list[str]
    outputs: dict[bool, list[str]]  # what transformers and peft answer, without and with the adapter
    stdout: str
    results: dict
    engine: AnswerEngine
    folder: Path


@pytest.fixture(scope="module")
def evaluation(tmp_path_factory, base_layout, expert, adapter, models, questions, prompts):
    """Gold answers are taken from the models' own outputs, so that each is right on some problems."""
    folder = tmp_path_factory.mktemp("evaluation")
    tokenizer = AutoTokenizer.from_pretrained(expert)
    outputs = {adapted: [greedy(model, tokenizer, prompt) for prompt in prompts] for adapted, model in models.items()}
    golds = [next((c for c in outputs[index % 3 == 0][index] if c.isdigit()), "5") for index in range(PROBLEMS)]
    rows = [{"question": q, "answer": f"It is so.\n#### {gold}"} for q, gold in zip(questions, golds, strict=True)]
    rows.append({"question": "Ann has " + "apples " * CONTEXT, "answer": "5"})
    (folder / "digits.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    other = save_adapter(folder / "other", expert, seed=5)
    words = (
        f"evaluate {base_layout} --adapter {other} --adapter {adapter} --benchmark digits={folder}/digits.jsonl".split()
    )
    words += ["-o", str(folder / "results.json"), "--max-tokens", str(NEW_TOKENS), "--system-prompt", SYSTEM]
    engines: list[AnswerEngine] = []
    close = AnswerEngine.close
    with pytest.MonkeyPatch.context() as patch, redirect_stdout(io.StringIO()) as stdout:
        patch.setattr(AnswerEngine, "close", lambda engine: engines.append(engine))
        patch.setattr(sys, "argv", ["lightreasoner-trainer", *words])
        with suppress(SystemExit):
            main()
    results = json.loads((folder / "results.json").read_text())
    yield Evaluation(golds, outputs, stdout.getvalue(), results, engines[0], folder)
    close(engines[0])


@pytest.mark.parametrize("adapted", [False, True])
def test_vllm_with_and_without_the_adapter_says_what_transformers_and_peft_say(
    evaluation, models, prompts, adapter, adapted
):
    """Generated log-probabilities: with LoRA on, vLLM 0.32's CPU build dies of prompt_logprobs."""
    outputs = evaluation.engine.llm.generate(
        [{"prompt_token_ids": prompt} for prompt in prompts],
        SamplingParams(temperature=0.0, max_tokens=8, logprobs=20, ignore_eos=True),
        lora_request=LoRARequest("adapter", 2, str(adapter)) if adapted else None,
        use_tqdm=False,
    )
    for prompt, output in zip(prompts, outputs, strict=True):
        said = list(output.outputs[0].token_ids)
        with torch.no_grad():
            logits = models[adapted](torch.tensor([prompt + said])).logits[0, len(prompt) - 1 : -1]
        for expected, found in zip(logits.log_softmax(-1), output.outputs[0].logprobs, strict=True):
            ids = list(found)
            np.testing.assert_allclose([found[token].logprob for token in ids], expected[ids], atol=1e-4)


def test_an_answer_is_cut_where_the_context_ends_and_a_prompt_that_fills_it_gets_none(evaluation, prompts):
    known = max(range(PROBLEMS), key=lambda index: len(evaluation.outputs[False][index]))
    filler = prompts[0] * 20
    asked = [filler[:CONTEXT], prompts[known], filler[: CONTEXT - 3]]
    found = dict(evaluation.engine.answers(asked, Examination(max_tokens=NEW_TOKENS), None))
    (none,), (whole,), (cut,) = (found[place] for place in range(3))
    assert list(found) == [0, 2, 1]  # each as soon as it has ended
    assert none == "" and whole == evaluation.outputs[False][known]
    tokenizer = AutoTokenizer.from_pretrained(evaluation.results["model"])
    assert len(tokenizer(cut, add_special_tokens=False).input_ids) <= 3


def test_the_template_is_rendered_once_and_an_empty_system_prompt_is_no_message(expert):
    model, tokenizer = ModelFolder(expert), AutoTokenizer.from_pretrained(expert)
    both = "<|system|>The answer is<|end|><|user|>Ann has<|end|><|assistant|>"
    assert tokenizer.decode(render(model, "Ann has", Examination(system_prompt=SYSTEM))) == both
    alone = render(model, "Ann has", Examination(system_prompt=""))
    assert tokenizer.decode(alone) == "<|user|>Ann has<|end|><|assistant|>"


def test_a_template_of_ones_own_its_variables_and_its_date_are_what_is_asked(tmp_path, expert):
    (tmp_path / "mine.jinja").write_text("{{ strftime_now('%d') }}{{ words }}{{ messages[-1].content }}")
    (tmp_path / "b.jsonl").write_text('{"question": "Ann has 2", "answer": "2"}\n')
    model, asked = ModelFolder(expert, None, tmp_path / "mine.jinja"), {"b": str(tmp_path / "b.jsonl")}
    examination = Examination(chat_template_kwargs={"words": " How many"}, date="2026-01-31")
    assert model.tokenizer.decode(render(model, " has 2", examination)) == "31 How many has 2"
    records, today = tmp_path / "r.jsonl", date.today().isoformat()
    Records(records, benchmarks_of(model, asked, examination, records)[1] | {"adapters": {}}).close()
    assert json.loads(records.read_text())["evaluation"].items() >= {"date": today, "end_token_ids": [2]}.items()
    records.write_text(records.read_text().replace(today, "2026-01-31"))
    (benchmark,), about = benchmarks_of(model, asked, examination, records)  # another day
    assert about["date"] == "2026-01-31" and model.tokenizer.decode(benchmark.questions[0].prompt).startswith("31")
    early = json.loads(records.read_text())["evaluation"]
    del early["end_token_ids"]
    records.write_text(json.dumps({"evaluation": early}) + "\n")
    with pytest.raises(LightReasonerError, match=r"end_token_ids None there, \[2\] now"):
        check(model, asked, examination, records)


def test_before_and_after_are_counted_as_transformers_and_peft_answer(evaluation):
    figures = evaluation.results["benchmarks"]["digits"]
    right = {
        adapted: [grade(Gold(gold), text).correct for gold, text in zip(evaluation.golds, texts, strict=True)]
        for adapted, texts in evaluation.outputs.items()
    }
    pairs = list(zip(right[False], right[True], strict=True))
    assert 0 < figures["correct"] == sum(right[True])
    assert 0 < figures["before"]["correct"] == sum(right[False])
    assert figures["paired"]["fixed"] == pairs.count((False, True)) > 0
    assert figures["paired"]["broken"] == pairs.count((True, False)) > 0
    assert 0 < figures["paired"]["p"] <= 1


def test_results_are_written_as_json_and_shown_as_a_table(evaluation, base_layout, adapter):
    results = evaluation.results
    assert results.keys() == {"benchmarks", "models", "model", "adapters", "settings"}
    other = str(evaluation.folder / "other")
    assert list(results["models"]) == ["base", other, str(adapter)]
    assert results["models"][str(adapter)]["digits"] == {
        name: value for name, value in results["benchmarks"]["digits"].items() if name != "before"
    }
    figures = results["benchmarks"]["digits"]
    assert figures.keys() == {"n", "correct", "accuracy", "interval", "before", "paired"}
    assert figures["n"] == PROBLEMS + 1 and figures["accuracy"] == figures["correct"] / figures["n"]
    low, high = figures["interval"]
    assert 0 <= low < figures["accuracy"] < high <= 1
    assert figures["before"].keys() == {"correct", "accuracy", "interval"}
    assert (results["model"], results["adapters"]) == (str(base_layout), [other, str(adapter)])
    assert results["settings"]["max_tokens"] == NEW_TOKENS and results["settings"]["system_prompt"] == SYSTEM
    for word in (
        "digits",
        "base",
        "fixed",
        "broken",
        "McNemar's p",
        f"{figures['accuracy']:.1%} [{low:.1%}",
    ):
        assert word in evaluation.stdout
    assert "digits: 1 prompts fill the context of 96 tokens; counted as wrong" in evaluation.stdout


def test_every_output_is_kept_with_its_grade_and_examples_are_shown(evaluation, adapter):
    first, *lines = (evaluation.folder / "results.jsonl").read_text().splitlines()
    assert json.loads(first)["evaluation"]["max_tokens"] == NEW_TOKENS
    records = sorted(map(json.loads, lines), key=lambda record: record["number"])  # they come as they end
    assert len(records) == 3 * (PROBLEMS + 1)
    by_model = ["base", *evaluation.results["adapters"]]
    mine = [record for record in records if record["model"] == str(adapter)][:PROBLEMS]
    assert [record["output"] for record in mine] == evaluation.outputs[True]
    assert [record["gold"] for record in mine] == evaluation.golds
    outputs = [[record["output"] for record in records if record["model"] == model] for model in by_model]
    assert len({tuple(of_one) for of_one in outputs}) == 3
    for record in records:
        assert grade(Gold(record["gold"]), record["output"]) == Grade(record["extracted"], record["correct"])
    text = (evaluation.folder / "results.md").read_text()
    assert f"## fixed by {adapter}: digits" in text and f"## broken by {adapter}: digits" in text
    assert "| benchmark | model | n | accuracy | fixed | broken | McNemar's p |" in text


@pytest.mark.parametrize(("number", "code"), [(signal.SIGINT, 130), (signal.SIGTERM, 143)])
def test_an_evaluation_that_was_stopped_keeps_every_output_and_asks_only_for_what_is_missing(
    tmp_path, evaluation, trainer_cli, monkeypatch, number, code
):
    """Killed once, when its last line is cut, then stopped by a signal as vLLM starts and at an output."""
    folder = shutil.copytree(evaluation.folder, tmp_path / "again")
    records = folder / "results.jsonl"
    whole = records.read_bytes()
    records.write_bytes(whole[: len(whole) - 2500])  # in the middle of a line
    left = records.read_bytes().count(b"\n") - 1
    assert 0 < left < 3 * (PROBLEMS + 1) - 5
    settings, total = evaluation.results["settings"], 3 * (PROBLEMS + 1)
    words = ["evaluate", evaluation.results["model"], "--benchmark", f"digits={settings['files']['digits']}"]
    words += [word for path in evaluation.results["adapters"] for word in ("--adapter", path)]
    words += ["-o", folder / "results.json", "--system-prompt", SYSTEM, "--max-tokens"]
    refused, _, err = trainer_cli(*words, NEW_TOKENS + 1)
    assert refused == 1 and f"--max-tokens {NEW_TOKENS} there, {NEW_TOKENS + 1} now" in err

    added, add = [], Records.add
    monkeypatch.setattr(AnswerEngine, "close", lambda _: None)
    monkeypatch.setattr("trainer.evaluation.evaluate.PLAIN_SECONDS", 0)

    def stops_at(place):
        """The same engine, which a signal comes to as it starts (0), or once it has given so many outputs."""
        added.clear()

        def told(*_):
            if len(added) == place:
                os.kill(os.getpid(), number)
            return evaluation.engine

        monkeypatch.setattr("trainer.evaluation.evaluate.AnswerEngine", told)
        monkeypatch.setattr(Records, "add", lambda mine, some: (add(mine, some), added.append(1), told()))
        return trainer_cli(*words, NEW_TOKENS)

    for place in (0, 5):
        found, shown, err = stops_at(place)
        assert found == code and "Traceback" not in err, err
        assert f"resuming: {left} of {total} outputs of digits are there" in shown
        assert f"starting vLLM for {total - left} outputs" in err
        assert f"stopped: {left + place} outputs are in {records}; the same command resumes" in " ".join(err.split())
        evaluation.engine.llm.llm_engine.abort_request([*map(str, range(PROBLEMS + 1))])
    found, shown, err = stops_at(None)
    assert found == 0 and f"resuming: {left + 5} of {total} outputs of digits are there" in shown, err
    assert len(added) == total - left - 5 and re.search(rf"digits, adapter: \d+ of {total} outputs, .* tokens/s\n", err)
    assert sorted(records.read_bytes().splitlines()) == sorted(whole.splitlines())
    assert json.loads((folder / "results.json").read_text()) == evaluation.results


def test_several_outputs_a_problem_give_pass_at_k_and_the_results_go_into_a_run(
    tmp_path, expert, run, evaluation, trainer_cli
):
    mine = shutil.copytree(str(run), tmp_path / "run")
    file = evaluation.results["settings"]["files"]["digits"]
    words = ("evaluate", expert, "--benchmark", f"digits={file}", "--limit", 6, "--system-prompt", SYSTEM)
    words += ("--max-tokens", 8, "--n", 4, "-o", tmp_path / "sampled.json", "--run", mine)
    code, _, err = trainer_cli(*words)
    assert code == 1 and "--temperature" in err
    code, shown, err = trainer_cli(*words, "--temperature", 1.0, "--seed", 3)
    assert code == 0, err
    figures = json.loads((tmp_path / "sampled.json").read_text())["benchmarks"]["digits"]
    records = [json.loads(line) for line in (tmp_path / "sampled.jsonl").read_text().splitlines()[1:]]
    assert len(records) == 24 and len({record["output"] for record in records if record["number"] == 0}) > 1
    right = [sum(r["correct"] for r in records if r["number"] == number) for number in range(6)]
    assert (figures["n"], figures["samples"], figures["correct"]) == (6, 4, sum(right))
    assert figures["pass_at"]["1"] == pytest.approx(sum(right) / 24)
    assert figures["pass_at"]["4"] == pytest.approx(sum(count > 0 for count in right) / 6)
    assert "pass@4" in shown
    assert (mine / "evaluation" / "sampled.json").read_text() == (tmp_path / "sampled.json").read_text()


def test_the_merged_model_loads_in_vllm_and_scores_what_the_adapter_scored(
    tmp_path, evaluation, base_layout, adapter, trainer_cli
):
    trainer_cli("merge", base_layout, adapter, tmp_path / "merged")
    settings = evaluation.results["settings"]
    code, shown, err = trainer_cli(
        *("evaluate", tmp_path / "merged", "--benchmark", f"digits={settings['files']['digits']}"),
        *("-o", tmp_path / "results.json", "--max-tokens", NEW_TOKENS, "--system-prompt", SYSTEM),
    )
    assert code == 0, err
    figures = json.loads((tmp_path / "results.json").read_text())["benchmarks"]["digits"]
    expected = evaluation.results["benchmarks"]["digits"]
    assert figures == {name: expected[name] for name in ("n", "correct", "accuracy", "interval")}
    assert "accuracy" in shown and "McNemar" not in shown


def with_tensors(folder, change):
    weights = load_file(folder / "model.safetensors")
    change(weights)
    save_file(weights, folder / "model.safetensors", {"format": "pt"})
    return folder


def test_what_is_wrong_with_the_input_is_said_before_an_engine_starts(
    tmp_path, expert, adapter, trainer_cli, monkeypatch
):
    (tmp_path / "good.jsonl").write_text('{"question": "Ann has 2", "answer": "2"}\n')
    (tmp_path / "bad.jsonl").write_text('{"question": "Ann has", "answer": "2"}\n{"question": "How many"}\n')
    good = ("--benchmark", f"good={tmp_path / 'good.jsonl'}")
    monkeypatch.setattr(sys, "stdin", io.TextIOWrapper((tmp_path / "bad.jsonl").open("rb")))
    foreign = shutil.copytree(adapter, tmp_path / "foreign")
    other = save_model(tmp_path / "other", seed=9)
    (foreign / "lightreasoner.json").write_text(json.dumps({"base_model_fingerprint": model_fingerprint(other)}))
    mute = save_model(tmp_path / "mute")
    save_tokenizer(mute, template="", words=WORDS)
    (mute / "chat_template.jinja").unlink(missing_ok=True)
    twofold = save_model(tmp_path / "twofold")
    about = twofold / "config.json"
    about.write_text(json.dumps(json.loads(about.read_text()) | {"is_encoder_decoder": True}))
    up = "model.layers.1.mlp.up_proj.weight"  # vLLM joins it with another
    lacking = with_tensors(save_model(tmp_path / "lacking"), lambda weights: weights.pop(up))
    more = with_tensors(save_model(tmp_path / "more"), lambda weights: weights.update(odd=weights[up].clone()))
    (tmp_path / "mine.md").write_text("my own notes")
    for words, code, message in (
        ((expert, *good, "-o", tmp_path / "mine.json"), 1, "mine.md exists, but "),
        ((expert, "--benchmark", f"bad={tmp_path / 'bad.jsonl'}"), 1, "bad.jsonl:2: no answer"),
        ((expert, "--benchmark", "bad=-"), 1, "standard input:2: no answer"),
        ((expert, "--benchmark", "bad=none.jsonl"), 1, "no problem set at none.jsonl"),
        ((expert, *good, "--adapter", tmp_path), 1, "no adapter at"),
        ((expert, *good, "--adapter", foreign), 1, "was made for other weights"),
        ((mute, *good), 1, "has no chat template"),
        ((lacking, *good), 1, "it lacks 1 tensors, such as model.layers.1.mlp.up_proj.weight"),
        ((more, *good), 1, "it has 1 tensors unknown to its architecture, such as odd"),
        ((twofold, *good), 1, "describes an encoder-decoder (['LlamaForCausalLM']); a causal language model is needed"),
        ((tmp_path / "none", *good), 1, "no model folder at"),
        ((expert, *good, "-o", tmp_path / "no" / "r.json"), 1, "--output"),
        ((expert, *good, "-o", tmp_path / "results"), 1, "ends in .json"),
        ((expert, *good, "--adapter", adapter, "--adapter", adapter), 1, "given twice"),
        ((expert, *good, "--run", tmp_path), 1, "no RUN at"),
        ((expert, "--benchmark", "good.jsonl"), 2, "--benchmark"),
        ((expert, *good, *good), 2, "twice"),
    ):
        found, _, err = trainer_cli("evaluate", *words)
        assert found == code and message in " ".join(err.split()) and "Traceback" not in err, (words, err)
    assert (tmp_path / "mine.md").read_text() == "my own notes"


@pytest.mark.parametrize(
    ("changed", "reason"),
    [
        ({"use_dora": True}, "vLLM does not yet support DoRA"),
        ({"r": 1024}, "its LoRA rank is 1024"),
        ({"rank_pattern": {"q_proj": 1024}}, "its LoRA rank is 1024"),
        ({"modules_to_save": ["lm_head"]}, "Unsupported modules_to_save: ['lm_head']"),
        ({"bias": "all"}, "bias is not supported"),
        ({"trainable_token_indices": [7]}, "it trains rows of an embedding"),
    ],
)
def test_an_adapter_that_vllm_cannot_do_is_refused_before_an_engine_starts(
    tmp_path, expert, adapter, trainer_cli, monkeypatch, changed, reason
):
    monkeypatch.setattr("vllm.LLM", None)  # an engine that starts fails
    odd, file = shutil.copytree(adapter, tmp_path / "odd"), tmp_path / "rows.jsonl"
    (odd / "adapter_config.json").write_text(
        json.dumps(json.loads((odd / "adapter_config.json").read_text()) | changed)
    )
    file.write_text('{"question": "Ann has 1", "answer": "1"}\n')
    code, _, err = trainer_cli(
        "evaluate", expert, "--adapter", odd, "--benchmark", f"one={file}", "-o", tmp_path / "found.json"
    )
    assert code == 1 and f"vLLM does not take the adapter {odd}" in err and reason in err and "merge it" in err
    assert not (tmp_path / "found.jsonl").exists() or len((tmp_path / "found.jsonl").read_text().splitlines()) <= 1


def test_an_adapter_whose_layers_vllm_cannot_adapt_is_refused_before_anything_is_asked(tmp_path, adapter, evaluation):
    odd = shutil.copytree(adapter, tmp_path / "odd")
    file = odd / "adapter_model.safetensors"
    save_file({name.replace("q_proj", "rotary"): value for name, value in load_file(file).items()}, file)
    with pytest.raises(ModelError, match=f"vLLM does not take the adapter {odd}: .*rotary.*; merge it"):
        evaluation.engine.load(odd)


def test_outputs_that_another_template_or_adapter_gave_are_not_taken_up(tmp_path, expert, adapter, trainer_cli):
    model, tuned = (
        shutil.copytree(folder, tmp_path / name) for folder, name in ((expert, "model"), (adapter, "tuned"))
    )
    (tmp_path / "b.jsonl").write_text('{"question": "Ann has 2", "answer": "2"}\n')
    words = ("evaluate", model, "--adapter", tuned, "--benchmark", f"b={tmp_path / 'b.jsonl'}", "--max-tokens", 4)
    words += ("-o", tmp_path / "r.json", "--system-prompt", "")
    assert trainer_cli(*words)[0] == 0
    for file, old, new, named in (
        (model / "chat_template.jinja", "", "{{ 'How many' }}", "benchmark b has changed"),
        (tuned / "adapter_config.json", '"lora_alpha": ', '"lora_alpha": 1', f"adapter {tuned}"),
    ):
        before = file.read_text()
        file.write_text(new + before if not old else before.replace(old, new))
        code, _, err = trainer_cli(*words)
        assert code == 1 and named in " ".join(err.split()), (file, err)
        file.write_text(before)
    assert trainer_cli(*words)[0] == 0


def test_a_model_that_vllm_cannot_load_is_named_in_a_line(tmp_path, expert, evaluation, trainer_cli):
    odd = shutil.copytree(expert, tmp_path / "odd")
    config = json.loads((odd / "config.json").read_text())
    (odd / "config.json").write_text(json.dumps(config | {"architectures": ["NobodysForCausalLM"]}))
    words = ("evaluate", odd, "--benchmark", f"digits={evaluation.folder / 'digits.jsonl'}", "-o", tmp_path / "r.json")
    code, _, err = trainer_cli(*words)
    assert code == 1
    assert f"error: vLLM could not start {odd}: " in err and "NobodysForCausalLM" in err
    assert "VLLM_LOGGING_LEVEL=INFO shows its log" in err
