"""build and report as a user types them."""

import sys

import pytest
from support.runs.made_run import make_manifest, make_trajectory, tokenizer_json

from client.__main__ import main
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
        (["--alpha", "0"], "--alpha: Input should be greater than 0"),
        (["--select", "random", "--seed", "-1"], "2"),  # the command line's own refusal
    ],
)
def test_settings_that_make_no_sense_are_refused_by_their_option(source, tmp_path, client_cli, options, message):
    code, _ = client_cli("build", source, tmp_path / "new", *options)
    assert message in str(code) and not (tmp_path / "new").exists()


def test_report_writes_the_page_where_it_is_told_to(source, tmp_path, client_cli):
    code, said = client_cli("report", source, "-o", tmp_path / "page.html")
    assert code == 0 and f"{tmp_path}/page.html: 0." in said
    assert (tmp_path / "page.html").read_text(encoding="utf-8").startswith("<!doctype html>")
    code, _ = client_cli("report", source, "-o", tmp_path / "nowhere" / "page.html")
    assert "cannot be written" in str(code)
