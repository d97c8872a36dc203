"""The published sample files: what is imported is what they say, and what is not is named."""

import gzip
import json
import re
import shutil
import sys

import numpy as np
import pytest
from support.servers.real_server import DEMO
from tokenizers import Tokenizer

from client.__main__ import main
from client.errors import ModelError, RunError
from client.models.chat_template import ChatTemplate
from client.problems.reader import read_problems
from client.protocol.requests import ContrastSettings
from client.runs.published import PREFIX_TOKENS, import_samples
from client.runs.run import Run

EXPERT = DEMO / "expert"
QUESTIONS = ["Ann has 3 books. How many books does Ann have now?", "Tom has 5 eggs. He buys 2 more. How many eggs?"]
ANSWER = "3+4=7. 7-2=5. The answer is 5."
SETTINGS = ContrastSettings()


@pytest.fixture(scope="module")
def tokenizer():
    return Tokenizer.from_file(str(EXPERT / "tokenizer.json"))


@pytest.fixture
def rows(tokenizer):
    """A file as the published sampling writes it: a row a kept step, problem by problem."""
    rng = np.random.default_rng(0)
    ids = tokenizer.encode(ANSWER, add_special_tokens=False).ids
    made = []
    for question in QUESTIONS:
        for step in (2, 5, 6, len(ids) - 1):
            others = rng.choice([token for token in range(20, 100) if token != ids[step]], 2, replace=False)
            label = [ids[step], *map(int, others)]
            weights = rng.dirichlet(np.ones(3))
            made.append(
                {
                    "prompt_id": question,
                    "step": step,
                    "prefix": tokenizer.decode(ids[:step], skip_special_tokens=False),
                    "tokens": [tokenizer.decode([token], skip_special_tokens=False) for token in label],
                    "token_ids": label,
                    "weights": sorted(weights.tolist(), reverse=True),
                    "kl_divergence": 0.4 + step,
                }
            )
    return made


def write(file, rows):
    file.write_text("".join((row if isinstance(row, str) else json.dumps(row)) + "\n" for row in rows))
    return file


def contents(folder):
    return {file: (file.read_bytes(), file.stat().st_mtime_ns) for file in folder.rglob("*") if file.is_file()}


def test_what_is_imported_is_what_the_file_says(rows, tokenizer, tmp_path):
    run = Run(str(tmp_path / "run"))
    imported = import_samples(write(tmp_path / "samples.jsonl", rows), run, EXPERT, SETTINGS)
    assert not imported.left_out.counts and imported.whole_model
    ids = tokenizer.encode(ANSWER, add_special_tokens=False).ids
    samples = list(run.samples())
    assert len(samples) == 2
    for question, sample, mine in zip(QUESTIONS, samples, (rows[:4], rows[4:]), strict=True):
        template = ChatTemplate(EXPERT).render("Please reason step by step.", question)
        assert tokenizer.decode(sample.prompt_token_ids.tolist(), skip_special_tokens=False) == template
        assert question in template
        assert sample.token_ids.tolist() == ids  # the last is the label's heaviest, which the greedy expert took
        kept = sample.contrast
        assert kept.steps.tolist() == [row["step"] for row in mine] and kept.mask_complete.all()
        np.testing.assert_allclose(kept.kl_lower_bound, [row["kl_divergence"] for row in mine], rtol=1e-6)
        assert kept.label_ids.tolist() == [token for row in mine for token in row["token_ids"]]
        np.testing.assert_allclose(kept.label_weights, [w for row in mine for w in row["weights"]], rtol=1e-6)
        assert kept.label_offsets.tolist() == [0, 3, 6, 9, 12]
    totals = run.completion().totals
    assert (totals.kept, totals.trajectories, totals.tokens) == (8, 2, 2 * len(ids))


def test_an_imported_run_is_one_that_the_trainer_takes_with_the_expert_it_names(rows, tmp_path):
    dataset = pytest.importorskip("trainer.data.dataset")
    run = Run(str(tmp_path / "run"))
    import_samples(write(tmp_path / "samples.jsonl", rows), run, EXPERT, SETTINGS)
    from support.training.reading import read_training_set

    limits = dataset.Limits(run.manifest().expert.vocab_size)
    training = read_training_set(run, dataset.ModelFolder(EXPERT), limits)
    assert training.kept_steps == 8 and training.sealed
    with pytest.raises(RunError, match="was not sampled from the model"):
        read_training_set(run, dataset.ModelFolder(DEMO / "amateur"), limits)


