"""The client's commands, a file for each kind, and the habits that the three programs' command lines share.

Each program imports this package first: from here on, Ctrl-C ends it in one line while it loads the others.
"""

import os
import signal
import sys

PROGRAMS = "/client/__main__.py", "/server/__main__.py", "/trainer/__main__.py"


def stop_loading(number: int, _: object) -> None:
    """End this process, in whatever import it is."""
    os.write(2, b"\nstopped before it began\n")
    os._exit(128 + number)


def _is_program(word: str) -> bool:
    """Whether this is how one of the programs was started; a test or other code that imports it was not."""
    return word.endswith(PROGRAMS) or word.rpartition("/")[2].startswith("lightreasoner-")


# A process that another one started, for an engine, has its own ways; who ignores Ctrl-C, as nohup, goes on doing so.
if (
    _is_program(sys.argv[0])
    and "multiprocessing" not in sys.modules
    and signal.getsignal(signal.SIGINT) is signal.default_int_handler
):
    signal.signal(signal.SIGINT, stop_loading)
