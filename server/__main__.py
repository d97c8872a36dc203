"""The server's command line: its commands. Without a command it runs `serve`.

`--help` loads neither torch nor vLLM. The work is done in `server.cli`.
"""

from __future__ import annotations

from client.cli.program import Program
from server.cli.sample import sample_alone
from server.cli.serve import serve

program = Program()
program.default(serve)
program.command("sample")(sample_alone)


def main() -> None:
    program()


if __name__ == "__main__":
    main()
