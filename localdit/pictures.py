"""Picture files: PNGs that carry the settings they were made with, and foreign pictures read with care.

Imports no PyTorch, so that a command can look at its files before it loads anything slow.
"""

import dataclasses
import hashlib
import json
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeAlias

from PIL import Image
from PIL.PngImagePlugin import PngInfo

from localdit.data.images import FORMATS as FORMATS
from localdit.data.images import BadSample, decode_image, open_image
from localdit.files import staged_file

KEY = "localdit"  # of the settings among the texts of a PNG
DTYPES = ("float32", "bfloat16", "float16")
# Short names for samplers of diffusers and of ours, and the kinds of noise that each can take away: by a
# schedule of betas, as of EDM, or along a flow.
SCHEDULERS = {
    "ddim": ("DDIMScheduler", ("betas",)),
    "ddpm": ("DDPMScheduler", ("betas",)),
    "dpm": ("DPMSolverMultistepScheduler", ("betas", "flow")),
    "edm-dpm": ("EDMDPMSolverMultistepScheduler", ("edm",)),
    "edm-euler": ("EDMEulerScheduler", ("edm",)),
    "edm-heun": ("EDMHeunScheduler", ("edm",)),
    "euler": ("EulerDiscreteScheduler", ("betas",)),
    "euler-ancestral": ("EulerAncestralDiscreteScheduler", ("betas",)),
    "flow-ab": ("FlowAdamsBashforthScheduler", ("flow",)),
    "flow-euler": ("FlowMatchEulerDiscreteScheduler", ("flow",)),
    "heun": ("HeunDiscreteScheduler", ("betas",)),
    "lcm": ("LCMScheduler", ("betas",)),
    "unipc": ("UniPCMultistepScheduler", ("betas", "flow")),
}


Rule: TypeAlias = tuple[str, Callable[[Any], bool]]


def _one_of(names: Sequence[str]) -> Rule:
    return f"one of {', '.join(names)}", lambda value: value in names


def _whole(low: int, high: int) -> Rule:
    return (
        f"a whole number from {low} to {high}",
        lambda value: isinstance(value, int) and low <= value <= high,
    )


def _number(low: int, high: int) -> Rule:
    return (
        f"a number from {low} to {high}",
        lambda value: isinstance(value, int | float) and low <= value <= high,
    )


def _or_none(rule: Rule) -> Rule:
    words, fits = rule
    return words, lambda value: value is None or fits(value)


def _is_size(value: Any) -> bool:
    return (
        isinstance(value, tuple)
        and len(value) == 2
        and all(isinstance(side, int) and side > 0 for side in value)
    )


_TEXT: Rule = ("a text", lambda value: isinstance(value, str))

# What each setting must be: in words, and as a test, since they may come from a stranger's file.
_RULES: dict[str, Rule] = {
    "prompt": _TEXT,
    "label": _or_none(_TEXT),
    "seed": _whole(0, 2**63 - 1),
    "negative": _or_none(_TEXT),
    "image": _or_none(_TEXT),
    "image_sha256": _or_none(_TEXT),
    "mask": _or_none(_TEXT),
    "mask_sha256": _or_none(_TEXT),
    "strength": _number(0, 1),
    "steps": _or_none(_whole(1, 1000)),
    "guidance": _or_none(_number(0, 100)),
    "size": _or_none(("a width and a height in pixels", _is_size)),
    "model": _TEXT,
    "pipeline": _or_none(_TEXT),
    "dtype": _or_none(_one_of(DTYPES)),
    "scheduler": _or_none(_one_of(tuple(SCHEDULERS))),
}


@dataclass(frozen=True, kw_only=True)
class Settings:
    """All that one picture depends on. The defaults are those of the command line.

    Raises:
        ValueError: for a value of the wrong type or out of its range.
    """

    prompt: str  # empty with a label
    label: str | None = None  # of a class, its name or number, where that is what the pipeline draws
    seed: int  # of the picture's own generator, which lives on the CPU
    negative: str | None = None  # None: the pipeline's default; likewise steps and guidance
    image: str | None = None  # absolute path of the picture to start from
    image_sha256: str | None = None
    mask: str | None = None  # likewise of a picture that is white where `image` is painted anew
    mask_sha256: str | None = None
    strength: float = 0.8  # how far to leave `image`: 0 keeps it, 1 starts from noise
    steps: int | None = None
    guidance: float | None = None
    size: tuple[int, int] | None = None  # width and height in pixels; None: the model's, or the image's
    model: str = "mini"
    pipeline: str | None = None  # class, package.module.Class; None: the one of ours that the model names
    dtype: str | None = None  # None: float32 on a CPU, bfloat16 elsewhere
    scheduler: str | None = None  # None: the model's own

    def __post_init__(self) -> None:
        for name, (rule, fits) in _RULES.items():
            value = getattr(self, name)
            if not fits(value):
                raise ValueError(f"{name} must be {rule}, got {value!r}")


