"""What pipelines share: how a call begins, checked arguments, pictures as tensors, the times of schedulers,
callbacks, LoRA, a watch for NaN."""

import inspect
from bisect import bisect_right
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, ClassVar, TypeAlias, Union

import numpy as np
import torch
import torch.nn.functional as F
import transformers
from diffusers.callbacks import MultiPipelineCallbacks, PipelineCallback
from diffusers.loaders import SanaLoraLoaderMixin
from diffusers.models.autoencoders.vae import DiagonalGaussianDistribution
from diffusers.utils.torch_utils import randn_tensor
from PIL import Image, ImageOps
from torch import Tensor

from localdit.models.strict import refuse_pickles
from localdit.models.vae_streaming import check_streaming, stream_decode, stream_encode

# Times are differences of float32 numbers: what is nearer to an end of an interval counts as the end.
_INTERVAL_ROUNDING = 1e-6

VAE_REMEDY = "run the VAE in float32 (pipe.vae.to(torch.float32)), or take one made for float16"

ImageInput: TypeAlias = Union[Image.Image, np.ndarray, Tensor, Sequence["ImageInput"]]  # noqa: UP007


class NonFiniteError(RuntimeError):
    """A model gave NaN or infinity, and a black picture would follow. The message names model and remedy."""


def require_finite(x: Tensor, source: str, remedy: str) -> None:
    """Raise `NonFiniteError` unless every number in x is finite."""
    if not x.isfinite().all():
        raise NonFiniteError(f"{source} gave numbers that are not finite: {remedy}")


def check_text(name: str, text: str | list[str] | None, embeds: Tensor | None, width: int) -> int:
    """Check text, or embeddings in its place, and return how many there are.

    Args:
        name: Of the argument that holds the text; that of the embeddings is `{name}_embeds`.
        text: One text or a list; None with embeddings.
        embeds: (texts, T, width), or None.
        width: Of an embedding.
    """
    if embeds is None:
        texts = text if isinstance(text, list) else [text]
        if not texts or not all(isinstance(text, str) for text in texts):
            raise ValueError(
                f"{name} must be a text or a list of texts, or {name}_embeds be given, got {text!r}"
            )
        return len(texts)

    if text is not None:
        raise ValueError(f"{name} must be None with {name}_embeds, got {text!r}")
    if embeds.ndim != 3 or embeds.shape[2] != width or embeds.numel() == 0:
        raise ValueError(f"{name}_embeds must be (texts, tokens, {width}), got {tuple(embeds.shape)}")
    if not (embeds.is_floating_point() and embeds.isfinite().all()):
        raise ValueError(
            f"{name}_embeds must be finite floating point numbers, got {embeds.dtype} or NaN or infinity"
        )
    return len(embeds)


def check_text_mask(name: str, embeds: Tensor | None, mask: Tensor | None) -> None:
    """Check `{name}_attention_mask`, (texts, T), 1 = keep, 0 = padding, which goes with embeddings alone."""
    if embeds is None:
        if mask is not None:
            raise ValueError(f"{name}_attention_mask must come with {name}_embeds")
        return
    if mask is None or mask.shape != embeds.shape[:2]:
        raise ValueError(
            f"{name}_attention_mask must be {tuple(embeds.shape[:2])} as {name}_embeds is, "
            f"got {None if mask is None else tuple(mask.shape)}"
        )
    if not ((mask == 0) | (mask == 1)).all() or not (mask == 1).any(dim=1).all():
        raise ValueError(f"{name}_attention_mask must be 1 for text and 0 for padding, with a 1 in every row")