def test_without_weights_the_trainer_refuses_and_the_import_says_so(rows, tmp_path, monkeypatch, capsys):
    folder = tmp_path / "tokenizer"
    folder.mkdir()
    for name in ("tokenizer.json", "tokenizer_config.json", "chat_template.jinja"):
        shutil.copy(EXPERT / name, folder)
    file = write(tmp_path / "samples.jsonl", [*rows, "{"])
    words = ["lightreasoner-client", "import", file, tmp_path / "run", "--tokenizer", folder]
    monkeypatch.setattr(sys, "argv", list(map(str, words)))
    with pytest.raises(SystemExit) as ended:
        main()
    said = capsys.readouterr().out
    assert (
        not ended.value.code and "8 kept steps of 2 problems" in said and "is not a JSON object (first: line 9)" in said
    )
    assert "has no weights: lightreasoner-trainer will refuse" in said
    dataset = pytest.importorskip("trainer.data.dataset")
    from support.training.reading import read_training_set

    with pytest.raises(RunError, match=r"weights none in run\.json"):
        read_training_set(Run(str(tmp_path / "run")), dataset.ModelFolder(EXPERT), dataset.Limits(110))


def changed(row, **changes):
    return {**row, **changes}


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        (lambda row: "not json", "is not a JSON object"),
        (lambda row: "[1]", "is not a JSON object"),
        (lambda row: {name: value for name, value in row.items() if name != "weights"}, "lacks a field"),
        (lambda row: changed(row, step="5"), "lacks a field"),
        (lambda row: changed(row, step=True), "lacks a field"),
        (lambda row: changed(row, step=0, prefix=""), "lacks a field"),
        (lambda row: changed(row, prompt_id=17), "lacks a field"),
        (lambda row: changed(row, token_ids=None), "lacks a field"),
        (lambda row: changed(row, kl_divergence="much"), "lacks a field"),
        (lambda row: changed(row, weights=row["weights"][:2]), "not a distribution"),
        (lambda row: changed(row, weights=[0.5, 0.2, 0.1]), "not a distribution"),
        (lambda row: changed(row, weights=[1.5, -0.5, 0.0]), "not a distribution"),
        (lambda row: changed(row, weights=[float("nan"), 0.5, 0.5]), "lacks a field|not a distribution|not a JSON"),
        (lambda row: changed(row, token_ids=[row["token_ids"][0]] * 3), "not a distribution"),
        (lambda row: changed(row, token_ids=[*row["token_ids"][:2], 110]), "not a distribution"),
        (lambda row: changed(row, token_ids=[], weights=[], tokens=[]), "not a distribution"),
        (lambda row: changed(row, tokens=["a", "b", "c"]), "another model's file"),
        (lambda row: changed(row, kl_divergence=0.39), "below beta"),
        (lambda row: changed(row, step=2), "repeats a step"),
        (lambda row: changed(row, prefix="9" + row["prefix"][1:]), "not the beginning"),
        (lambda row: changed(row, step=7), "not the beginning"),
        (lambda row: changed(row, step=100), "does not tokenise"),
    ],
)
def test_a_row_that_cannot_be_imported_is_left_out_and_counted_by_its_reason(rows, tmp_path, change, reason):
    rows[1] = change(rows[1])
    run = Run(str(tmp_path / "run"))
    imported = import_samples(write(tmp_path / "samples.jsonl", rows), run, EXPERT, SETTINGS)
    (line,) = imported.left_out.lines()
    assert re.search(reason, line) and "1 rows" in line and "(first: line 2)" in line
    assert [len(sample.contrast.steps) for sample in run.samples()] == [3, 4]


def test_a_prefix_that_reads_otherwise_once_it_is_tokenised_is_left_out_though_its_length_is_right(rows, tmp_path):
    rows[3]["prefix"] = rows[3]["prefix"][:-1] + "€"  # the tokenizer has one unknown token for it
    run = Run(str(tmp_path / "run"))
    imported = import_samples(write(tmp_path / "samples.jsonl", rows), run, EXPERT, SETTINGS)
    assert [line.split(": ")[1] for line in imported.left_out.lines()] == [PREFIX_TOKENS.split(": ")[0] + " (first"]
    assert [len(sample.contrast.steps) for sample in run.samples()] == [3, 4]


