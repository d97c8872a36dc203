"""The client's commands, one file for each kind, and what the command lines of all three programs share.

Each program imports this package first. From then on Ctrl-C ends the program with one line, even during its other
imports.
"""

import os
import signal
import sys

PROGRAMS = "/client/__main__.py", "/server/__main__.py", "/trainer/__main__.py"


def stop_loading(number: int, _: object) -> None:
    """End this process at once, even within an import. The exit status is 128 + `number`."""
    os.write(2, b"\nstopped before it began\n")
    os._exit(128 + number)


def _is_program(word: str) -> bool:
    """Whether `word`, the process's argv[0], is one of the programs, and not a test or other code that imports this."""
    return word.endswith(PROGRAMS) or word.rpartition("/")[2].startswith("lightreasoner-")


# Not in an engine's child process, which handles signals itself, and not where Ctrl-C is ignored, as under nohup.
if (
    _is_program(sys.argv[0])
    and "multiprocessing" not in sys.modules
    and signal.getsignal(signal.SIGINT) is signal.default_int_handler
):
    signal.signal(signal.SIGINT, stop_loading)
