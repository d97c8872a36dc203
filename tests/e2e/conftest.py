"""What tests of a client and its RUN need: a server that answers from memory, and files of problems."""

import json

import pytest
from support.servers.contract_server import ContractServer


@pytest.fixture
def server():
    with ContractServer().running() as server:
        yield server


@pytest.fixture
def problem_file(tmp_path):
    def write(rows):
        file = tmp_path / f"problems-{len(rows)}.jsonl"
        file.write_text("".join(json.dumps(row) + "\n" for row in rows))
        return file

    return write
