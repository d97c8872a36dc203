"""What is said of labels, cut answers and steps between two betas: in the summary, in compare, in the report."""

import json
import re
from dataclasses import replace
from itertools import pairwise, product

import numpy as np
import pytest
from support.runs.made_run import VOCABULARY, make_trajectory, tokenizer_json
from support.runs.reported import make_run, plain_bounds, trajectories_of
from tokenizers import Tokenizer, decoders, models
from typer.testing import CliRunner

from client.__main__ import program
from client.models.detokenize import Detokenizer
from client.protocol.requests import ContrastSettings
from client.report.analysis import TokenKind
from client.report.findings import gather
from client.report.labels import told_apart
from client.report.page import report_page
from client.runs import tally
from client.runs.build import build_run
from client.runs.run import Run

MARKS = ["." * (1 + index // 4) + ",;:!"[index % 4] for index in range(VOCABULARY)]


def run_of(trajectories, folder, tokenizer=None, **changes):
    run = make_run(folder, trajectories, tokenizer, **changes)
    run.seal(run.totals(run.manifest()))
    return run


def printed(*words):
    result = CliRunner().invoke(program, list(map(str, words)), env={"COLUMNS": "200"})
    assert result.exit_code == 0, result.output
    return result.output


def plain_shifts(run):
    """(nats, overturned, problem, step) of every label, a loop a label."""
    of = {t.problem_id: t for t in run.trajectories()}
    found = []
    for sample in run.samples():
        t, kept = of[sample.problem_id], sample.contrast
        for step, a, b in zip(kept.steps, kept.label_offsets, kept.label_offsets[1:], strict=False):
            ids, weights = kept.label_ids[a:b].tolist(), kept.label_weights[a:b].astype(float)
            p = np.exp(t.expert_logprobs[step].astype(float))
            own = p[[t.top_ids[step].tolist().index(token) for token in ids]]
            nats = float((weights * np.log(weights / (own / own.sum()))).sum())
            found.append((nats, ids[int(weights.argmax())] != t.top_ids[step, 0], sample.problem_id, int(step)))
    return found


def test_totals_tell_how_far_labels_move_the_expert(tmp_path):
    trajectories = trajectories_of(12)
    run = run_of(trajectories, tmp_path / "run")
    shifts, plain = run.completion().totals.label_shifts, plain_shifts(run)
    nats = np.array([row[0] for row in plain])
    assert shifts.overturned == sum(row[1] for row in plain) and 0 < shifts.overturned < len(plain)
    assert shifts.overturned_share == pytest.approx(shifts.overturned / len(plain))
    assert shifts.mean == pytest.approx(nats.mean(), rel=1e-5) and shifts.largest == pytest.approx(nats.max(), rel=1e-5)
    for share, value in shifts.quantiles.items():
        assert value == pytest.approx(np.sort(nats)[int(float(share) * (len(nats) - 1))], rel=2e-3, abs=1e-6)
    odd = run.tally(run.manifest()).shifts.oddest
    pairs = [(label.best, label.heaviest) for label in odd]
    assert len(odd) == len(set(pairs)) == 8 and odd[0].nats == pytest.approx(nats.max())
    assert (odd[0].problem_id, odd[0].step) == max(plain)[2:]
    assert [label.nats for label in odd] == sorted((label.nats for label in odd), reverse=True)


def test_the_commonest_overturns_are_counted_and_told_everywhere(tmp_path):
    run = run_of(trajectories_of(40), tmp_path / "run")
    of = {t.problem_id: t for t in run.trajectories()}
    plain: dict[tuple[int, int], list[float]] = {}
    for sample in run.samples():
        t, kept = of[sample.problem_id], sample.contrast
        for step, a, b in zip(kept.steps, kept.label_offsets, kept.label_offsets[1:], strict=False):
            ids, weights = kept.label_ids[a:b].tolist(), kept.label_weights[a:b].astype(float)
            own = np.exp(t.expert_logprobs[step].astype(float))[[t.top_ids[step].tolist().index(i) for i in ids]]
            pair = int(t.top_ids[step, 0]), ids[int(weights.argmax())]
            if pair[0] != pair[1]:
                plain.setdefault(pair, []).append(float((weights * np.log(weights / (own / own.sum()))).sum()))
    shifts = run.tally(run.manifest()).shifts
    whole = shifts.totals().mean * run.completion().totals.kept
    expected = sorted(((-len(nats), pair, sum(nats) / whole) for pair, nats in plain.items()))[:8]
    assert [(-one.labels, (one.best, one.heaviest)) for one in shifts.overturns] == [row[:2] for row in expected]
    assert [one.share for one in shifts.overturns] == pytest.approx([row[2] for row in expected], rel=1e-5)
    rows = [(f"w{b}", f"w{h}", f"{-n:,}", f"{share:.1%}") for n, (b, h), share in expected]
    row = r'<tr><th scope="row"><code>(w\d+)</code></th><td><code>(w\d+)</code></td><td>(\d+)</td><td>([\d.]+%)</td>'
    assert re.findall(row, report_page(run)) == rows
    (best, heaviest, labels, _), share = rows[0], expected[0][2]
    line = f"expert's best → label's best: {best} → {heaviest} {labels} times ({share:.1%} of the shift), "
    assert f"commonest overturns, {line}" in printed("build", run, tmp_path / "new", "--labels", "contrast")
    assert f"commonest overturns in {run}, {line}" in printed("compare", run, tmp_path / "new")
    (told, _) = json.loads(printed("compare", run, tmp_path / "new", "--json"))["runs"]
    first = {"best": best, "heaviest": heaviest, "labels": int(labels), "at_least": False}
    assert told["overturns"][0] == first | {"share": pytest.approx(share)} and len(told["overturns"]) == len(rows)
    alone = run_of(trajectories_of(1), tmp_path / "alone")
    once = alone.tally(alone.manifest()).shifts.overturns
    assert once and {one.labels for one in once} == {1}
    assert "commonest overturns," not in printed("build", alone, tmp_path / "again", "--labels", "contrast")


def test_the_pairs_that_are_counted_are_bounded_and_the_frequent_ones_stay(tmp_path, monkeypatch):
    """Every second trajectory has the same steps."""
    run = run_of([make_trajectory(f"p{i}", 1 if i % 2 else i, tokens=20) for i in range(60)], tmp_path / "run")
    exact = run.tally(run.manifest()).shifts
    monkeypatch.setattr(tally, "MOST_OVERTURNS", 60)
    bounded = run.tally(run.manifest()).shifts
    page = report_page(run)
    assert f"<td>at least {bounded.overturns[0].labels}</td>" in page
    assert all(one.at_least for one in bounded.overturns) and not any(one.at_least for one in exact.overturns)
    assert len(exact._overturns) > 120 and len(bounded._overturns) <= 60
    assert {(one.best, one.heaviest) for one in bounded.overturns} >= {
        (one.best, one.heaviest) for one in exact.overturns if one.labels >= 30
    }


def test_the_shift_of_bounded_and_of_the_experts_own_labels_is_within_what_was_asked_for(tmp_path):
    run = run_of(trajectories_of(12), tmp_path / "run")
    for name, settings in {
        "bounded": {"max_shift": 0.1},
        "own": {"labels": "expert"},
        "gentle": {"labels": "tilt", "gamma": 0.25},
    }.items():
        build_run(run, Run(str(tmp_path / name)), ContrastSettings(**settings))
    means = {name: Run(str(tmp_path / name)).completion().totals.label_shifts for name in ("bounded", "own", "gentle")}
    assert means["bounded"].largest == pytest.approx(0.1, abs=1e-6) and means["own"].largest < 1e-6
    assert means["own"].overturned == 0 < means["gentle"].mean < run.completion().totals.label_shifts.mean


def test_answers_that_were_cut_and_trajectories_that_keep_nothing_are_counted_and_warned_of(tmp_path):
    trajectories = trajectories_of(12)
    trajectories = [replace(t, finish_reason="length") if i < 5 else t for i, t in enumerate(trajectories)]
    for t in trajectories[:3]:
        t.amateur_logprobs[:] = t.expert_logprobs
    run = run_of(trajectories, tmp_path / "run")
    totals = run.completion().totals
    assert (totals.cut, totals.without_kept_steps) == (5, 3)
    said = printed("build", run, tmp_path / "new", "--labels", "tilt")
    assert re.search(r"cut at --max-tokens\W+5\b", said) and re.search(r"without a kept step\W+3\b", said)
    assert "warning: 5 of 12 trajectories were cut at --max-tokens" in said
    page = " ".join(report_page(run).split())
    assert "5 of 12 trajectories were cut at" in page and "3 of 12 trajectories keep no step" in page
    short = run_of(trajectories[5:], tmp_path / "short")
    assert "were cut at" not in printed("build", short, tmp_path / "other") + report_page(short)


def test_a_figure_is_the_same_wherever_it_is_told(tmp_path):
    """With a k so small that many sets are not proved whole: they are in the curve of alpha, and not in the labels."""
    trajectories = [make_trajectory(f"p{index}", seed=index, tokens=20, top_k=3) for index in range(12)]
    run = run_of(trajectories, tmp_path / "run")
    build_run(run, Run(str(tmp_path / "new")), ContrastSettings(labels="tilt"))
    said, page = printed("compare", run, tmp_path / "new"), report_page(run)
    found = gather(run)
    totals = found.totals
    assert totals.incomplete > 20
    size = f"{totals.mean_plausible_set:.2f}"
    assert f"α = 0.2: {size}" in page and f"<dd>{size}</dd>" in page
    here = int(np.searchsorted(found.plausible_sets.alphas, 0.2))
    assert found.plausible_sets.labelled[here] == pytest.approx(totals.mean_plausible_set)
    assert found.plausible_sets.mean_size[here] > totals.mean_plausible_set + 0.05
    mean, share = f"{totals.label_shifts.mean:.3f} nats", f"{totals.label_shifts.overturned_share:.1%}"
    assert re.search(rf"label shift, mean\W+{mean}", said) and f"<dd>{mean}</dd>" in page
    assert re.search(rf"overturn the expert's best\W+{share}", said) and f"({share})</dd>" in page


@pytest.mark.parametrize("keep_incomplete", [False, True])
def test_the_curve_of_alpha_is_what_that_alpha_would_label(tmp_path, keep_incomplete):
    trajectories = trajectories_of(6)
    trajectories[0].amateur_logprobs[:, 2] = -np.inf
    run = run_of(trajectories, tmp_path / "run", keep_incomplete=keep_incomplete)
    sets = gather(run).plausible_sets
    for index in (5, 12, 20, 30):
        new = Run(str(tmp_path / f"{index}"))
        alpha = float(sets.alphas[index])
        totals = build_run(run, new, ContrastSettings(alpha=alpha, keep_incomplete=keep_incomplete)).totals
        assert totals.mean_plausible_set == pytest.approx(sets.labelled[index], abs=1e-9)


def test_the_oddest_labels_are_told_as_text_and_style_is_warned_of(tmp_path):
    words, marks = (run_of(trajectories_of(12), tmp_path / name, tokenizer)
                    for name, tokenizer in (("words", None), ("marks", tokenizer_json(MARKS))))  # fmt: skip
    for run, style in ((words, False), (marks, True)):
        said = printed("build", run, f"{run}-new", "--labels", "contrast", "--beta", "0.3")
        odd = Run(f"{run}-new").tally(Run(f"{run}-new").manifest()).shifts.oddest
        listed = re.findall(r"^  (\d\.\d{3}) nats, (p\d+), step (\d+): .* ▸ (\S+) \(label", said, re.M)
        tokens = MARKS if style else [f"w{index}" for index in range(VOCABULARY)]
        assert listed == [
            (f"{label.nats:.3f}", label.problem_id, str(label.step), tokens[label.heaviest]) for label in odd[:3]
        ]
        share = sum(Run(f"{run}-new").tally(Run(f"{run}-new").manifest()).shifts.overturned_shares.values())
        warning = f"warning: {share:.0%} of the labels' shift lies on punctuation, white space and end tokens that take"
        assert share > 0.5 and (warning in said) == style
        assert ("lies on punctuation" in report_page(run)) == style


@pytest.mark.parametrize(("ends", "style"), [([0], "Stop"), ([], None), (None, "<extra>")])
def test_an_end_token_is_style_by_the_runs_ends_and_not_by_being_special(tmp_path, ends, style):
    """The label is on an ordinary word, which may end a trajectory, or on a special token, which need not.

    It overturns a full stop; in place of a word it is no style.
    """
    tokenizer = Tokenizer.from_str(tokenizer_json(["Stop", "<extra>", "."]).decode())
    tokenizer.add_special_tokens(["<extra>"])
    rest = [0.001 / (VOCABULARY - 2)] * (VOCABULARY - 2)
    for (token, name), best in product(enumerate(("Stop", "<extra>")), (2, 9)):
        trajectory = make_trajectory("p", seed=3, tokens=2, top_k=VOCABULARY)
        trajectory.top_ids[1] = [best, token, *(other for other in range(VOCABULARY) if other not in (best, token))]
        trajectory.expert_logprobs[1] = np.log([0.6, 0.399, *rest])
        trajectory.amateur_logprobs[1] = np.log([0.998, 0.001, *rest])
        run = run_of([trajectory], tmp_path / f"{best}-{token}", tokenizer.to_str().encode(), end_token_ids=ends)
        said = printed("build", run, f"{run}-new", "--beta", "0.3")
        assert f" ▸ {name} (label" in said
        assert ("warning: 100% of the labels' shift" in said) == (name == style and best == 2)
        assert ("lies on punctuation" in report_page(run)) == (name == style and best == 2)


def test_labels_that_leave_the_expert_as_it_is_are_no_style(tmp_path):
    run = run_of(trajectories_of(12), tmp_path / "run", tokenizer_json(MARKS))
    for name, options in (("expert", ("--labels", "expert")), ("bounded", ("--max-shift", "0.001"))):
        assert "lies on punctuation" not in printed("build", run, tmp_path / name, "--beta", "0.3", *options)
        assert "lies on punctuation" not in report_page(Run(str(tmp_path / name)))


def test_tokens_that_look_alike_are_told_apart():
    tokenizer = Tokenizer(models.WordLevel({"\u00a0": 0, "\u3000": 1, ".": 2, "▁a": 3, "a": 4}, "."))
    tokenizer.decoder = decoders.Metaspace()
    alike = Detokenizer(tokenizer)
    shown = told_apart([0, 1, 2, 0], alike)
    assert shown == ["� #0", "� #1", ".", "� #0"] and told_apart([0, 0], alike) == ["�", "�"]
    assert told_apart([3, 4], alike) == ["␣a", "a"]


def test_a_label_that_is_surer_of_the_experts_best_overturns_nothing(tmp_path):
    trajectory = make_trajectory("p", seed=3, tokens=2, top_k=VOCABULARY)
    rest = [0.001 / (VOCABULARY - 2)] * (VOCABULARY - 2)
    trajectory.expert_logprobs[1] = np.log([0.6, 0.399, *rest])
    trajectory.amateur_logprobs[1] = np.log([0.2, 0.799, *rest])
    run = run_of([trajectory], tmp_path / "run")
    said = printed("build", run, tmp_path / "new", "--beta", "0.3")
    best = f"w{trajectory.top_ids[1, 0]}"
    assert f" ▸ {best} (label 0.857, expert 0.600, amateur 0.200), the expert's best too\n" in said
    assert "the expert’s best too: the label is surer of it" in report_page(Run(str(tmp_path / "new")))


def test_compare_tells_of_labels_run_by_run(tmp_path):
    run = run_of(trajectories_of(12), tmp_path / "run", tokenizer_json(MARKS))
    build_run(run, Run(str(tmp_path / "new")), ContrastSettings(labels="tilt", gamma=0.25, max_shift=0.2))
    first, second = json.loads(printed("compare", run, tmp_path / "new", "--json"))["runs"]
    assert (second["gamma"], second["max_shift"], first["gamma"]) == (0.25, 0.2, None)
    totals = Run(str(tmp_path / "new")).completion().totals
    assert second["mean_shift"] == totals.label_shifts.mean and second["largest_shift"] == totals.label_shifts.largest
    assert second["overturned_share"] == totals.label_shifts.overturned_share and second["cut"] == 0
    assert len(first["oddest_labels"]) == 8 and first["style_share"] > 0.5
    assert f"{first['style_share']:.0%} of the labels' shift" in first["style_warning"]
    assert second["style_share"] < 0.5 * first["style_share"]  # what the warning advises leaves fewer such labels
    said = printed("compare", run, tmp_path / "new")
    assert "tilt, γ 0.25, at most 0.2 nats" in said and f"labels farthest from the expert in {run}" in said


def test_steps_between_two_betas_are_counted_by_kind_and_drawn(tmp_path):
    trajectories = trajectories_of(12)
    run = run_of(trajectories, tmp_path / "run", tokenizer_json(["7", "+", "."]))
    found, (bounds, _) = gather(run), plain_bounds(trajectories)
    edges = [0, 0.05, 0.1, 0.2, 0.4, 0.8, 1.6, None]
    assert [(band.low, band.high) for band in found.bands] == list(pairwise(edges))
    taken = np.concatenate([t.token_ids[1:] for t in trajectories])
    for band in found.bands:
        inside = ((bounds > band.low) | (band.low == 0)) & (bounds <= (band.high or np.inf))
        assert band.steps == inside.sum() and len(band.drawn) == min(band.steps, 3)
        assert band.tokens == {int(t): int((taken[inside] == t).sum()) for t in taken[inside]}
        assert {step.token for step in band.drawn} <= set(taken[inside])
    row = r'<tbody>\n<tr><th scope="row">([^<]*)</th><td>(\d+)</td>(?:<td>[^<]*</td>){4}</tr>\n<tr><td class="drawn"'
    rows = re.findall(row, report_page(run))
    assert rows[0][0] == "up to 0.05" and rows[-1][0] == "above 1.6"
    assert [int(steps) for _, steps in rows] == [band.steps for band in found.bands]
    assert len(TokenKind) == 4


def test_totals_of_an_earlier_version_are_read(tmp_path):
    run = make_run(tmp_path / "run", trajectories_of(3))
    run.seal(run.totals(run.manifest()))
    sealed = json.loads((tmp_path / "run" / "complete.json").read_bytes())
    for name in ("cut", "without_kept_steps", "label_shifts"):
        del sealed[name]
    (tmp_path / "run" / "complete.json").write_text(json.dumps(sealed))
    assert run.completion().totals.label_shifts is None and run.completion().totals.kept == sealed["kept"]


def test_the_checkpoints_of_a_training_are_drawn_as_a_curve(tmp_path):
    run = make_run(tmp_path / "run", trajectories_of(3))

    def point(step, accuracy, **more):
        return {"step": step, "n": 50, "accuracy": accuracy, "interval": [accuracy - 0.1, accuracy + 0.1], **more}

    paired = {"fixed": 1_234, "broken": 2, "p": 0.07}
    curve = [point(40, 0.7, paired=paired), point(0, 0.5), point(80, 0.3, paired=paired | {"broken": 12})]
    run.bucket.put("evaluation/curve.json", json.dumps({"benchmarks": {}, "curve": {"dev": curve}}).encode())
    run.bucket.put("evaluation/odd.json", json.dumps({"benchmarks": {}, "curve": {"dev": [{"step": -1}] * 2}}).encode())
    (found,) = gather(run).curves
    assert [(p.step, p.accuracy[0], p.fixed, p.broken) for p in found.points] == [
        (0, 0.5, None, None), (40, 0.7, 1234, 2), (80, 0.3, 1234, 12),
    ]  # fmt: skip
    page = report_page(run)
    assert "highest 70.0% at step 40" in page and "dev by optimizer step" in page
    rows = re.findall(r'<th scope="row">(\d+)</th><td>([\d.]+)% .*?</td><td>(\S+)</td><td>(\S+)</td>', page)
    assert rows == [("0", "50.0", "–", "–"), ("40", "70.0", "1,234", "2"), ("80", "30.0", "1,234", "12")]
