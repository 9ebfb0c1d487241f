"""What several commands share: the parser, the words of options, and how a pipeline is found and loaded."""

import argparse
import os
import re
from typing import TYPE_CHECKING, Any, NoReturn

from localdit import MINI
from localdit.pictures import DTYPES, SCHEDULERS, Settings

if TYPE_CHECKING:
    import torch

    from localdit import LocalDiTPipeline

DEVICE_HELP = "cpu, cuda, cuda:1, mps, ... (default: a GPU if there is one)"


class Parser(argparse.ArgumentParser):
    """One that says what is wrong in one line."""

    def __init__(self, **kwargs: Any):
        super().__init__(formatter_class=argparse.RawDescriptionHelpFormatter, allow_abbrev=False, **kwargs)

    def error(self, message: str) -> NoReturn:
        self.exit(2, f"localdit: error: {message} (see {self.prog} --help)\n")


def add_drawing_options(group: Any) -> None:
    """Options that say how pictures are made, whatever they show. Each is None where it is not given."""
    group.add_argument(
        "--model",
        metavar="MODEL",
        help="pipeline folder, hub name, or 'mini', the small model in the package "
        f"(default: {Settings.model})",
    )
    group.add_argument(
        "--size", type=_parse_size, metavar="WxH", help="in pixels, or one number (default: the model's)"
    )
    group.add_argument("--steps", type=int, metavar="N", help=f"denoising steps (default: {Settings.steps})")
    group.add_argument(
        "--guidance",
        type=float,
        metavar="G",
        help=f"weight of the prompt; 1 is none (default: {Settings.guidance})",
    )
    group.add_argument(
        "--scheduler",
        choices=sorted(SCHEDULERS),
        metavar="NAME",
        help=f"{', '.join(sorted(SCHEDULERS))} (default: the model's)",
    )
    group.add_argument(
        "--dtype",
        choices=DTYPES,
        metavar="DTYPE",
        help=f"{', '.join(DTYPES)} (default: float32 on a CPU, bfloat16 elsewhere)",
    )


def _parse_size(text: str) -> tuple[int, int]:
    """Width and height of "640x480", or of "512" for a square."""
    match = re.fullmatch(r"(\d+)(?:x(\d+))?", text)
    if not match:
        raise argparse.ArgumentTypeError(f"must be WIDTHxHEIGHT or one number, got {text!r}")
    return int(match[1]), int(match[2] or match[1])


def find_model(name: str) -> str:
    """A pipeline folder as an absolute path; "mini" and hub names stand for themselves.

    Raises:
        ValueError: when it can be none of these.
    """
    if name == "mini":
        return name
    if os.path.isdir(name):
        if not os.path.isfile(os.path.join(name, "model_index.json")):
            raise ValueError(f"{name} is no pipeline folder: it holds no model_index.json")
        return os.path.abspath(name)
    if not re.fullmatch(r"\w[\w.-]*/[\w.-]+", name):
        raise ValueError(f"there is no folder {name}, and it is no hub name, which reads OWNER/NAME")
    return name


def choose_device(name: str | None, dtype: str | None) -> tuple["torch.device", str]:
    """The named device, or the machine's GPU, or its CPU; and the given dtype, or the one that suits it.

    Raises:
        ValueError: when PyTorch finds no such device here.
    """
    import torch

    accelerator = torch.accelerator.current_accelerator(check_available=True)
    try:
        device = torch.device(name or accelerator or "cpu")
    except RuntimeError:
        raise ValueError(f"PyTorch knows no device {name}") from None
    if device.type not in ("cpu", accelerator and accelerator.type):
        raise ValueError(f"PyTorch finds no device {name} here")
    return device, dtype or ("float32" if device.type == "cpu" else "bfloat16")


def load_pipeline(model: str, dtype: str, scheduler: str | None = None) -> "LocalDiTPipeline":
    """Load what `find_model` found, with another scheduler where one is named."""
    import diffusers
    import torch
    import transformers

    from localdit import LocalDiTPipeline

    # The bar of the denoising is enough.
    diffusers.utils.logging.disable_progress_bar()
    transformers.utils.logging.disable_progress_bar()
    folder = MINI if model == "mini" else model
    pipe = LocalDiTPipeline.from_pretrained(folder, dtype=getattr(torch, dtype))
    if scheduler:
        pipe.scheduler = getattr(diffusers, SCHEDULERS[scheduler]).from_config(pipe.scheduler.config)
    return pipe
