"""Places, kinds and entropies of steps, against plain computations over the whole vocabulary."""

import itertools

import numpy as np
import pytest
from support.runs.made_run import VOCABULARY, make_manifest, make_trajectory, tokenizer_json
from support.runs.reported import make_run, trajectories_of

from client.models.detokenize import Detokenizer, tokenizer_of
from client.report.analysis import StepAnalysis, TokenKind, by_kind, entropy_lower_bound, token_kind
from client.report.findings import gather
from client.report.labels import style_share
from client.report.page import report_page
from client.runs.run import Run


def distributions(steps, vocabulary, seed):
    logits = np.random.default_rng(seed).normal(size=(steps, vocabulary)) * 3
    return logits - np.log(np.exp(logits).sum(axis=1, keepdims=True))


def test_an_entropy_from_the_top_k_is_a_lower_bound_that_grows_with_k_and_is_exact_at_the_end():
    logprobs = -np.sort(-distributions(50, 40, seed=1), axis=1)
    whole = -(np.exp(logprobs) * logprobs).sum(axis=1)
    bounds = [entropy_lower_bound(logprobs[:, :k].astype(np.float32)) for k in (1, 5, 20, 40)]
    for lower, higher in itertools.pairwise(bounds):
        assert (lower <= higher + 1e-6).all()
    assert (bounds[0] < whole - 0.01).any()
    np.testing.assert_allclose(bounds[-1], whole, atol=1e-5)


def test_unknown_ids_and_certain_steps_have_entropies_too():
    certain, unknown = np.array([[0.0, -np.inf]]), np.array([[np.log(0.5), -np.inf]])
    assert entropy_lower_bound(certain)[0] == 0.0
    assert entropy_lower_bound(unknown)[0] == pytest.approx(np.log(2))  # the rest counts as one token


@pytest.mark.parametrize(
    ("text", "kind"),
    [
        ("7", TokenKind.DIGIT), (" 12", TokenKind.DIGIT), ("3.5", TokenKind.DIGIT), (" +", TokenKind.OPERATOR),
        ("=", TokenKind.OPERATOR), ("\\frac", TokenKind.OPERATOR), ("×", TokenKind.OPERATOR), (")", TokenKind.OPERATOR),
        (" So", TokenKind.WORD), ("apples", TokenKind.WORD), ("é", TokenKind.WORD), ("x2", TokenKind.WORD),
        (".", TokenKind.OTHER), ("\n", TokenKind.OTHER), ("", TokenKind.OTHER), (",", TokenKind.OTHER),
    ],
)  # fmt: skip
def test_a_token_is_of_a_kind(text, kind):
    assert token_kind(text) is kind


def test_counts_are_taken_together_by_kind():
    seen, kept, kl = np.array([4, 0, 2, 1]), np.array([1, 0, 2, 0]), np.array([2.0, 0.0, 1.0, 0.25])
    found = by_kind(seen, kept, kl, ["1", "2", "one", "3"].__getitem__)
    assert [(count.kind, count.steps, count.kept, count.mean_kl) for count in found] == [
        (TokenKind.DIGIT, 5, 1, 0.45),
        (TokenKind.WORD, 2, 2, 0.5),
    ]


