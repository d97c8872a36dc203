"""The trainer's command line: its commands, in the order of use. `trainer.cli` defines them.

A user's mistake gives one line on stderr and exit code 1. A command that a signal stopped exits with 130 or 143.
"""

from __future__ import annotations

import os
import sys

from client.cli.program import Program
from client.errors import LightReasonerError, clean_lines, missing_extra, one_line
from trainer.cli.evaluate import evaluate_command
from trainer.cli.merge import merge_command
from trainer.cli.paper_tables import EXTRA, ablation_command, efficiency_command
from trainer.cli.train import train_command
from trainer.interruption import Interrupted

program = Program("Fine-tune an expert on the contrast samples of a RUN, and measure the gain.")
program.command("train")(train_command)
program.command("evaluate")(evaluate_command)
program.command("merge")(merge_command)
program.command("ablation", context_settings=EXTRA)(ablation_command)
program.command("efficiency", context_settings=EXTRA)(efficiency_command)


def main() -> None:
    """The console script."""
    # Threads that spin while they wait are many times slower where other processes use the cores, too.
    os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")  # OpenMP reads it when torch is loaded
    try:
        program()
    except Interrupted as stopped:
        print(stopped, file=sys.stderr)
        sys.exit(stopped.exit_code)
    except (LightReasonerError, ModuleNotFoundError) as error:
        extra = "server" if getattr(error, "name", None) == "vllm" else "trainer"
        said = missing_extra(error, extra) if isinstance(error, ModuleNotFoundError) else error
        print(f"error: {clean_lines(str(said))}", file=sys.stderr)
        sys.exit(1)
    except OSError as error:
        if error.filename is None:
            raise
        print(f"error: cannot use {one_line(str(error.filename))}: {error.strerror}; give another", file=sys.stderr)
        sys.exit(1)


if __name__ == "__main__":
    main()
