"""The fork server: imports the given modules, then forks a child for each request, which runs one function.

    fork_server.py LISTENER_FD MODULE …

In: requests of all clients, each with three open files: standard output, standard error, and a status pipe. Out, on
that pipe: the child's process id, then its exit status, as lines. A child ends as Python does: it waits for its threads
and runs its atexit functions. It only skips the teardown of imported modules, which takes seconds. The server itself
starts no thread and calls no function of the modules, so its children share nothing but the imports.
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
    """Forks until all clients have disconnected."""

    def __init__(self, listener):
        self._listener = listener
        self._asking = [listener.accept()[0]]
        self._running = {}  # pidfd -> (pid, status pipe)

    def serve(self):
        """Returns in each child, with the function to call. Returns None in the server, when all clients have gone."""
        while self._asking:
            readable, _, _ = select.select([self._listener, *self._asking, *self._running], [], [])
            for one in readable:
                if one is self._listener:
                    self._asking.append(self._listener.accept()[0])
                elif one in self._running:
                    self._report(one)
                elif child := self._answer(one):
                    return child
        return None

    def _answer(self, connection):
        header, files, _, _ = socket.recv_fds(connection, HEADER_BYTES, FILES)
        if header:
            return self._fork(pickle.loads(self._received(connection, int.from_bytes(header))), *files)
        connection.close()
        self._asking.remove(connection)
        return None

    def _received(self, connection, count):
        data = bytearray()
        while len(data) < count:
            data += connection.recv(count - len(data))
        return data

    def _fork(self, asked, output, errors, status):
        if pid := os.fork():
            os.close(output)
            os.close(errors)
            self._running[os.pidfd_open(pid)] = pid, status
            os.write(status, b"%d\n" % pid)
            return None
        for theirs in (self._listener, *self._asking):
            theirs.close()
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
        with contextlib.suppress(BrokenPipeError):  # no client waits for it
            os.write(status, b"%d\n" % code)
        os.close(status)


def become(asked):
    """Prepare this child as the request says. Returns the function to run."""
    if asked["session"]:
        os.setsid()
    if asked["file_bytes"] is not None:
        resource.setrlimit(resource.RLIMIT_FSIZE, (asked["file_bytes"], asked["file_bytes"]))
    wanted = asked["environment"]
    for name in os.environ.keys() - wanted.keys():
        del os.environ[name]
    # Only what differs: a process that has lost its first variable cannot set its title.
    os.environ.update(dict(wanted.items() - os.environ.items()))
    os.chdir(asked["folder"])
    sys.argv = asked["words"]
    module, _, name = asked["function"].partition(":")
    return getattr(importlib.import_module(module), name)


def run_to_the_end(function):
    """Run a function as the interpreter runs a script, and end the process."""
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
    listening = socket.socket(fileno=int(sys.argv[1]))
    gc.disable()  # imports leave no garbage, and the search for it takes a sixth of their time
    for imported in sys.argv[2:]:
        importlib.import_module(imported)
    gc.freeze()  # so that children do not copy the pages of what was imported
    gc.enable()
    if child := ForkServer(listening).serve():
        run_to_the_end(child)
    os._exit(0)