def check_prompts(
    prompt: str | list[str] | None,
    negative_prompt: str | list[str] | None,
    prompt_embeds: Tensor | None,
    negative_prompt_embeds: Tensor | None,
    *,
    width: int,
    max_sequence_length: int,
    guided: bool,
) -> int:
    """Check prompts and negative prompts, or embeddings in their place; return how many prompts there are.

    Args:
        width: Of an embedding.
        max_sequence_length: Tokens that text is made into.
        guided: Whether the negative prompts will be used, so that they must be as long as the others.
    """
    prompts = check_text("prompt", prompt, prompt_embeds, width)
    # To embeddings the default negative prompt, the empty text, is no contradiction.
    negative = negative_prompt or ("" if negative_prompt_embeds is None else None)
    negatives = check_text("negative_prompt", negative, negative_prompt_embeds, width)
    if negatives != prompts and not isinstance(negative, str):
        raise ValueError(
            f"negative_prompt must be one text or {prompts}, one for each prompt, got {negatives}"
        )
    length, negative_length = (
        max_sequence_length if embeds is None else embeds.shape[1]
        for embeds in (prompt_embeds, negative_prompt_embeds)
    )
    if guided and length != negative_length:
        raise ValueError(
            f"prompt and negative_prompt must have one length, got {length} and {negative_length}; "
            "that of text is max_sequence_length"
        )
    return prompts


def check_eta(eta: float, scheduler: Any) -> None:
    """Raise ValueError if the scheduler is to add DDIM's share of noise, and takes none."""
    if eta and "eta" not in inspect.signature(scheduler.step).parameters:
        raise ValueError(f"eta must be 0 with {type(scheduler).__name__}, which takes none, got {eta}")


def tensor_inputs(callback: Callable[..., Any] | None, names: Sequence[str]) -> Sequence[str]:
    """Names of the tensors that a callback is given: diffusers' callback objects say theirs."""
    if isinstance(callback, PipelineCallback | MultiPipelineCallbacks):
        return callback.tensor_inputs
    return names


def label_names(id2label: Mapping[Any, str] | None) -> dict[str, int]:
    """The label of each name, from names by label. One label may have several names, with commas between
    them, as those of ImageNet have."""
    names = {}
    for label, text in (id2label or {}).items():
        for name in text.split(","):
            names[name.strip()] = int(label)  # JSON makes texts of numbers
    return names


def read_labels(class_labels: Any, names: Mapping[str, int], classes: int) -> list[int]:
    """Labels from numbers or names.

    Args:
        class_labels: A number, a name, a list of them, or a tensor (B,) of numbers.
        names: As `label_names` gives them.
        classes: Labels are from 0 to `classes`; the last is no class.
    """
    if isinstance(class_labels, Tensor):
        class_labels = class_labels.tolist()
    given = class_labels if isinstance(class_labels, list | tuple) else [class_labels]
    if not given:
        raise ValueError(f"class_labels must hold a label, got {class_labels!r}")
    labels = []
    for value in given:
        if isinstance(value, str) and value not in names:
            raise ValueError(
                f"class_labels must be numbers or known names, got {value!r}, which is none of {len(names)}"
            )
        label = names[value] if isinstance(value, str) else value
        if not isinstance(label, int) or isinstance(label, bool) or not 0 <= label <= classes:
            raise ValueError(f"class_labels must be integers from 0 to {classes} or names, got {value!r}")
        labels.append(label)
    return labels


def text_encoder_class(config: Any) -> Any:
    """The class of transformers that encodes text with weights of this config.

    Of whole models, a CLIP with its eyes or a Gemma that goes on with a text, it is the part that a pipeline
    reads.
    """
    parts = {"clip": "CLIPTextModel", "gemma2": "Gemma2Model"}
    return getattr(transformers, parts.get(config.model_type, "AutoModelForTextEncoding"))


def lost_words(tokenizer: Any, text: str, length: int) -> str:
    """The words at the end of a text that do not fit, whole, into `length` tokens."""
    words = text.split()

    def tokens(count: int) -> int:
        return len(tokenizer(" ".join(words[:count]), verbose=False).input_ids)

    if tokens(len(words)) <= length:
        return ""
    return " ".join(words[bisect_right(range(1, len(words) + 1), length, key=tokens) :])