# Settings that the pipeline has defaults of its own for, and what its call names them.
ARGUMENTS = {"negative": "negative_prompt", "steps": "num_inference_steps", "guidance": "guidance_scale"}


def call_options(settings: Settings) -> dict[str, Any]:
    """What a pipeline is called with for these settings, besides what it shows, starts from and draws."""
    given = {argument: getattr(settings, name) for name, argument in ARGUMENTS.items()}
    given |= {} if settings.size is None else dict(zip(("width", "height"), settings.size))
    return {argument: value for argument, value in given.items() if value is not None}


def read_settings(path: str) -> Settings:
    """The settings that a PNG of `write_png` carries.

    Raises:
        ValueError: when it is no PNG, or carries no settings that this version knows. Those that it lacks,
            as it was made before there were such, take their defaults.
    """
    try:
        picture = open_image(_read(path))
    except BadSample as error:
        raise ValueError(f"{path} {error}") from None
    text = picture.info.get(KEY) if picture.format == "PNG" else None
    if not isinstance(text, str):
        raise ValueError(f"{path} carries no settings of localdit")
    try:
        settings = json.loads(text)
        made_with = settings.pop("made_with")
        settings["size"] = tuple(settings["size"]) if settings.get("size") else None
    except (ValueError, TypeError, KeyError, AttributeError):
        raise ValueError(f"{path} carries damaged settings") from None
    needed = {field.name for field in dataclasses.fields(Settings) if field.default is dataclasses.MISSING}
    if differing := ", ".join(sorted((settings.keys() - _RULES.keys()) | (needed - settings.keys()))):
        raise ValueError(f"{path} was made by another version ({made_with}) with other settings: {differing}")
    return Settings(**settings)


def write_png(picture: Image.Image, path: Path, settings: Settings, made_with: dict[str, str]) -> None:
    """Write a picture with its settings inside: as JSON, and as a text that people and other programs read.

    The file appears under its name when it is whole; whatever stops the writing leaves nothing behind.

    Args:
        picture: What to write.
        path: Where to; replaced if it is there. Missing folders above it are made.
        settings: What `read_settings` gives back.
        made_with: For information: versions, the device and the class of the `scheduler`.
    """
    info = PngInfo()
    info.add_itxt(KEY, json.dumps(dataclasses.asdict(settings) | {"made_with": made_with}))
    info.add_itxt("parameters", _summary(settings, made_with, picture.size))
    with staged_file(path) as staged:
        picture.save(staged, format="PNG", pnginfo=info)


def _summary(settings: Settings, made_with: dict[str, str], size: tuple[int, int]) -> str:
    """In the form that the common web pages and galleries for generated pictures show."""
    values = {
        "Steps": settings.steps,
        "Sampler": made_with["scheduler"],
        "CFG scale": settings.guidance,
        "Seed": settings.seed,
        "Size": "{}x{}".format(*size),
        "Model": settings.model,
        "Denoising strength": None if settings.image is None else settings.strength,
    }
    negative = [f"Negative prompt: {settings.negative}"] if settings.negative else []
    listed = ", ".join(f"{name}: {value}" for name, value in values.items() if value is not None)
    return "\n".join([settings.label or settings.prompt, *negative, listed])


def read_picture(path: str) -> tuple[Image.Image, str]:
    """A picture to start from, as `decode_image` gives it, and the SHA-256 of its file.

    Raises:
        ValueError: when it is no JPEG, PNG or WEBP, is damaged, or too large (told by its header, before
            memory is taken for its pixels).
    """
    data = _read(path)
    try:
        return decode_image(data), hashlib.sha256(data).hexdigest()
    except BadSample as error:
        raise ValueError(f"{path} {error}") from None


def _read(path: str) -> bytes:
    if not Path(path).is_file():  # a device, say, may have no end
        raise ValueError(f"{path} is no file")
    return Path(path).read_bytes()
