"""What tests run for scripts/finetune.py: its main, sharded on a CPU if $SHARDED_BY says how."""

import os
import sys

from finetuning import run


def fsdp2(make):  # accelerate refuses FSDP on a CPU; from prepare() on, all is what a GPU runs
    def make_sharded(arguments):
        from accelerate import PartialState
        from accelerate.state import AcceleratorState
        from accelerate.utils import DistributedType, FullyShardedDataParallelPlugin

        accelerator = make(arguments)
        plugin = FullyShardedDataParallelPlugin(
            fsdp_version=2, auto_wrap_policy="transformer_based_wrap", state_dict_type="sharded_state_dict",
            cpu_ram_efficient_loading=False,
        )  # fmt: skip
        for state in (PartialState, AcceleratorState):
            state._shared_state["distributed_type"] = DistributedType.FSDP
        AcceleratorState._shared_state["fsdp_plugin"] = plugin
        return accelerator

    return make_sharded


if __name__ == "__main__":
    sharded = os.environ.get("SHARDED_BY")
    if sharded == "fsdp2":
        run.make_accelerator = fsdp2(run.make_accelerator)
    elif sharded:
        from accelerate import PartialState

        PartialState(cpu=True)
    run.main(sys.argv[1:])
