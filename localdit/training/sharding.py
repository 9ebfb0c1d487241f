"""What a model needs whose weights FSDP2 spreads over the processes, to do what one on its own does.

accelerate spreads it, as its config file says. Besides there are the arithmetic of one process, and weights
that are whole for as long as validation and previews take.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from accelerate import Accelerator
from accelerate.utils import convert_outputs_to_fp32
from torch import nn
from torch.distributed.fsdp import FSDPModule


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
