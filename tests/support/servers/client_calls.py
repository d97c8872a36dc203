"""Calls `lightreasoner-client sample` on made-up problems and a server that answers from memory."""

from support.processes.forked import fork
from support.runs.made_run import TOP_K
from support.servers.real_server import command

PROBLEMS = [{"id": f"p{index}", "question": f"What is {index}?"} for index in range(600)]


def words(problems, run, server, *options):
    return ["client", "sample", problems, run, "--server", server.url, "--top-k", TOP_K, *options]


def sample(problems, run, server, *options):
    return command(*words(problems, run, server, *options))


def start(problems, run, server, *options):
    return fork(*words(problems, run, server, *options))


def unanswerable(*ids):
    return [{"id": name, "question": "unanswerable"} for name in ids]
