"""The card of a sealed RUN: `datasets` loads the RUN by it, whatever else lies there; texts are shown as they are."""

import re
from xml.etree import ElementTree

import numpy as np
import pytest
from support.runs.made_run import make_manifest
from support.runs.reported import make_run, plain_bounds, trajectories_of

from client.runs.manifest import dataset_card, divergence_picture
from client.runs.tally import Divergences


@pytest.fixture
def sealed(tmp_path, monkeypatch):
    """A sealed RUN after training and an evaluation."""
    monkeypatch.setenv("HF_HOME", str(tmp_path / "cache"))
    run = make_run(tmp_path / "run", trajectories_of(6), system_prompt="a | b\n<b>_c_</b>")
    run.write_evaluation("base", b'{"benchmarks": {}}')
    run.bucket.put("training/metrics.jsonl", b'{"step": 1, "loss": 2.0}\n')
    assert run.seal(run.totals(run.manifest()))
    return run


def test_a_sealed_run_is_loaded_by_datasets_as_samples_and_as_trajectories(sealed):
    datasets = pytest.importorskip("datasets")
    samples = datasets.load_dataset(str(sealed), split="train")
    assert sorted(samples["problem_id"]) == [f"p{index}" for index in range(6)] and "label_ids" in samples.column_names
    trajectories = datasets.load_dataset(str(sealed), "trajectories", split="train")
    assert len(trajectories) == 6 and "expert_logprobs" in trajectories.column_names
    assert datasets.get_dataset_config_names(str(sealed)) == ["samples", "trajectories"]


def test_the_card_says_what_made_the_run_and_shows_texts_as_they_are(sealed):
    card = sealed.bucket.get("README.md").decode()
    assert "\nlicense:\n" in card and r"| system prompt | a \| b \<b\>\_c\_\</b\> |" in card
    assert "| problems, trajectories | 6, 6 |" in card and "| α, β, first step | 0.2, 0.4 nats, 1 |" in card


def test_the_card_has_a_picture_of_every_step_with_those_above_beta_in_another_colour(tmp_path):
    run = make_run(tmp_path / "run", trajectories_of(12))
    tally = run.tally(run.manifest())
    run.seal(tally.totals([]), tally)
    (image,) = re.findall(r"!\[[^]]*\]\((.*)\)", run.bucket.get("README.md").decode())
    picture = ElementTree.fromstring(run.bucket.get(image))
    bars = [(bar.get("fill"), bar[0].text) for bar in picture if len(bar)]
    counts = {colour: [] for colour, _ in bars}
    for colour, said in bars:
        counts[colour].append(int(re.search(r"nats: ([\d,]+) steps", said)[1].replace(",", "")))
    low, high = counts.values()
    bounds = plain_bounds(trajectories_of(12))[0]
    assert sum(high) == (bounds > 0.4).sum() and sum(low) == (bounds <= 0.4).sum() and len(low) == 6
    assert low[-1] == ((bounds > 0.2) & (bounds <= 0.4)).sum() and "β = 0.4 nats" in "".join(picture.itertext())
    assert bars[0][1].startswith("up to 0.0125 nats") and bars[-1][1].startswith("above 3.2 nats")
    edges, counts = Divergences().histogram(0.0)
    assert counts == [0] * 10
    colours = re.findall(r'<rect [^>]*fill="(\S+)"><title>', divergence_picture(edges, [9] * 10, 0.0))
    assert len(set(colours)) == 2 and colours.count(colours[0]) == 1, "bounds of 0 are not above 0"
    assert tally.bounds.above(np.array([1e300])) == 0


def test_a_readme_that_somebody_wrote_stays_and_an_older_card_does_not(tmp_path):
    for written, stays in ((b"# My project\n", True), (b"---\nlicense:\ntags:\n- lightreasoner\n---\nold", False)):
        run = make_run(tmp_path / f"run-{stays}", trajectories_of(2))
        run.bucket.put("README.md", written)
        assert run.seal(run.totals(run.manifest()))
        assert (run.bucket.get("README.md") == written) == stays


def test_an_imported_run_has_samples_alone():
    totals = {"problems": 1, "trajectories": 1, "kept": 1, "steps": 2, "kept_share": 0.5}
    card = dataset_card(make_manifest(imported_from="file.jsonl"), totals)
    assert "config_name: samples" in card and "config_name: trajectories" not in card