def test_rows_that_stand_apart_from_their_problem_are_left_out(rows, tmp_path):
    run = Run(str(tmp_path / "run"))
    imported = import_samples(write(tmp_path / "s.jsonl", [*rows[:3], *rows[4:], rows[3]]), run, EXPERT, SETTINGS)
    assert list(imported.left_out.counts.values()) == [1] and imported.left_out.lines()[0].endswith("line 8)")
    assert [len(sample.contrast.steps) for sample in run.samples()] == [3, 4]


def test_weights_in_bfloat16_are_brought_back_to_a_sum_of_one(rows, tmp_path):
    rows[0]["weights"] = [weight * 1.01 for weight in rows[0]["weights"]]
    run = Run(str(tmp_path / "run"))
    import_samples(write(tmp_path / "samples.jsonl", rows), run, EXPERT, SETTINGS)
    assert next(run.samples()).contrast.label_weights[:3].sum() == pytest.approx(1.0, abs=1e-6)


def test_a_file_of_which_nothing_can_be_used_makes_no_run(rows, tmp_path):
    for lines in ([changed(row, tokens=["x", "y", "z"]) for row in rows], []):
        with pytest.raises(RunError, match=r"no row of .* can be imported"):
            import_samples(write(tmp_path / "samples.jsonl", lines), Run(str(tmp_path / "run")), EXPERT, SETTINGS)
    with pytest.raises(RunError, match="cannot be read"):
        import_samples(tmp_path / "nowhere.jsonl", Run(str(tmp_path / "run")), EXPERT, SETTINGS)
    assert not (tmp_path / "run").exists()


def test_the_same_import_again_leaves_the_same_and_another_file_is_refused(rows, tmp_path):
    file, run = write(tmp_path / "samples.jsonl", rows), Run(str(tmp_path / "run"))
    with gzip.open(tmp_path / "samples.jsonl.gz", "wt") as packed:
        packed.write(file.read_text())
    import_samples(file, run, EXPERT, SETTINGS)
    before = run.bucket.get("samples/part-000000.parquet")
    import_samples(tmp_path / "samples.jsonl.gz", run, EXPERT, SETTINGS)
    assert run.parts("samples") == ["part-000000"] and run.bucket.get("samples/part-000000.parquet") == before
    with pytest.raises(RunError, match=r"problems: 2 problems, digest \w{12}… against 1 problem, digest \w{12}…"):
        import_samples(write(tmp_path / "fewer.jsonl", rows[:4]), run, EXPERT, SETTINGS)


@pytest.mark.parametrize("sealed", [True, False])
def test_another_file_of_the_same_questions_is_refused_and_nothing_is_written(rows, tmp_path, sealed):
    file, run = write(tmp_path / "samples.jsonl", rows[:-1]), Run(str(tmp_path / "run"))
    import_samples(file, run, EXPERT, SETTINGS)
    if not sealed:
        run.reopen()
    before = contents(tmp_path / "run")
    with pytest.raises(RunError, match=r"other settings; [^\n]*\n  imported_digest: \w{12}… against \w{12}…$"):
        import_samples(write(file, rows), run, EXPERT, SETTINGS)
    with pytest.raises(RunError, match=r"\n  alpha: 0\.2 against 0\.3$"):
        import_samples(write(file, rows[:-1]), run, EXPERT, ContrastSettings(alpha=0.3))
    assert contents(tmp_path / "run") == before


def test_the_same_file_again_writes_nothing_into_a_sealed_run_and_says_the_same(rows, tmp_path):
    file, run = write(tmp_path / "samples.jsonl", [*rows, "{"]), Run(str(tmp_path / "run"))
    first = import_samples(file, run, EXPERT, SETTINGS)
    (tmp_path / "run" / "samples" / "part-000000.parquet").write_bytes(b"as another version wrote it")
    before = contents(tmp_path / "run")
    again = import_samples(file, run, EXPERT, SETTINGS)
    assert again == first and again.left_out.lines() and contents(tmp_path / "run") == before


def test_an_import_that_was_cut_off_is_finished_by_the_same_call(rows, tmp_path, monkeypatch):
    monkeypatch.setattr("client.runs.published.PART_SAMPLES", 1)
    file, run = write(tmp_path / "samples.jsonl", rows), Run(str(tmp_path / "run"))
    import_samples(file, run, EXPERT, SETTINGS)
    run.reopen()
    (tmp_path / "run" / "samples" / "part-000001.parquet").unlink()
    import_samples(file, run, EXPERT, SETTINGS)
    assert len(list(run.samples())) == 2 and run.completion().totals.kept == 8


