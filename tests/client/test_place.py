"""Where a RUN may be made: an empty place, or its own. Other people's folders get no files of ours."""

import sys
from pathlib import Path

import pytest
from support.runs.made_run import make_manifest, make_trajectory, tokenizer_json

from client.__main__ import main
from client.errors import RunError
from client.runs.run import Run
from client.storage.bucket import Bucket


def fill(folder, *names):
    for name in names:
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).mkdir() if name.endswith("/") else (folder / name).write_text("mine")
    return folder


@pytest.mark.parametrize(
    "names", [(), (".gitkeep", ".DS_Store"), ("lost+found/",), (".git/config", ".gitattributes", "README.md")]
)
def test_a_place_with_nothing_of_anybodys_is_free(tmp_path, names):
    (tmp_path / "circle").symlink_to("circle")
    Run(str(fill(tmp_path, *names))).check_place()
    Run(str(tmp_path / "new")).check_place()


@pytest.mark.parametrize(
    ("names", "listed"),
    [
        (("thesis.tex",), "thesis.tex"),
        (("a", "b", "src/main.py", "tokenizer.json", "z"), "a, b, src/, tokenizer.json, …"),
        (("samples/kick.wav", "README.md"), "samples/"),
        (("first/run.json",), "first/"),
    ],
)
def test_other_things_are_named_and_stay_alone(tmp_path, names, listed):
    fill(tmp_path, *names)
    with pytest.raises(RunError) as error:
        Run(str(tmp_path)).check_place()
    assert str(error.value) == (
        f"{tmp_path} holds no RUN, but other things ({listed}); name a new folder, as {tmp_path}/run"
    )


def test_what_is_left_of_a_run_is_its_own(tmp_path):
    run = Run(str(fill(tmp_path, "notes.txt", f".{'0' * 32}.tmp")))
    run.claim(make_manifest(), tokenizer_json())
    run.check_place()
    run.write([make_trajectory("p", 1, 4)], {}, make_manifest())
    (tmp_path / "run.json").unlink()
    run.check_place()
    (tmp_path / "run.json").write_text('{"stride": 0.7}')
    with pytest.raises(RunError, match=r"run.json is not a run.json that this version reads: .* name a new folder$"):
        run.check_place()


def test_a_buckets_prefix_is_as_free_as_a_folder(s3, tmp_path):
    bucket = Bucket(f"{s3}/{tmp_path.name}")
    Run(bucket.url).check_place()
    bucket.put("models/a.bin", b"")
    with pytest.raises(RunError, match=r"other things \(models/\); name a new folder, as s3://"):
        Run(bucket.url).check_place()
    Run(f"{bucket.url}/run").claim(make_manifest(), tokenizer_json())
    Run(f"{bucket.url}/run").check_place()


def test_no_command_writes_beside_other_things(tmp_path, monkeypatch, capsys):
    source = Run(str(tmp_path / "source"))
    source.claim(make_manifest(), tokenizer_json())
    source.write([make_trajectory("p", 1, 4)], {}, make_manifest())
    full, problems = fill(tmp_path / "full", "thesis.tex"), tmp_path / "p.jsonl"
    problems.write_text('{"question": "?"}')
    for words in (
        ("sample", problems, full, "--server", "http://127.0.0.1:9", "--patience", 9),
        ("build", source, full),
        ("import", problems, full, "--tokenizer", Path("deploy/demo/expert")),
        ("pull", "hf://datasets/nobody/nothing", full),
    ):
        monkeypatch.setattr(sys, "argv", ["lightreasoner-client", *map(str, words)])
        with pytest.raises(SystemExit) as ended:
            main()
        assert str(ended.value.code).startswith(f"error: {full} holds no RUN, but other things (thesis.tex); "), words
    assert [file.name for file in full.iterdir()] == ["thesis.tex"]
