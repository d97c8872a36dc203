"""Runs `lightreasoner-trainer` as a rank on a machine of its own, which cannot see temporary files of other machines.

`TMPDIR` is the machine's folder for temporary files. The folders of the other machines lie beside it.
"""

import errno
import os
import sys
import tempfile
from pathlib import Path

import torch

from trainer.__main__ import main


def run():
    mine = os.environ["TMPDIR"]
    others = str(Path(mine).parent) + os.sep
    tempfile.tempdir = mine

    def hide(event, arguments):
        opens = event in ("open", "os.listdir", "os.scandir") and isinstance(arguments[0], str)
        if opens and arguments[0].startswith(others) and not arguments[0].startswith(mine):
            raise FileNotFoundError(errno.ENOENT, "on another machine", arguments[0])

    sys.addaudithook(hide)
    torch.set_num_threads(1)
    main()
