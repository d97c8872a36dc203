"""sample: samples problems into a RUN with a pair in this process, without HTTP; ends when its shard is done.

In: options. Out: a RUN, and an exit status that tells a scheduler whether to retry. `client.cli.sample` owns problems,
options, progress and the contents of a RUN.
"""

from __future__ import annotations

import os
import sys
import traceback
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from dataclasses import replace
from typing import TYPE_CHECKING

from client.cli.options import Problems, SamplingOptions, TargetRun, WorkOptions
from client.cli.program import as_typed, importing
from client.cli.sample import ended_early, fill
from client.environment import check_temporary_folder
from client.errors import LightReasonerError, clean_lines
from server.cli.options import PairOptions, not_installed

if TYPE_CHECKING:
    from client.cli.progress import Terminal
    from server.jobs.own_pair import OwnPair

FIRST_ASKED = "the first trajectory"
TRY_AGAIN = os.EX_TEMPFAIL


def sample_alone(
    problems: Problems, run: TargetRun, pair: PairOptions, options: SamplingOptions, work: WorkOptions
) -> None:
    """Sample PROBLEMS into RUN with a pair in this process, without HTTP; exit when that is done.

    To resume, run the same command again: it samples only what RUN lacks. Several such processes can fill one RUN, each
    with its own shard. Without --shard, a task of an Indexed Job (JOB_COMPLETION_INDEX, JOB_COMPLETIONS) or of a Slurm
    array (SLURM_ARRAY_TASK_ID, SLURM_ARRAY_TASK_COUNT) takes the shard of its index, and prints it.

    Exit status: 0 if RUN or the shard is done; 75 if a retry may succeed, for example after an engine died or while the
    bucket is unavailable; 1 if you must correct something first; 130 or 143 if a signal stopped it. Finished
    trajectories are written first, unless a second signal ends it at once.
    """
    try:
        with ended_early(FIRST_ASKED):
            work = _with_shard(work)
            settings = pair.settings()

            @asynccontextmanager
            async def own_pair(_: Terminal) -> AsyncIterator[OwnPair]:
                from server import watchdog
                from server.engines import forkserver

                check_temporary_folder()
                _watchdog = watchdog.start()  # its pipe closes with this process
                forkserver.start()  # in parallel with the imports below
                with importing():
                    from server.jobs.own_pair import OwnPair

                source = OwnPair(settings)
                try:
                    yield source
                finally:
                    await source.aclose()

            fill(problems, run, options, work, work.part(), own_pair, FIRST_ASKED)
    except LightReasonerError as error:
        print(f"error: {clean_lines(as_typed(str(error)))}", file=sys.stderr)
        sys.exit(TRY_AGAIN if error.may_pass else 1)
    except ModuleNotFoundError as error:
        sys.exit(f"error: {not_installed(error)}")
    except Exception:  # unexpected: the machine may be at fault
        traceback.print_exc()
        sys.exit(TRY_AGAIN)


def _with_shard(work: WorkOptions) -> WorkOptions:
    """The options with the shard of this task, if none was given."""
    from server.cli.tasks import shard_of_task

    if work.shard or not (found := shard_of_task(os.environ)):
        return work
    shard, said = found
    print(f"shard {shard}, from {said}", file=sys.stderr, flush=True)
    return replace(work, shard=str(shard))
