"""What a run says of itself where nobody sees a terminal."""

import client.cli.progress
from client.cli.progress import Terminal
from client.sampling.writer import Counts


def test_plain_lines_tell_of_every_server_where_there_are_several(monkeypatch, capsys):
    monkeypatch.setattr(client.cli.progress, "PLAIN_SECONDS", -1)
    with Terminal() as terminal:
        terminal.servers = lambda: ["http://a 3 requests in flight, 12 answered", "http://b down, 4 answered"]
        terminal.update(Counts(total=20, done=16))
        terminal.update(Counts(total=20, done=16))
        terminal.servers = lambda: ["http://a 3 requests in flight, 12 answered"]
        terminal.update(Counts(total=20, done=17))
    said = capsys.readouterr().err
    assert (
        "16 of 20, " in said and "\n  http://a 3 requests in flight, 12 answered\n  http://b down, 4 answered" in said
    )
    assert "in flight" not in said.partition("17 of 20")[2]


def test_plain_lines_tell_the_rate_the_time_left_and_what_failed(monkeypatch, capsys):
    monkeypatch.setattr(client.cli.progress, "PLAIN_SECONDS", -1)
    with Terminal() as terminal:
        counts = Counts(total=100)
        terminal.update(counts)
        terminal.update(counts)
        assert "0 of 100, 0.0 trajectories/s" in capsys.readouterr().err
        counts.began -= 10
        counts.done, counts.failed, counts.passing, counts.tokens = 17, 2, 1, 1000
        counts.steps, counts.kept = 800, 200
        terminal.update(counts)
    said = capsys.readouterr().err
    assert "20 of 100, 0:00:40 left, 2.0 trajectories/s, 100 tokens/s, kept 25.0%, 3 failed" in said