def test_steps_are_counted_by_tenth_of_their_trajectory_and_by_whether_they_are_kept():
    first, analysis = 1, StepAnalysis(1)
    expected = np.zeros((2, 10), int)
    sums = {True: [], False: []}
    for seed, length in enumerate((10, 25, 1, 3)):
        log_p, log_q = (distributions(length, 12, seed=2 * seed + which) for which in (0, 1))
        kept = [step for step in range(first, length) if (step + seed) % 3 == 0]
        analysis.add(log_p, log_q, np.array(kept, int))
        for step in range(first, length):
            expected[0, step * 10 // length] += 1
            expected[1, step * 10 // length] += step in kept
            sums[step in kept].append([-(np.exp(row[step]) * row[step]).sum() for row in (log_p, log_q)])
    assert analysis.places.steps.tolist() == expected[0].tolist()
    assert analysis.places.kept.tolist() == expected[1].tolist()
    assert analysis.places.share == pytest.approx(expected[1] / np.maximum(expected[0], 1))
    for kept in (True, False):
        found = analysis.entropies(kept)
        assert found.steps == len(sums[kept])
        assert (found.expert, found.amateur) == pytest.approx(tuple(np.mean(sums[kept], axis=0)))
    assert StepAnalysis(1).entropies(kept=True) is None


def test_the_report_says_where_the_kept_steps_lie_and_what_they_are(tmp_path):
    run = Run(str(tmp_path / "run"))
    run.claim(make_manifest(), tokenizer_json())
    trajectories = [make_trajectory(f"p{index}", seed=index, tokens=30) for index in range(6)]
    samples = run.write(trajectories, {}, run.manifest())
    found = gather(run)
    places = found.steps.places
    assert places.kept.sum() == sum(len(sample.contrast.steps) for sample in samples) > 0
    assert places.steps.sum() == 6 * (30 - found.manifest.first_step)
    page = report_page(run)
    assert 'id="steps"' in page and "Kept share by tenth of the trajectory" in page
    assert f"≥ {found.steps.entropies(kept=True).expert:.3f}" in page


MARKS = ["." * (1 + index // 4) + ",;:!"[index % 4] for index in range(VOCABULARY)]
EVEN, UNEVEN, SURE = (0.5, 0.499), (0.1, 0.899), (0.99, 0.009)
"""Probabilities of the first two tokens."""


def text_of(run):
    return " ".join(report_page(run).split())


@pytest.mark.parametrize(
    ("kept", "others", "said"),
    [
        (
            (EVEN, UNEVEN),
            (SURE, SURE),
            "less sure at kept steps than at the others (0.704 against 0.063 nats), and less",
        ),
        (
            (SURE, EVEN),
            (EVEN, EVEN),
            "surer at kept steps than at the others (0.063 against 0.704 nats), and surer than",
        ),
        ((EVEN, UNEVEN), (EVEN, EVEN), "as sure at kept steps as at the others (0.704 against 0.704 nats), and less"),
    ],
)
def test_the_page_says_how_sure_this_runs_expert_is_at_kept_steps_and_no_more(tmp_path, kept, others, said):
    """`kept`, `others`: the expert's and the amateur's probabilities there."""
    trajectory = make_trajectory("p", seed=3, tokens=12, top_k=VOCABULARY)
    rest = [0.001 / (VOCABULARY - 2)] * (VOCABULARY - 2)
    for step in range(12):
        pair = kept if step % 3 == 0 else others
        trajectory.expert_logprobs[step], trajectory.amateur_logprobs[step] = (np.log([*two, *rest]) for two in pair)
    page = text_of(make_run(tmp_path / "run", [trajectory]))
    assert f"In this RUN the expert is {said}" in page and "the method is after" not in page
    assert "Steps are kept where the models differ" in page
    drawn = text_of(make_run(tmp_path / "drawn", [trajectory], select="random"))
    assert "Steps are kept where" not in drawn


def test_marks_at_the_top_are_no_style_unless_the_labels_say_so(tmp_path):
    """The measure is the shift from a mark to another mark, whatever tokens diverge most."""
    mixed = [mark if index % 2 else f"w{index}" for index, mark in enumerate(MARKS)]
    shares = []
    for name, texts in (("marks", MARKS), ("mixed", mixed), ("words", [f"w{index}" for index in range(VOCABULARY)])):
        run = make_run(tmp_path / name, trajectories_of(12), tokenizer_json(texts))
        found = gather(run)
        shares.append(style_share(found.tally.shifts, Detokenizer(tokenizer_of(run.tokenizer(), "here")), None))
        page = text_of(run)
        assert f"{shares[-1]:.1%} of this RUN's shift puts one mark (punctuation, white space, an end token)" in page
        assert "training teaches how to write" not in page
    assert shares[0] > shares[1] > shares[2] == 0


def test_the_page_names_the_kinds_of_tokens_and_the_overturn_that_carry_most(tmp_path):
    run = make_run(tmp_path / "run", trajectories_of(12), tokenizer_json(MARKS[: VOCABULARY // 2]))
    found, page = gather(run), text_of(run)
    texts = Detokenizer(tokenizer_of(run.tokenizer(), "here"))
    spent = {kind: 0.0 for kind in TokenKind}
    for token, kl in enumerate(found.counts.kl):
        spent[token_kind(texts.raw(token))] += kl
    shares = {kind: kl / found.counts.kl.sum() for kind, kl in spent.items()}
    assert min(shares[kind] for kind in (TokenKind.WORD, TokenKind.OTHER)) > 0.1
    assert f"{TokenKind.WORD} {shares[TokenKind.WORD]:.1%}, {TokenKind.OTHER} {shares[TokenKind.OTHER]:.1%}." in page
    largest = max(found.tally.shifts.overturns, key=lambda one: one.share)
    assert f"carries most: {largest.share:.1%} of the RUN's shift" in page
