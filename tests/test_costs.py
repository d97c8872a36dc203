"""What a test costs is found in what it uses, through fixtures and helpers."""

import subprocess

import pytest
from support.costs import dearest, functions_of, uses
from support.servers.job_calls import read_by_others
from support.servers.real_server import running_server
from support.servers.stand_in import stand_in_server


@pytest.fixture
def waiting():
    """A process that this test never needs to end: none is started."""
    return lambda: subprocess.Popen(["sleep", "1"])


def computes():
    return sum([1, 2])


def indirectly():
    return read_by_others


def test_one_that_only_computes_is_a_unit():
    assert dearest([computes]) == "unit"


def test_one_whose_fixture_may_start_a_process_costs_one(request, waiting):
    own = request.node.function
    assert set(functions_of(request.node)) > {own}
    assert dearest(function for function in functions_of(request.node) if function is not own) == "process"


def test_helpers_are_looked_into_however_deep():
    assert dearest([indirectly]) == "process"
    assert dearest([lambda: running_server]) == "engine"
    assert dearest([lambda: stand_in_server]) == "process"


def test_what_is_not_the_tests_own_is_not_looked_into():
    assert uses(subprocess.run) == frozenset()
