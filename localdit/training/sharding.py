"""What a model needs whose weights FSDP2 spreads over the processes, to do what one on its own does.

accelerate spreads it, as its config file says. Besides there are the arithmetic of one process, weights that
are whole for as long as validation and previews take, and a refusal of the engines that do not fit the loop.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from accelerate import Accelerator
from accelerate.utils import DistributedType, convert_outputs_to_fp32
from torch import nn
from torch.distributed.fsdp import FSDPModule


def check_engine(accelerator: Accelerator, optimizer: str) -> None:
    """Refuse what would train or save something else than one process does.

    DeepSpeed and the first FSDP keep the optimizer's state, or the parameters too, in flat buffers, where
    checkpoints of tensors by name do not find it: a resumed run would begin without it, and nobody would be
    told. DeepSpeed also steps in the backward pass and clips by its own configuration. Megatron-LM trains
    models of its own.

    Args:
        accelerator: As its configuration made it.
        optimizer: Its name in the configuration.

    Raises:
        ValueError: It is one of those three, or FSDP2 with an optimizer whose state cannot be spread.
    """
    kind = accelerator.distributed_type
    if accelerator.is_fsdp2:
        if optimizer == "adamw8bit":
            raise ValueError(
                "train.optimizer must be adamw, muon or schedule_free_adamw under FSDP2, got 'adamw8bit'"
            )
    elif kind in (DistributedType.DEEPSPEED, DistributedType.MEGATRON_LM, DistributedType.FSDP):
        found = "FSDP with fsdp_version 1" if kind == DistributedType.FSDP else kind.value
        raise ValueError(
            "accelerate's distributed_type must be one of DDP (configs/accelerate/ddp.yaml), or FSDP with "
            "fsdp_version 2 (configs/accelerate/fsdp2.yaml), which shards as DeepSpeed's ZeRO-3 does, "
            f"got {found}"
        )


def prepare(accelerator: Accelerator, model: Any, optimizer: Any) -> tuple[Any, Any]:
    """`accelerator.prepare`, with FSDP2's arithmetic that of one process.

    For 16 bits accelerate has FSDP2 round all weights and inputs, noise levels and rotary tables with the
    rest, and add up the gradients of all processes in them. Here weights and gradients stay float32, and the
    model runs under autocast, as in one process and with DDP.
    """
    if not accelerator.is_fsdp2:
        return accelerator.prepare(model, optimizer)
    accelerator.state.fsdp_plugin.mixed_precision_policy = None
    if accelerator.mixed_precision != "no":
        forward = accelerator.autocast()(model.forward)
        model.forward = convert_outputs_to_fp32(forward)
    model, optimizer = accelerator.prepare(model, optimizer)
    # What reads the model's states beside it, a side task, does so after its forward pass.
    model.set_reshard_after_forward(False, recurse=False)
    return model, optimizer


@contextmanager
def gathered(accelerator: Accelerator, model: nn.Module) -> Iterator[None]:
    """All weights in every process, which may then run any part of the model, as often as it likes.

    Otherwise the processes would wait for each other at each block: for the one that has one sample more to
    validate, or that was not asked to stop. And only `forward` finds the weights whole by itself.
    """
    parts = [part for part in model.modules() if isinstance(part, FSDPModule)]
    for part in parts:
        part.set_reshard_after_forward(False, recurse=False)
        part.unshard()
    try:
        yield
    finally:
        for part in parts:
            # Weights that stay gathered would not see the optimizer's next step.
            part.reshard()
            again = part is not model and accelerator.state.fsdp_plugin.reshard_after_forward
            part.set_reshard_after_forward(again, recurse=False)
