"""Runs `lightreasoner-trainer` as a rank under FSDP2, on a machine without a GPU.

accelerate uses FSDP only on accelerators, so it is told that these ranks run on some. The sharding itself is torch's
own, over gloo. The settings are those of the README, as `accelerate launch` passes them on.
"""

import os

import torch
from accelerate.state import PartialState
from accelerate.utils import DistributedType

from trainer.__main__ import main

SETTINGS = {
    "ACCELERATE_USE_FSDP": "true", "FSDP_VERSION": "2", "FSDP_AUTO_WRAP_POLICY": "TRANSFORMER_BASED_WRAP",
    "FSDP_STATE_DICT_TYPE": "FULL_STATE_DICT", "FSDP_RESHARD_AFTER_FORWARD": "true",
    "FSDP_CPU_RAM_EFFICIENT_LOADING": "false",
}  # fmt: skip


def as_accelerators(start):
    def begin(self, *words, **options):
        first = not PartialState._shared_state  # later ones share the state, which accelerate has changed since
        start(self, *words, **options)
        if first:
            self.distributed_type = DistributedType.MULTI_GPU

    return begin


def run():
    torch.set_num_threads(1)
    os.environ |= SETTINGS
    PartialState.__init__ = as_accelerators(PartialState.__init__)
    main()
