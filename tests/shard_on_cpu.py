"""train.py as `accelerate launch` starts it, with FSDP although there is no accelerator. No test lives here.

accelerate applies FSDP beside accelerators only: on a CPU the same settings would give plain DDP, without a word.
"""

from accelerate import PartialState
from accelerate.utils import DistributedType


start = PartialState.__init__


def start_sharded(self, *args, **kwargs) -> None:
    start(self, *args, **kwargs)
    if self.distributed_type == DistributedType.MULTI_CPU:
        self.distributed_type = DistributedType.MULTI_GPU


if __name__ == "__main__":
    PartialState.__init__ = start_sharded

    from perceptiongpt import train

    train.main()
