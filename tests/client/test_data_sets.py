"""RUNs and problem sets on the Hub, with the real huggingface_hub, against a stand-in of the Hub's HTTP API."""

import json

import huggingface_hub.constants
import pytest
from huggingface_hub import HfFileSystem
from support.runs.reported import make_run, trajectories_of
from support.servers.hub import TOKEN, Hub
from typer.testing import CliRunner

from client.__main__ import program
from client.errors import LightReasonerError
from client.problems.reader import read_problem_set
from client.runs.run import Run
from client.storage.data_sets import DataSet

PLACE = "hf://datasets/me/run"


@pytest.fixture
def hub(monkeypatch, tmp_path):
    import datasets  # before what it reads is changed; at the top, each process that collects tests would import it

    with Hub().running() as hub:
        for name in ("ENDPOINT", "HUGGINGFACE_CO_URL_TEMPLATE"):
            there = getattr(huggingface_hub.constants, name)
            monkeypatch.setattr(huggingface_hub.constants, name, there.replace("https://huggingface.co", hub.url))
        monkeypatch.setattr(datasets.config, "HF_ENDPOINT", hub.url)
        monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_CACHE", str(tmp_path / "cache"))
        monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_DISABLE_XET", True)
        monkeypatch.setenv("HF_TOKEN", TOKEN)
        HfFileSystem.clear_instance_cache()
        yield hub
        HfFileSystem.clear_instance_cache()


@pytest.fixture
def sealed(tmp_path):
    run = make_run(tmp_path / "run", trajectories_of(9))
    run.bucket.put("training/metrics.jsonl", b'{"step": 1, "loss": 2.0}\n')
    run.bucket.put("notes.txt", b"of somebody's own")
    run.seal(run.totals(run.manifest()))
    return run


def called(*words):
    result = CliRunner().invoke(program, list(map(str, words)))
    if isinstance(result.exception, LightReasonerError):
        raise result.exception
    assert result.exit_code == 0, result.output
    return result.output


def objects(run):
    return {name: run.bucket.get(name) for name in run.bucket.names("") if name != "notes.txt"}


@pytest.mark.parametrize("piece_bytes", [None, 1000])
def test_a_run_that_was_pushed_and_pulled_is_the_same_run(hub, sealed, tmp_path, piece_bytes):
    hub.piece_bytes = piece_bytes
    said = called("push", sealed, PLACE)
    assert said.strip() == f"{hub.url}/datasets/me/run/commit/{1:040x}" and hub.private == {"me/run"}
    assert hub.files("me/run") == objects(sealed) and len(hub.commits) == 1 and len(hub.stored) == 6
    assert called("pull", PLACE, tmp_path / "new") == f"{tmp_path / 'new'}: 10 files copied from {PLACE}\n"
    assert objects(Run(str(tmp_path / "new"))) == objects(sealed)


def test_a_card_that_somebody_completed_stays_and_a_pull_goes_on_where_it_stopped(hub, sealed, tmp_path):
    called("push", sealed, PLACE)
    hub.data_sets["me/run"][-1]["README.md"] = b"license: mit"
    sealed.write_evaluation("later", b"{}")
    called("push", sealed, f"{PLACE}@main")
    assert hub.files("me/run")["README.md"] == b"license: mit" and "evaluation/later.json" in hub.files("me/run")
    new = Run(str(tmp_path / "new"))
    called("pull", f"{PLACE}@{1:040x}", new)
    for name in ("complete.json", next(new.bucket.names("samples"))):
        new.bucket.remove(name)
    assert called("pull", PLACE, new).startswith(f"{new}: 3 files")
    assert objects(new) == hub.files("me/run")


