"""What several commands share: the parser, the words of options, and how a pipeline is found and loaded."""

import argparse
import dataclasses
import difflib
import inspect
import os
import re
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any, NoReturn

from localdit import MINI
from localdit.pictures import ARGUMENTS, DTYPES, SCHEDULERS, Settings

if TYPE_CHECKING:
    import torch
    from diffusers import DiffusionPipeline, SchedulerMixin

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
    group.add_argument(
        "--pipeline",
        metavar="CLASS",
        help="package.module.Class, which is imported, of a model whose pipeline is none of localdit's",
    )
    group.add_argument("--steps", type=int, metavar="N", help="denoising steps (default: the pipeline's)")
    group.add_argument(
        "--guidance",
        type=float,
        metavar="G",
        help="weight of what it should show; 1 is none (default: the pipeline's)",
    )
    group.add_argument(
        "--scheduler",
        choices=SCHEDULERS,
        metavar="NAME",
        help=f"{', '.join(SCHEDULERS)}; those for the model's kind of noise (default: the model's)",
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


def find_pipeline(model: str, name: str | None = None) -> tuple["type[DiffusionPipeline]", dict[str, Any]]:
    """The class of a pipeline that `find_model` found, and its config, without its weights.

    Args:
        name: The class as package.module.Class. None: that of ours which the pipeline itself names. Whatever
            else it names is not imported.

    Raises:
        ValueError: There is no such class, or it is no pipeline.
    """
    from diffusers import DiffusionPipeline

    from localdit import pipelines

    config = DiffusionPipeline.load_config(_place(model))
    if name is not None:
        return pipelines.find_pipeline(name), config
    ours = {pipeline.__name__: pipeline for pipeline in pipelines.PIPELINES}
    said = config.get("_class_name")
    if not isinstance(said, str) or said not in ours:
        raise ValueError(
            f"{model} is a {said}, and localdit has {', '.join(ours)}: "
            "name the class of another by --pipeline"
        )
    return ours[said], config


def fit(settings: Settings, pipeline: "type[DiffusionPipeline]", config: Mapping[str, Any]) -> Settings:
    """Settings for a pipeline of this class, with its own defaults where they leave something open.

    Args:
        config: Of the pipeline; its `id2label` names the labels.

    Raises:
        ValueError: They hold what it does not take, or a label that it does not know.
    """
    takes = inspect.signature(pipeline.__call__).parameters
    makes = inspect.signature(pipeline).parameters
    if "class_labels" in takes:
        _check_label(settings, config)
    elif settings.label is not None:
        raise ValueError(f"{settings.model} draws prompts, not labels, got the label {settings.label}")
    for name, argument in (ARGUMENTS | {"image": "image", "mask": "mask", "size": "height"}).items():
        if argument not in takes and getattr(settings, name):
            raise ValueError(f"{pipeline.__name__} takes no {argument}: leave out --{name}")
    own: dict[str, Any] = {
        name: takes[argument].default if argument in takes else None
        for name, argument in ARGUMENTS.items()
        if getattr(settings, name) is None or argument not in takes
    }
    for name, argument in ARGUMENTS.items():  # a folder may have defaults of its own
        if name in own and argument in takes and (field := f"default_{argument}") in makes:
            own[name] = config.get(field, makes[field].default)
    return dataclasses.replace(settings, **own)


def _check_label(settings: Settings, config: Mapping[str, Any]) -> None:
    """Raise ValueError unless there is a label, by number or by a name that the config has."""
    from localdit.pipelines.common import label_names

    if settings.label is None:
        raise ValueError(f"{settings.model} draws labels, not prompts: give --label NAME or --label NUMBER")
    names = label_names(config.get("id2label"))
    if settings.label in names or settings.label.isdecimal():
        return
    near = difflib.get_close_matches(settings.label, names) or sorted(names)[:3]
    known = f"{len(names)} names, such as {', '.join(near)}" if names else "numbers alone"
    raise ValueError(f"--label must be a label of {settings.model}, with {known}, got {settings.label}")


def load_pipeline(settings: Settings) -> "DiffusionPipeline":
    """The pipeline that settings name, in their dtype and with their scheduler."""
    import diffusers
    import torch
    import transformers

    from localdit.pipelines.common import SafetensorsMixin

    # The bar of the denoising is enough.
    diffusers.utils.logging.disable_progress_bar()
    transformers.utils.logging.disable_progress_bar()
    place, pipeline = _place(settings.model), find_pipeline(settings.model, settings.pipeline)[0]
    scheduler = None
    if settings.scheduler is not None:  # before the weights: it may not fit
        own = diffusers.DDPMScheduler.load_config(place, subfolder="scheduler")
        scheduler = make_scheduler(settings.scheduler, own)
    options = {} if issubclass(pipeline, SafetensorsMixin) else {"use_safetensors": True}
    pipe = pipeline.from_pretrained(place, dtype=getattr(torch, str(settings.dtype)), **options)
    if scheduler is not None:
        pipe.scheduler = scheduler
    return pipe


def make_scheduler(name: str, own: Mapping[str, Any]) -> "SchedulerMixin":
    """The scheduler of a short name, for a model whose own scheduler has the config `own`.

    Raises:
        ValueError: It takes away another kind of noise.
    """
    from localdit.conversion import find_scheduler
    from localdit.models.single_file import known_fields

    class_name, kinds = SCHEDULERS[name]
    kind = noise_kind(own)
    if kind not in kinds:
        fitting = ", ".join(short for short, (_, fits) in SCHEDULERS.items() if kind in fits)
        raise ValueError(
            f"--scheduler must suit the model's own, {own['_class_name']}: one of {fitting}, got {name}"
        )
    changes: dict[str, Any] = {}
    if kind == "flow":  # the same levels under other names
        shift = own.get("flow_shift", own.get("shift", 1.0))
        changes = {"shift": shift, "flow_shift": shift, "use_flow_sigmas": True}
        changes |= {"prediction_type": "flow_prediction"}
    elif class_name != "DDPMScheduler":  # which alone takes a variance that the model predicts
        changes = {"variance_type": None}
    scheduler = find_scheduler(class_name)
    return scheduler.from_config(known_fields(scheduler, {**own, **changes}))


def noise_kind(config: Mapping[str, Any]) -> str:
    """The kind of noise, as in `SCHEDULERS`, that a scheduler with this config takes away."""
    class_name = config["_class_name"]
    if class_name.startswith("EDM"):
        return "edm"
    is_flow = class_name.startswith("Flow") or config.get("prediction_type") == "flow_prediction"
    return "flow" if is_flow else "betas"


def _place(model: str) -> str:
    """Folder or hub name of what `find_model` found."""
    return MINI if model == "mini" else model