def read_images(image: ImageInput, latent_channels: int, name: str = "image") -> list[Tensor]:
    """Read pictures of any usual kind, or latents.

    Args:
        image: One of the following, or a list of them. A PIL image, of any mode but the 32-bit greys "I" and
            "F", is turned as its EXIF orientation says. An array is (H, W), (H, W, C) or (N, H, W, C), a
            tensor (H, W), (C, H, W) or (N, C, H, W), with C = 1 (grey), 3 (RGB) or 4 (RGBA), of bool, uint8,
            uint16, or floating point in [0, 1]. Transparency is laid on white. A tensor with C =
            `latent_channels` holds latents, unless that is 1 or 3.
        latent_channels: Channels of a latent.
        name: Of the argument, for messages.

    Returns:
        Float32 tensors: pictures (3, H, W) in [0, 1], or latents (latent_channels, h, w) as they are.
    """
    if isinstance(image, list | tuple):
        if not image:
            raise ValueError(f"{name} must hold a picture or be None, got an empty list")
        return [x for item in image for x in read_images(item, latent_channels, name)]
    if isinstance(image, Image.Image):
        image = _pil_to_numpy(image, name)
    if isinstance(image, np.ndarray):
        x = torch.from_numpy(image.copy())
        x = x if x.ndim == 2 else x.movedim(-1, -3)
    elif isinstance(image, Tensor):
        x = image
        if x.ndim in (3, 4) and x.shape[-3] == latent_channels and latent_channels not in (1, 3):
            if not (x.is_floating_point() and x.isfinite().all()):
                raise ValueError(f"{name} holds latents, which must be finite floating point numbers")
            return list(x.float().reshape(-1, *x.shape[-3:]))
    else:
        raise ValueError(
            f"{name} must be a PIL image, an array, a tensor or a list of these, got {type(image).__name__}"
        )

    x = x[None] if x.ndim == 2 else x
    if x.ndim not in (3, 4) or x.shape[-3] not in (1, 3, 4) or x.numel() == 0:
        raise ValueError(
            f"{name} must be (H, W), (H, W, C) or (N, H, W, C) as an array, (H, W), (C, H, W) or "
            f"(N, C, H, W) as a tensor, with C = 1, 3 or 4, got {tuple(image.shape)}"
        )
    x = _to_unit_range(x.reshape(-1, *x.shape[-3:]), name)  # (N, C, H, W)
    if x.shape[1] == 4:
        color, alpha = x[:, :3], x[:, 3:]
        x = color * alpha + (1 - alpha)
    return list(x.expand(-1, 3, -1, -1))


def _pil_to_numpy(image: Image.Image, name: str) -> np.ndarray:
    image = ImageOps.exif_transpose(image)
    if image.mode in ("I", "F"):
        raise ValueError(
            f"{name} must have a mode of known range, got PIL mode {image.mode!r}; convert it first"
        )
    if image.mode.startswith("I;16"):
        return np.asarray(image).astype(
            np.uint16
        )  # Pillow would cut it to 8 bits; the type undoes big-endian
    return np.asarray(image.convert("RGBA" if image.has_transparency_data else "RGB"))


def _to_unit_range(x: Tensor, name: str) -> Tensor:
    if x.dtype == torch.bool:
        return x.float()
    if x.dtype in (torch.uint8, torch.uint16):
        return x.float() / torch.iinfo(x.dtype).max
    if not x.is_floating_point():
        raise ValueError(f"{name} must be bool, uint8, uint16 or floating point, got {x.dtype}")
    low, high = x.aminmax()
    if not (low >= 0 and high <= 1):  # NaN fails too
        raise ValueError(
            f"{name} must lie in [0, 1], got [{low:.4g}, {high:.4g}]; ({name} + 1) / 2 brings [-1, 1] there"
        )
    return x.float()


def is_picture(x: Tensor) -> bool:
    """Whether `read_images` gave a picture, or latents."""
    return len(x) == 3


def check_images(images: list[Tensor], prompts: int, latent_size: tuple[int, int]) -> None:
    """Check that images from `read_images` fit so many prompts and, where they are latents, the size."""
    if len(images) not in (1, prompts):
        raise ValueError(f"image must be one or {prompts}, one for each prompt, got {len(images)}")
    if len({len(x) for x in images}) > 1:
        raise ValueError("image must hold pictures or latents, got both")
    if not is_picture(images[0]) and any(x.shape[1:] != latent_size for x in images):
        raise ValueError(
            f"image holds latents, which are not stretched: they must be {latent_size}, "
            f"got {[tuple(x.shape[1:]) for x in images]}"
        )