def test_a_run_that_was_imported_before_files_had_digests_is_read_and_not_joined(rows, tmp_path):
    file, run = write(tmp_path / "samples.jsonl", rows), Run(str(tmp_path / "run"))
    import_samples(file, run, EXPERT, SETTINGS)
    old = run.manifest().model_dump(exclude={"imported_digest"})
    (tmp_path / "run" / "run.json").write_text(json.dumps(old))
    assert run.manifest().imported_digest is None and len(list(run.samples())) == 2
    with pytest.raises(RunError, match=r"imported_digest: None against \w{12}…"):
        import_samples(file, run, EXPERT, SETTINGS)


def test_a_packed_file_that_is_damaged_is_named(rows, tmp_path):
    packed = bytearray(gzip.compress("".join(f"{json.dumps(row)}\n" for row in rows).encode()))
    packed[10:30] = b"\xff" * 20  # no block of deflate begins so
    (tmp_path / "samples.jsonl.gz").write_bytes(packed)
    with pytest.raises(RunError, match=r"samples\.jsonl\.gz cannot be read: .*give the JSONL"):
        import_samples(tmp_path / "samples.jsonl.gz", Run(str(tmp_path / "run")), EXPERT, SETTINGS)
    assert not (tmp_path / "run").exists()


def test_many_problems_become_several_parts(rows, tmp_path, monkeypatch):
    monkeypatch.setattr("client.runs.published.PART_SAMPLES", 3)
    several = [changed(row, prompt_id=f"{row['prompt_id']} {n}") for n in range(4) for row in rows]
    run = Run(str(tmp_path / "run"))
    import_samples(write(tmp_path / "samples.jsonl", several), run, EXPERT, SETTINGS)
    assert len(run.parts("samples")) == 3 and len(list(run.samples())) == 8


def test_problems_have_the_ids_that_a_problem_set_without_ids_would_give_them(rows, tmp_path):
    run = Run(str(tmp_path / "run"))
    import_samples(write(tmp_path / "samples.jsonl", rows), run, EXPERT, SETTINGS)
    problems = read_problems(str(write(tmp_path / "problems.jsonl", [{"question": text} for text in QUESTIONS])))
    assert [problem.id for problem in problems] == [sample.problem_id for sample in run.samples()]


TEMPLATES = {
    "blocks": "{% for m in messages %}\n {% if m.role == 'user' %}\n{{ m.content|trim }}\n {% endif %}\n{% endfor %}",
    "tokens": "{{ bos_token }}{% for m in messages %}{{ m['content'] }}{{ eos_token }}{% endfor %}",
    "tojson": "{{ messages | tojson }}{% if add_generation_prompt %}>{% endif %}",
    "loop": "{% for m in messages %}{% if loop.first %}{% continue %}{% endif %}{{ m.content }}{% break %}{% endfor %}",
}


@pytest.mark.parametrize("template", [None, *TEMPLATES])
def test_prompts_are_rendered_as_transformers_renders_them(template, tmp_path):
    transformers = pytest.importorskip("transformers")
    folder = shutil.copytree(EXPERT, tmp_path / "expert")
    if template:
        (folder / "chat_template.jinja").write_text(TEMPLATES[template])
    loaded = transformers.AutoTokenizer.from_pretrained(folder)
    messages = [{"role": "system", "content": "Think <é>."}, {"role": "user", "content": " What is 7×8? "}]
    theirs = loaded.apply_chat_template(messages, add_generation_prompt=True, tokenize=False)
    assert ChatTemplate(folder).render("Think <é>.", " What is 7×8? ") == theirs


def test_a_template_that_is_missing_refuses_or_reaches_out_of_its_sandbox_is_an_error(tmp_path):
    folder = shutil.copytree(EXPERT, tmp_path / "expert")
    for template in ("{{ raise_exception('no system role') }}", "{{ messages.__class__.__mro__ }}"):
        (folder / "chat_template.jinja").write_text(template)
        with pytest.raises(ModelError, match="rejects the prompt"):
            ChatTemplate(folder).render("a", "b")
    (folder / "chat_template.jinja").write_text("{% if %}")
    with pytest.raises(ModelError, match="cannot be read"):
        ChatTemplate(folder)
    (folder / "chat_template.jinja").write_text("")
    with pytest.raises(ModelError, match="has no chat template"):
        ChatTemplate(folder)
