"""build and report as a user types them."""

import contextlib
import gc
import signal
import subprocess
import sys

import pytest
from support.runs.made_run import make_manifest, make_trajectory, tokenizer_json
from typer.testing import CliRunner

from client.__main__ import main, program
from client.cli import stop_loading
from client.cli.program import importing
from client.runs.run import Run


@pytest.fixture
def client_cli(monkeypatch, capsys):
    """Run `lightreasoner-client`: (exit code or error, stdout)."""

    def call(*words):
        monkeypatch.setattr(sys, "argv", ["lightreasoner-client", *map(str, words)])
        with pytest.raises(SystemExit) as ended:
            main()
        return ended.value.code or 0, capsys.readouterr().out

    return call


@pytest.fixture
def source(tmp_path):
    run = Run(str(tmp_path / "source"))
    run.claim(make_manifest(alpha=0.3, first_step=2, keep_incomplete=True), tokenizer_json())
    run.write([make_trajectory(f"p{index}", seed=index, tokens=20) for index in range(3)], {}, run.manifest())
    return run


def test_what_is_not_given_to_build_stays_as_it_is_in_the_run(source, tmp_path, client_cli):
    code, said = client_cli("build", source, tmp_path / "new", "--beta", "0.1", "--select", "random", "--seed", "5")
    made = Run(str(tmp_path / "new")).manifest()
    assert code == 0 and "steps kept" in said and "is not complete yet" in said
    assert (made.alpha, made.beta, made.first_step, made.keep_incomplete) == (0.3, 0.1, 2, True)
    assert (made.select, made.select_seed, made.labels) == ("random", 5, "contrast")
    code, _ = client_cli("build", tmp_path / "new", tmp_path / "newer", "--select", "kl", "--no-keep-incomplete")
    made = Run(str(tmp_path / "newer")).manifest()
    assert code == 0 and (made.select, made.select_seed, made.keep_incomplete) == ("kl", 0, False)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--seed", "1"], "--seed needs --select random"),
        (["--alpha", "0"], "--alpha: 0.0: expected more than 0"),
        (
            ["--max-shift", "0.1", "--labels", "expert"],
            "--max-shift belongs to --labels contrast or tilt, and these are",
        ),
        (["--keep", "0.1"], "--keep belongs to --select top, and this is kl"),
        (["--select", "random", "--seed", str(2**63)], f"--seed: {2**63}: expected at most"),
        (["--select", "random", "--seed", "-1"], "2"),  # the command line's own refusal
    ],
)
def test_settings_that_make_no_sense_are_refused_by_their_option(source, tmp_path, client_cli, options, message):
    code, _ = client_cli("build", source, tmp_path / "new", *options)
    assert message in str(code) and not (tmp_path / "new").exists()


def test_settings_that_differ_and_those_that_go_to_a_server_are_named_as_they_are_typed(
    source, tmp_path, client_cli, monkeypatch
):
    new = tmp_path / "new"
    assert client_cli("build", source, new, "--labels", "tilt", "--gamma", 1)[0] == 0
    code, _ = client_cli("build", source, new, "--labels", "tilt", "--first-step", 3)
    assert code.endswith("yours:\n  --first-step: 2 against 3\n  --gamma: 1.0 against 0.5")
    monkeypatch.chdir(tmp_path)
    (tmp_path / "new_run").mkdir()
    (tmp_path / "new_run" / "notes").touch()
    assert client_cli("build", source, "new_run")[0].startswith("error: new_run holds no RUN")  # a name of the user's
    to, problems = ("--server", "http://127.0.0.1:9"), tmp_path / "p.jsonl"
    problems.write_text('{"question": "?"}')
    for command, words, said in (
        ("sample", ("--n", 2), "--n > 1 needs --temperature > 0: greedy decoding gives the same trajectory each time"),
        ("submit", ("--gamma", 2), "--gamma belongs to --labels tilt, and these are contrast"),
        ("submit", ("--max-tokens", 0), "--max-tokens: 0: expected at least 1"),
    ):
        assert client_cli(command, problems, tmp_path / "run", *to, *words)[0] == f"error: {said}"
    assert client_cli("submit", problems, "", *to)[0] == "error: RUN: '': expected at least 1 characters"