def test_what_cannot_be_pushed_or_pulled_is_named_with_the_remedy(hub, sealed, tmp_path, monkeypatch):
    other = make_run(tmp_path / "other", trajectories_of(3), beta=0.5)
    with pytest.raises(LightReasonerError, match="other is not complete; run the command that samples it again"):
        called("push", other, PLACE)
    with pytest.raises(LightReasonerError, match=r"no RUN at .*nowhere"):
        called("push", tmp_path / "nowhere", PLACE)
    for place in ("me/run", "hf://me/run", "hf://datasets/run", "hf://models/me/run", f"{PLACE}/a/path"):
        with pytest.raises(LightReasonerError, match=r"names no data set; give hf://datasets/OWNER/NAME\[@REVISION\]"):
            called("push", sealed, place)
    with pytest.raises(LightReasonerError, match=rf"cannot read {PLACE}: .*404.*; check the name, and log in with"):
        called("pull", PLACE, tmp_path / "new")
    called("push", sealed, PLACE)
    with pytest.raises(LightReasonerError, match=rf"other holds another RUN than {PLACE}; name a new one"):
        called("pull", PLACE, other)
    hub.refuse = 400
    sealed.write_evaluation("more", b"{}")
    with pytest.raises(LightReasonerError, match=rf"cannot write {PLACE}: .*no more room"):
        called("push", sealed, PLACE)
    monkeypatch.setenv("HF_TOKEN", "hf_wrong")
    with pytest.raises(LightReasonerError, match=r"401.*; check the name, and log in with `hf auth login`"):
        called("push", sealed, "hf://datasets/me/other")


def test_a_store_of_the_hub_that_refuses_leaves_no_commit(hub, sealed):
    hub.refuse_upload = 403
    with pytest.raises(LightReasonerError, match=rf"cannot write {PLACE}: .*403"):
        called("push", sealed, PLACE)
    assert not hub.commits


def test_a_hub_that_cannot_be_reached_is_said_at_once(monkeypatch, sealed, tmp_path):
    monkeypatch.setattr(huggingface_hub.constants, "ENDPOINT", "http://127.0.0.1:9")
    monkeypatch.setattr("datasets.load_dataset", None)  # it would try for a minute
    out = r"the Hugging Face Hub at http://127.0.0.1:9 cannot be reached \(.*refused.*\); check the network"
    for read in (
        lambda: read_problem_set("hf://openai/gsm8k?config=main"),
        lambda: read_problem_set(f"{PLACE}/data.jsonl"),
        lambda: called("push", sealed, PLACE),
        lambda: called("pull", PLACE, tmp_path / "new"),
    ):
        with pytest.raises(LightReasonerError, match=out):
            read()


def test_a_data_set_that_is_no_run_or_too_large_is_refused_before_it_is_read(hub, tmp_path):
    hub.data_sets["me/set"] = [{"train.jsonl": b"{}\n"}]
    with pytest.raises(LightReasonerError, match=r"me/set holds no RUN: it has no run\.json"):
        called("pull", "hf://datasets/me/set", tmp_path / "new")
    hub.data_sets["me/set"] = [{"run.json": b"{}", "samples/part-1.parquet": b"x" * 2000, "../../evil": b""}]
    with pytest.raises(LightReasonerError, match=r"samples/part-1\.parquet has 2,000 bytes, more than the 1,000"):
        DataSet("hf://datasets/me/set").pull(
            Run(str(tmp_path / "new")).bucket, lambda name: True, "run.json", "complete.json", 1000
        )
    assert not (tmp_path / "new").exists()


ROWS = b"".join(json.dumps({"id": f"q{n}", "question": f"How many are {n}?"}).encode() + b"\n" for n in range(5))


@pytest.mark.parametrize(
    ("place", "count"),
    [
        ("hf://datasets/me/set/data/a.jsonl", 5),
        ("hf://datasets/me/set@main/data/a.jsonl", 5),
        (f"hf://datasets/me/set@{0:040x}/data/a.jsonl", 5),
        ("hf://datasets/me/set/data", 6),
        ("hf://datasets/me/set/data/*.jsonl", 6),
        ("hf://datasets/me/set", 6),
        ("hf://me/set", 6),
        (f"hf://me/set@{0:040x}?split=train", 6),
    ],
)
def test_problems_are_read_from_files_and_folders_of_the_hub(hub, place, count):
    hub.data_sets["me/set"] = [{"data/a.jsonl": ROWS, "data/b.jsonl": b'{"id": "b", "question": "And?"}\n'}]
    assert len(read_problem_set(place)) == count


def test_a_place_of_the_hub_that_is_not_there_is_named(hub):
    hub.data_sets["me/set"] = [{"data/a.jsonl": ROWS}]
    for place in ("hf://datasets/me/set/data/none.jsonl", "hf://datasets/me/none/data/a.jsonl"):
        with pytest.raises(LightReasonerError, match=place):
            read_problem_set(place)
