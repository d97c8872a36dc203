"""The client's command line: it registers the commands of `client.cli`, in the order of their use."""

from __future__ import annotations

import sys

from client.cli.jobs import cancel, status, submit, wait
from client.cli.program import Program
from client.cli.runs import build, compare, import_file, pull, push, report
from client.cli.sample import sample
from client.errors import LightReasonerError, clean_lines

program = Program("Sample contrast data with LightReasoner servers, and work with what was sampled.")
program.command()(sample)
program.command()(report)
program.command()(build)
program.command()(compare)
program.command("import")(import_file)
program.command()(push)
program.command()(pull)
program.command()(submit)
program.command()(status)
program.command()(wait)
program.command()(cancel)


def main() -> None:
    """Entry point. A LightReasonerError becomes one line on stderr and exit code 1."""
    try:
        program()
    except LightReasonerError as error:
        sys.exit(f"error: {clean_lines(str(error))}")


if __name__ == "__main__":
    main()