def test_ctrl_c_while_a_program_loads_ends_it_in_one_line():
    """Nothing else has been imported when it comes; who imports the commands for something else keeps its own ways."""
    code = (
        "import os, signal, sys; signal.signal(2, signal.default_int_handler); sys.argv[0] = {!r}; "  # as in a terminal
        "import client.cli; os.kill(os.getpid(), 2); import client.__main__"
    )
    for started in ("/usr/bin/lightreasoner-client", "/lib/trainer/__main__.py", "/usr/bin/pytest"):
        ended = subprocess.run([sys.executable, "-c", code.format(started)], capture_output=True, text=True)
        if "pytest" in started:
            assert ended.returncode == -signal.SIGINT and ended.stderr.endswith("KeyboardInterrupt\n")
        else:
            assert (ended.returncode, ended.stderr) == (130, "\nstopped before it began\n")


def test_ctrl_c_in_a_command_ends_it_in_one_line(monkeypatch, tmp_path, capsys):
    def pressed(*_):
        assert signal.getsignal(signal.SIGINT) is signal.default_int_handler
        raise KeyboardInterrupt

    monkeypatch.setattr(Run, "manifest", pressed)
    monkeypatch.setattr(sys, "argv", ["lightreasoner-client", "report", str(tmp_path)])
    before = signal.signal(signal.SIGINT, stop_loading)
    try:
        with pytest.raises(SystemExit) as ended:
            main()
    finally:
        signal.signal(signal.SIGINT, before)
    assert ended.value.code == 130 and capsys.readouterr().err == "\nstopped\n"


def test_report_writes_the_page_where_it_is_told_to(source, tmp_path, client_cli):
    code, said = client_cli("report", source, "-o", tmp_path / "page.html")
    assert code == 0 and f"{tmp_path}/page.html: 0." in said
    assert (tmp_path / "page.html").read_text(encoding="utf-8").startswith("<!doctype html>")


def test_a_report_replaces_a_report_and_nothing_else(source, tmp_path, client_cli):
    page = tmp_path / "page.html"
    page.write_text("")
    assert client_cli("report", source, "-o", page)[0] == 0 and client_cli("report", source, "-o", page)[0] == 0
    for words in ("<title>My thesis</title>", "# Notes"):
        (notes := tmp_path / "notes.md").write_text(words)
        code, _ = client_cli("report", tmp_path / "no-run", "-o", notes)
        assert code == f"error: --output {notes} exists and is no report, so it stays; give a new name"
        assert notes.read_text() == words


def test_a_report_that_replaces_that_of_another_run_says_so(source, tmp_path, client_cli):
    file, other = tmp_path / "report.html", tmp_path / "a & b"
    assert client_cli("build", source, other, "--beta", "0.2")[0] == 0
    assert "replaced" not in client_cli("report", other, "-o", file)[1]
    assert "replaced" not in client_cli("report", other, "-o", file)[1]
    said = client_cli("report", source, "-o", file)[1]
    assert f"it replaced the report of another RUN, {Run(str(other))}; -o names another file" in said
    file.write_text("<title>older: contrast report</title>")  # an early version wrote only the name
    assert "it replaced the report of another RUN, older;" in client_cli("report", source, "-o", file)[1]


def test_a_report_that_cannot_be_written_is_refused_before_the_run_is_read(tmp_path, client_cli):
    nowhere = tmp_path / "no" / "where"
    code, _ = client_cli("report", tmp_path / "no-run", "-o", nowhere / "page.html")
    assert code == f"error: --output {nowhere}/page.html cannot be written: no such folder {nowhere}; make it first"
    code, _ = client_cli("report", tmp_path / "no-run", "-o", tmp_path)
    assert code == f"error: --output {tmp_path} cannot be written: a folder; give a file, as {tmp_path}/report.html"
    code, _ = client_cli("report", tmp_path / "no-run", "-o", long := tmp_path / ("page" * 100))
    assert code == f"error: --output {long} cannot be written: File name too long"


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (("--labels", "foo"), "'--labels': 'foo' is not one of 'contrast', 'expert', 'onehot', 'tilt'."),
        (("--alpha", "much"), "'--alpha': 'much': expected a number"),
        (("--seed", "-1"), "'--seed': '-1': expected at least 0"),
        (("--first-step", "1.5"), "'--first-step': '1.5': expected a whole number"),
    ],
)
def test_values_of_another_kind_are_refused_in_our_words(monkeypatch, words, said):
    monkeypatch.setenv("COLUMNS", "200")
    shown = CliRunner().invoke(program, ["build", "run", "new", *words]).output
    assert f"Invalid value for {said}" in " ".join(shown.split())


def test_while_a_command_imports_python_searches_for_no_garbage():
    with contextlib.suppress(ModuleNotFoundError), importing():
        with importing():
            pass
        assert not gc.isenabled()
        import no_such_module  # noqa: F401
    assert gc.isenabled()
