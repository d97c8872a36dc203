"""The process that forks: imports what it is told to, then makes each request a child that runs one function.

    fork_server.py SOCKET_FD MODULE …

In: requests on the socket, each with three open files: standard output, standard error, and a pipe for the status. Out,
on that pipe: the child's process id, then its exit status, as lines. A child ends as Python ends, with its threads and
what atexit knows; only what was imported is not taken apart, which takes seconds. The server itself starts no thread
and runs none of the modules' functions: what it has imported is all that children share.
"""

import atexit
import contextlib
import gc
import importlib
import os
import pickle
import resource
import select
import socket
import sys
import threading
import traceback

HEADER_BYTES, FILES = 8, 3


class ForkServer:
    """Forks until its socket closes."""

    def __init__(self, requests):
        self._requests = requests
        self._running = {}  # pidfd -> (pid, status pipe)

    def serve(self):
        """Returns in each child, with what it is to call; in the server itself None, when the socket has closed."""
        while True:
            readable, _, _ = select.select([self._requests, *self._running], [], [])
            for ended in (one for one in readable if one is not self._requests):
                self._report(ended)
            if self._requests in readable:
                header, files, _, _ = socket.recv_fds(self._requests, HEADER_BYTES, FILES)
                if not header:
                    return None
                asked = pickle.loads(self._received(int.from_bytes(header)))
                if child := self._fork(asked, *files):
                    return child

    def _received(self, count):
        data = bytearray()
        while len(data) < count:
            data += self._requests.recv(count - len(data))
        return data

    def _fork(self, asked, output, errors, status):
        if pid := os.fork():
            os.close(output)
            os.close(errors)
            self._running[os.pidfd_open(pid)] = pid, status
            os.write(status, b"%d\n" % pid)
            return None
        self._requests.close()
        for pidfd, (_, theirs) in self._running.items():
            os.close(pidfd)
            os.close(theirs)
        os.close(status)
        os.dup2(output, 1)
        os.dup2(errors, 2)
        os.close(output)
        os.close(errors)
        return become(asked)

    def _report(self, pidfd):
        pid, status = self._running.pop(pidfd)
        code = os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])
        os.close(pidfd)
        with contextlib.suppress(BrokenPipeError):  # nobody waits for it
            os.write(status, b"%d\n" % code)
        os.close(status)


def become(asked):
    """Make this child what was asked for; its function."""
    if asked["session"]:
        os.setsid()
    if asked["file_bytes"] is not None:
        resource.setrlimit(resource.RLIMIT_FSIZE, (asked["file_bytes"], asked["file_bytes"]))
    wanted = asked["environment"]
    for name in os.environ.keys() - wanted.keys():
        del os.environ[name]
    # Only what differs: a process that lost its first variable could not take another title.
    os.environ.update(dict(wanted.items() - os.environ.items()))
    os.chdir(asked["folder"])
    sys.argv = asked["words"]
    module, _, name = asked["function"].partition(":")
    return getattr(importlib.import_module(module), name)


def run_to_the_end(function):
    """Run it as the interpreter runs a script; does not return."""
    code = 0
    try:
        function()
    except SystemExit as ended:
        code = ended.code if isinstance(ended.code, int) else int(ended.code is not None)
        if ended.code is not None and not isinstance(ended.code, int):
            print(ended.code, file=sys.stderr)
    except BaseException:
        traceback.print_exc()
        code = 1
    threading._shutdown()
    atexit._run_exitfuncs()
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(code)


if __name__ == "__main__":
    connection = socket.socket(fileno=int(sys.argv[1]))
    for imported in sys.argv[2:]:
        importlib.import_module(imported)
    gc.freeze()  # so that children do not copy the pages of what was imported
    if child := ForkServer(connection).serve():
        run_to_the_end(child)
    os._exit(0)