def image_size(images: list[Tensor], multiple: int) -> tuple[int, int]:
    """The common height and width of pictures, rounded down to a multiple."""
    sizes = sorted({(x.shape[-2], x.shape[-1]) for x in images})
    if len(sizes) > 1:
        raise ValueError(f"height and width must be given with images of different sizes, got {sizes}")
    height, width = sizes[0]
    if min(height, width) < multiple:
        raise ValueError(
            f"height and width must be given with an image under {multiple} a side, got {height} x {width}"
        )
    return height // multiple * multiple, width // multiple * multiple


def resize_images(images: list[Tensor], height: int, width: int) -> Tensor:
    """Stretch pictures (3, H, W) to (N, 3, height, width): bicubic, antialiased; those of that size stay."""
    resized = []
    for x in images:
        if x.shape[-2:] != (height, width):
            x = F.interpolate(x[None], (height, width), mode="bicubic", antialias=True)[0].clamp(0, 1)
        resized.append(x)
    return torch.stack(resized)


def enlarge_images(images: list[Tensor], height: int, width: int) -> list[Tensor]:
    """Stretch pictures (3, H, W) to (3, height, width) by Pillow's Lanczos filter, in floating point."""

    def stretch(channel: Tensor) -> Tensor:
        resized = Image.fromarray(channel.cpu().numpy()).resize((width, height), Image.Resampling.LANCZOS)
        return torch.from_numpy(np.array(resized))

    return [torch.stack([stretch(channel) for channel in x]).clamp(0, 1) for x in images]


