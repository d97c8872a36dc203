"""Environment variables that are set for a while, and the folder of vLLM's sockets."""

import os
import tempfile

import pytest

from client.environment import SOCKETS, check_temporary_folder, environment, sockets_in
from client.errors import LightReasonerError


def test_variables_are_as_before_afterwards(monkeypatch):
    monkeypatch.setenv("LIGHTREASONER_KEPT", "before")
    monkeypatch.delenv("LIGHTREASONER_NEW", raising=False)
    with pytest.raises(ZeroDivisionError), environment({"LIGHTREASONER_KEPT": "now", "LIGHTREASONER_NEW": "now"}):
        assert os.environ["LIGHTREASONER_KEPT"] == os.environ["LIGHTREASONER_NEW"] == "now"
        _ = 1 / 0
    assert os.environ["LIGHTREASONER_KEPT"] == "before" and "LIGHTREASONER_NEW" not in os.environ


def test_sockets_have_a_folder_of_their_own_unless_another_is_named_or_their_paths_are_too_long(monkeypatch):
    monkeypatch.delenv(SOCKETS, raising=False)
    assert sockets_in("/tmp/lr-12345678") == {SOCKETS: "/tmp/lr-12345678"}
    assert sockets_in("/" + 69 * "x") and not sockets_in("/" + 70 * "x") and not sockets_in("/" + 35 * "ä")
    monkeypatch.setenv(SOCKETS, "/run/mine")
    assert not sockets_in("/tmp/lr-12345678")


def test_a_machine_without_a_folder_for_temporary_files_is_named_with_the_remedy(monkeypatch):
    """As in a container whose file system is read-only; here the folders are not there."""
    check_temporary_folder()
    monkeypatch.setattr(tempfile, "tempdir", None)
    monkeypatch.setattr(tempfile, "_candidate_tempdir_list", lambda: ["/nowhere/tmp"])
    with pytest.raises(LightReasonerError, match=r"directory found in \['/nowhere/tmp'\]; set TMPDIR"):
        check_temporary_folder()