def set_timesteps(
    scheduler: Any,
    num_inference_steps: int,
    tokens: int,
    device: torch.device,
    timesteps: list[int] | None = None,
    sigmas: list[float] | None = None,
) -> int:
    """Set the times that a scheduler visits.

    Args:
        scheduler: Any of diffusers'.
        num_inference_steps: Steps, where neither `timesteps` nor `sigmas` is given.
        tokens: Image tokens, by which a scheduler with `use_dynamic_shifting` moves its times (Esser et al.
            2024, arXiv 2403.03206, section 5.3.2), on the line through two points that its config gives.
        device: Where the times are put.
        timesteps: Own times, falling, if the scheduler takes them.
        sigmas: Own noise levels, falling, if the scheduler takes them. Not both.

    Returns:
        The number of steps. A scheduler of order 2 visits two times in each but the last.
    """
    own: dict[str, Any] = {"timesteps": timesteps, "sigmas": sigmas}
    own = {name: values for name, values in own.items() if values is not None}
    if len(own) == 2:
        raise ValueError("timesteps and sigmas must not both be given: leave one at None")
    for name, values in own.items():
        if len(values) == 0:
            raise ValueError(f"{name} must hold a value or be None, got {values!r}")
        if name not in inspect.signature(scheduler.set_timesteps).parameters:
            raise ValueError(f"{name} must be None with {type(scheduler).__name__}, which takes none")

    shift = {}
    if scheduler.config.get("use_dynamic_shifting", False):
        points = {"base_image_seq_len": 256, "max_image_seq_len": 4096, "base_shift": 0.5, "max_shift": 1.15}
        x0, x1, y0, y1 = (scheduler.config.get(name, default) for name, default in points.items())
        shift["mu"] = y0 + (y1 - y0) * (tokens - x0) / (x1 - x0)

    scheduler.set_timesteps(**(own or {"num_inference_steps": num_inference_steps}), device=device, **shift)
    return -(-len(scheduler.timesteps) // getattr(scheduler, "order", 1))


@contextmanager
def float32_where_asked(vae: Any) -> Iterator[None]:
    """Put a float16 VAE whose config says that it overflows (`force_upcast`) in float32 for a while."""
    upcast = vae.dtype == torch.float16 and vae.config.get("force_upcast", False)
    if upcast:
        vae.float()
    try:
        yield
    finally:
        if upcast:
            vae.half()


class SafetensorsMixin:
    """Before `DiffusionPipeline` among the bases of a pipeline: its parts are read from safetensors."""

    @classmethod
    def from_pretrained(cls, pretrained_model_name_or_path: Any, **kwargs: Any) -> Any:
        """Diffusers' method, but pickles (`.bin`) are read with `use_safetensors=False` alone.

        Raises:
            ValueError: A part has no safetensors weights, but pickles; it is said how to convert them.
        """
        if kwargs.get("use_safetensors") is None:
            kwargs["use_safetensors"] = True
            for part in Path(pretrained_model_name_or_path).glob("*/"):
                if part.name not in kwargs:  # what is given is not loaded
                    refuse_pickles(part)
        load: Any = super().from_pretrained  # type: ignore[misc]
        return load(pretrained_model_name_or_path, **kwargs)


def changed_text(
    text: Mapping[str, Any], changed: Mapping[str, Any], was_guided: bool, guided: bool
) -> dict[str, Any]:
    """The tensors of the text, by argument, after a callback changed them, or the guidance."""
    if guided and not was_guided:
        raise ValueError(
            "guidance_scale must be above 1 from the start if a callback is to raise it: a call without "
            "guidance reads no negative prompt"
        )
    new = {name: changed.get(name, tensor) for name, tensor in text.items()}
    # Callbacks that end the guidance, diffusers' own among them, expect the negative half before the positive
    # one and keep the last rows. Here all rows are positive, and all are kept.
    if was_guided and not guided and len(new["prompt_embeds"]) < len(text["prompt_embeds"]):
        new |= {name: tensor for name, tensor in text.items() if not name.startswith("negative")}
    return new


def decode_latents(vae: Any, latents: Tensor) -> Tensor:
    """Pictures of latents (B, C, H, W): (B, 3, height, width), float32, black -1 and white 1.

    Raises:
        NonFiniteError: The VAE gives NaN or infinity.
    """
    latents = _unscaled(vae, latents)
    with float32_where_asked(vae):
        pixels = vae.decode(latents.to(vae.dtype), return_dict=False)[0].float()
    require_finite(pixels, "the VAE's decoder", VAE_REMEDY)
    return pixels


def decode_bands(vae: Any, latents: Tensor, max_bytes: int, max_pixels: int) -> Iterator[Tensor]:
    """What `decode_latents` gives, in bands (B, 3, rows, width) from the top.

    Args:
        max_bytes, max_pixels: Of `stream_decode`.

    Raises:
        NonFiniteError: The VAE gives NaN or infinity.
    """
    latents = _unscaled(vae, latents)
    with float32_where_asked(vae):
        latents = latents.to(vae.dtype)
        for band in stream_decode(vae, latents, max_bytes=max_bytes, max_pixels=max_pixels):
            pixels = band.float()
            require_finite(pixels, "the VAE's decoder", VAE_REMEDY)
            yield pixels


def _unscaled(vae: Any, latents: Tensor) -> Tensor:
    """Latents as the VAE made them, of those that the transformer knows."""
    return latents / vae.config.scaling_factor + (vae.config.get("shift_factor") or 0.0)


class DenoisingMixin:
    """How a call begins, what it takes, and what callbacks and tools of diffusers read off it meanwhile.

    The pipeline works on pixels, unless `LatentsMixin` says otherwise.
    """

    transformer: Any
    scheduler: Any
    _callback_tensor_inputs: ClassVar[list[str]]
    _guidance_scale = 1.0
    _guidance_interval: tuple[float, float] | None = None
    _attention_kwargs: dict[str, Any] | None = None
    _num_timesteps = 0
    _current_timestep: Tensor | None = None
    _interrupt = False

    @property
    def guidance_scale(self) -> float:
        return self._guidance_scale

    @property
    def do_classifier_free_guidance(self) -> bool:
        return self._guidance_scale > 1

    @property
    def guidance_interval(self) -> tuple[float, float] | None:
        return self._guidance_interval

    @property
    def attention_kwargs(self) -> dict[str, Any] | None:
        return self._attention_kwargs

    @property
    def num_timesteps(self) -> int:
        return self._num_timesteps

    @property
    def current_timestep(self) -> Tensor | None:
        return self._current_timestep

    @property
    def interrupt(self) -> bool:
        """A callback sets `pipe._interrupt = True` to stop after its step, with what there is then."""
        return self._interrupt

    @property
    def vae_scale_factor(self) -> int:
        """Pixels to a latent, along a side."""
        return 1

    def get_timesteps(self, num_inference_steps: int, strength: float) -> tuple[Tensor, int]:
        """The times and the number of the last int(num_inference_steps * strength) steps, where the scheduler
        is set to begin."""
        steps = int(num_inference_steps * strength)
        begin = (num_inference_steps - steps) * getattr(self.scheduler, "order", 1)
        if hasattr(self.scheduler, "set_begin_index"):
            self.scheduler.set_begin_index(begin)
        return self.scheduler.timesteps[begin:], steps

    def scale_model_input(self, latents: Tensor, t: Tensor) -> Tensor:
        """The latents as the transformer is given them at the time t, which few schedulers change."""
        scale = getattr(self.scheduler, "scale_model_input", None)
        return latents if scale is None else scale(latents, t)

    @property
    def _size_multiple(self) -> int:
        """Pixels to a token, along a side."""
        return self.vae_scale_factor * self.transformer.config.patch_size

    def _begin(
        self,
        guidance_scale: float,
        attention_kwargs: dict[str, Any] | None,
        guidance_interval: tuple[float, float] | None = None,
    ) -> None:
        """Refuse to denoise without the parts for it, and set what the properties show."""
        for name in ("transformer", "scheduler"):
            if getattr(self, name) is None:
                raise ValueError(f"{name} must be loaded to make a picture, got None")
        if guidance_interval is not None:
            two = isinstance(guidance_interval, tuple | list) and len(guidance_interval) == 2
            if not two or not 0 <= guidance_interval[0] <= guidance_interval[1] <= 1:
                raise ValueError(
                    f"guidance_interval must be two numbers that rise within 0 and 1, got {guidance_interval}"
                )
        self._guidance_scale = guidance_scale
        self._guidance_interval = guidance_interval
        self._attention_kwargs = attention_kwargs
        self._interrupt = False

    def _inside_interval(self, time: float) -> bool:
        """Whether guidance, if there is any, acts at a time, where 0 is noise and 1 is the picture."""
        if self.guidance_interval is None:
            return True
        low, high = self.guidance_interval
        return low + _INTERVAL_ROUNDING < time < high - _INTERVAL_ROUNDING

    def _read_images(
        self, image: ImageInput | None, height: int | None, width: int | None
    ) -> tuple[list[Tensor], int, int]:
        """The images to start from, and height and width in pixels: as given, else the images', rounded down,
        else what the transformer was made for."""
        images = [] if image is None else read_images(image, self.transformer.config.in_channels)
        if height is None or width is None:
            own_height = own_width = self.transformer.config.sample_size * self.vae_scale_factor
            if images:
                pixels = 1 if is_picture(images[0]) else self.vae_scale_factor
                sizes = image_size(images, self._size_multiple // pixels)
                own_height, own_width = (size * pixels for size in sizes)
            height = own_height if height is None else height
            width = own_width if width is None else width
        return images, height, width

    def _check_call(
        self,
        *,
        conditions: int,
        batch: int,
        height: int,
        width: int,
        images: list[Tensor],
        counts: Mapping[str, int],
        shares: Mapping[str, float],
        generator: torch.Generator | list[torch.Generator] | None,
        latents: Tensor | None,
        output_type: str,
        callback_tensor_inputs: Sequence[str],
    ) -> None:
        """Raise ValueError for arguments of any pipeline's `__call__` that cannot work.

        Args:
            conditions: Prompts or labels.
            batch: Pictures that there will be.
            height, width: In pixels.
            images: As `_read_images` gives them.
            counts: Numbers by argument, which must be at least 1.
            shares: Numbers by argument, which must be from 0 to 1.
        """
        for name, size in (("height", height), ("width", width)):
            if size < 1 or size % self._size_multiple:
                raise ValueError(f"{name} must be a positive multiple of {self._size_multiple}, got {size}")
        for name, count in counts.items():
            if count < 1:
                raise ValueError(f"{name} must be at least 1, got {count}")
        for name, share in shares.items():
            if not 0 <= share <= 1:
                raise ValueError(f"{name} must be between 0 and 1, got {share}")
        if output_type not in ("pil", "np", "pt", "latent"):
            raise ValueError(f"output_type must be 'pil', 'np', 'pt' or 'latent', got {output_type!r}")
        if unknown := set(callback_tensor_inputs) - set(self._callback_tensor_inputs):
            raise ValueError(
                f"callback_on_step_end_tensor_inputs must be among {self._callback_tensor_inputs}, "
                f"got {sorted(unknown)}"
            )
        if isinstance(generator, list) and len(generator) != batch:
            raise ValueError(
                f"generator must be one or a list of {batch}, one for each picture, got {len(generator)}"
            )
        latent_size = height // self.vae_scale_factor, width // self.vae_scale_factor
        shape = (batch, self.transformer.config.in_channels, *latent_size)
        if latents is not None and (
            latents.shape != shape or not latents.is_floating_point() or not latents.isfinite().all()
        ):
            raise ValueError(
                f"latents must be finite floating point numbers of shape {shape}, "
                f"got {latents.dtype} of shape {tuple(latents.shape)}"
            )
        if images:
            check_images(images, conditions, latent_size)

    def _step_kwargs(self, **given: Any) -> dict[str, Any]:
        """Of what a step of a scheduler may be given, that which this scheduler's takes."""
        taken = inspect.signature(self.scheduler.step).parameters
        return {name: value for name, value in given.items() if name in taken}


class LatentsMixin(DenoisingMixin):
    """Pictures to latents, where denoising begins, and back, for a pipeline with a `vae` that may be None."""

    vae: Any
    image_processor: Any
    _vae_streaming: dict[str, int] | None = None

    @property
    def vae_scale_factor(self) -> int:
        """Pixels to a latent, along a side."""
        return 8 if self.vae is None else 2 ** (len(self.vae.config.block_out_channels) - 1)

    def encode_image(
        self,
        images: list[Tensor],
        batch_size: int,
        height: int,
        width: int,
        device: torch.device,
        generator: torch.Generator | list[torch.Generator] | None = None,
    ) -> Tensor:
        """Latents of `read_images`' pictures, (batch_size, C, H, W): each picture goes through the VAE once,
        and every latent is a sample of its own. Latents are taken as they are."""
        repeats = batch_size // len(images)
        if not is_picture(images[0]):
            return torch.stack(images).to(device).repeat_interleave(repeats, dim=0)
        pixels = self.image_processor.normalize(resize_images(images, height, width))
        with float32_where_asked(self.vae):
            pixels = pixels.to(device, self.vae.dtype)
            if self._vae_streaming is None:
                moments = self.vae.encode(pixels).latent_dist.parameters
            else:
                moments = stream_encode(self.vae, pixels, **self._vae_streaming)
        require_finite(moments, "the VAE's encoder", VAE_REMEDY)
        posterior = DiagonalGaussianDistribution(moments.float().repeat_interleave(repeats, dim=0))
        shift = self.vae.config.get("shift_factor") or 0.0
        return (posterior.sample(generator) - shift) * self.vae.config.scaling_factor

    def decode_latents(self, latents: Tensor) -> Tensor:
        """Pictures of latents (B, C, H, W): (B, 3, height, width), float32, black -1 and white 1."""
        if self._vae_streaming is None:
            return decode_latents(self.vae, latents)
        return torch.cat(list(decode_bands(self.vae, latents, **self._vae_streaming)), dim=2)

    def decode_rows(self, latents: Tensor) -> Iterator[tuple[int, np.ndarray]]:
        """Pictures of latents (B, C, H, W) as they come, with `enable_vae_streaming`: the index of a row, and
        the rows from there, (B, rows, width, 3), uint8."""
        if self._vae_streaming is None:
            raise ValueError("rows come of a streamed vae: call enable_vae_streaming first")
        top = 0
        for band in decode_bands(self.vae, latents, **self._vae_streaming):
            rows = (self.image_processor.denormalize(band) * 255).round().to(torch.uint8)
            yield top, rows.permute(0, 2, 3, 1).cpu().numpy()
            top += band.shape[2]

    @torch.no_grad()
    def decode_pictures(self, latents: Tensor, output_type: str) -> Any:
        """Pictures of latents (B, C, H, W), as `output_type` says: "pil", "np" or "pt".

        With `enable_vae_streaming` PIL images are made one by one, of rows of bytes, and no other picture is
        held.
        """
        if self._vae_streaming is None or output_type != "pil":
            return self.image_processor.postprocess(self.decode_latents(latents), output_type)
        alone = ([rows[0] for _, rows in self.decode_rows(x)] for x in latents.split(1))
        return [Image.fromarray(np.concatenate(rows)) for rows in alone]

    def enable_vae_streaming(self, max_bytes: int = 2**32, max_pixels: int = 2**16) -> None:
        """Decode and encode exactly, at any size, in the memory given: see `stream_decode` for what and how.

        Beside the two that diffusers' VAEs have: `vae.enable_tiling()` is quicker where memory is short, but
        every tile has a tone of its own; `vae.enable_slicing()` decodes the pictures of a batch one by one.

        Args:
            max_bytes: Of feature maps that are kept. Where they do not fit they are computed again.
            max_pixels: Of the bands that the picture is computed in.

        Raises:
            ValueError: The vae is none that can be streamed.
        """
        check_streaming(self.vae, max_bytes, max_pixels)
        self._vae_streaming = {"max_bytes": max_bytes, "max_pixels": max_pixels}

    def disable_vae_streaming(self) -> None:
        """Decode and encode as the vae does."""
        self._vae_streaming = None

    def prepare_latents(
        self,
        batch_size: int,
        height: int,
        width: int,
        timesteps: Tensor,
        device: torch.device,
        generator: torch.Generator | list[torch.Generator] | None = None,
        latents: Tensor | None = None,
        image_latents: Tensor | None = None,
    ) -> Tensor:
        """Latents to denoise, (batch_size, C, H, W): noise alone, or `image_latents` with the noise of the
        first time to visit."""
        noise = self.prepare_noise(batch_size, height, width, device, generator, latents)
        if image_latents is None:
            return noise * getattr(self.scheduler, "init_noise_sigma", 1.0)
        return self.add_noise(image_latents, noise, timesteps)

    def prepare_noise(
        self,
        batch_size: int,
        height: int,
        width: int,
        device: torch.device,
        generator: torch.Generator | list[torch.Generator] | None = None,
        latents: Tensor | None = None,
    ) -> Tensor:
        """Unit noise, (batch_size, C, H, W): `latents` where they are given. It is drawn in float32, so that
        a seed means the same at every precision."""
        factor = self.vae_scale_factor
        shape = (batch_size, self.transformer.config.in_channels, height // factor, width // factor)
        if latents is None:
            return randn_tensor(shape, generator=generator, device=device, dtype=torch.float32)
        return latents.to(device, torch.float32)

    def add_noise(self, latents: Tensor, noise: Tensor, timesteps: Tensor) -> Tensor:
        """Clean latents (B, C, H, W) with the noise of the time that comes next, the first of those that are
        still to visit; without any, as they are."""
        if len(timesteps) == 0:
            return latents
        times = timesteps[:1].expand(len(latents))
        if hasattr(self.scheduler, "scale_noise"):  # flow matching
            return self.scheduler.scale_noise(latents, times, noise)
        return self.scheduler.add_noise(latents, noise, times)

    def _check_vae(self, images: list[Tensor], output_type: str) -> None:
        """Raise ValueError for pictures in or out without a vae."""
        if self.vae is None and output_type != "latent":
            raise ValueError(f"output_type must be 'latent' without a vae, got {output_type!r}")
        if self.vae is None and images and is_picture(images[0]):
            raise ValueError("image must be latents without a vae, got pictures")


class TransformerLoraMixin(SanaLoraLoaderMixin):
    """LoRA for a pipeline with a `transformer`.

    Sana's mixin is diffusers' plain case, one component by that name, and holds nothing of Sana's. Ours only
    refuses what it would take in silence or on trust.
    """

    @classmethod
    def lora_state_dict(cls, pretrained_model_name_or_path_or_dict: Any, **kwargs: Any) -> Any:
        """As diffusers', but from safetensors alone (a pickle can run code), never without our weights."""
        name = kwargs.get("weight_name")
        if name is not None and not name.endswith(".safetensors"):
            raise ValueError(f"weight_name must be a .safetensors file, got {name!r}")
        kwargs["use_safetensors"] = True
        loaded = super().lora_state_dict(pretrained_model_name_or_path_or_dict, **kwargs)
        keys = loaded[0] if kwargs.get("return_lora_metadata") else loaded
        if not any(key.startswith(f"{cls.transformer_name}.") for key in keys):
            raise ValueError(
                f"a LoRA must have keys under '{cls.transformer_name}.', got {sorted(keys)[:3]} ..."
            )
        return loaded
