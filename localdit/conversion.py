"""Published checkpoints to diffusers' folders and back, and whole pipelines put together from their parts."""

import inspect
import os
from collections.abc import Callable, Mapping
from contextlib import AbstractContextManager
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, TypeAlias

import diffusers
import torch
from diffusers import AutoencoderKL, DDPMScheduler, DPMSolverMultistepScheduler, SchedulerMixin
from transformers import AutoConfig, AutoTokenizer

from localdit.files import staged_folder
from localdit.models import (
    ledit_single_file,
    local_dit_single_file,
    pixeldit_single_file,
    sparse_dit_single_file,
)
from localdit.models.ledit import LEDiTTransformer2DModel
from localdit.models.local_dit import LocalDiTTransformer2DModel
from localdit.models.open_clip_text import load_open_clip_text
from localdit.models.pixeldit import PixelDiTTransformer2DModel
from localdit.models.pixeldit_text import PixelDiTTextTransformer2DModel
from localdit.models.single_file import SingleFileReport, config_fields, read_state_dict
from localdit.models.sparse_dit import SparseDiTTransformer2DModel
from localdit.pipelines import pixeldit_text
from localdit.pipelines.common import text_encoder_class
from localdit.pipelines.ledit import LEDiTPipeline
from localdit.pipelines.local_dit import LocalDiTPipeline
from localdit.pipelines.pixeldit import PixelDiTPipeline
from localdit.pipelines.pixeldit_text import PixelDiTTextPipeline
from localdit.pipelines.sparse_dit import SparseDiTPipeline
from localdit.schedulers.edm_heun import EDMHeunScheduler
from localdit.schedulers.flow_adams_bashforth import FlowAdamsBashforthScheduler

# What the published LocalDiT works with. "madebyollin/sdxl-vae-fp16-fix" is this VAE tuned further, to run in
# float16. Its pictures differ a little, and the pipeline runs the original in float32: so the original it is.
VAE = "stabilityai/sdxl-vae"
TEXT_ENCODER = "google/flan-t5-xxl"

TOKENIZER_FILES = ("tokenizer.json", "tokenizer_config.json", "spiece.model")
OUR_SCHEDULERS: dict[str, Any] = {
    cls.__name__: cls for cls in (EDMHeunScheduler, FlowAdamsBashforthScheduler)
}

Name: TypeAlias = str | os.PathLike[str]  # of a folder, or on the hub


# --- Architectures ------------------------------------------------------------------------------------------


def published_scheduler() -> DPMSolverMultistepScheduler:
    """PixArt-Sigma's schedule, which LocalDiT was trained on, sampled with DPM-Solver++ 2M."""
    return DPMSolverMultistepScheduler(
        num_train_timesteps=1000,
        beta_start=0.0001,
        beta_end=0.02,
        beta_schedule="linear",
        prediction_type="epsilon",
        algorithm_type="dpmsolver++",
        solver_order=2,
    )


def _dit_scheduler(config: Any) -> DDPMScheduler:
    """DiT's DDPM, which LEDiT's figures were made with, and with the transformer's variance if it has one."""
    learned = config.out_channels == 2 * config.in_channels
    return DDPMScheduler(
        beta_schedule="linear",
        beta_start=0.0001,
        beta_end=0.02,
        variance_type="learned_range" if learned else "fixed_small",
        timestep_spacing="linspace",
        clip_sample=False,
    )


@dataclass(frozen=True)
class Architecture:
    """What a conversion has to know of one architecture."""

    model: Any  # class of the transformer
    pipeline: Any
    load_single_file: Callable[..., tuple[Any, SingleFileReport]]
    scheduler: Callable[[Any], SchedulerMixin]  # the published one, for a transformer's config
    parts: Mapping[str, Name] = field(default_factory=dict)  # what else a pipeline holds, as published
    choices: tuple[str, ...] = ()  # arguments of `load_single_file` besides the dtype and config fields


ARCHITECTURES = {
    "local_dit": Architecture(
        LocalDiTTransformer2DModel,
        LocalDiTPipeline,
        local_dit_single_file.load_single_file,
        lambda config: published_scheduler(),
        {"vae": VAE, "text_encoder": TEXT_ENCODER},
        ("global_context", "seed"),
    ),
    "sparse_dit": Architecture(
        SparseDiTTransformer2DModel,
        SparseDiTPipeline,
        sparse_dit_single_file.load_single_file,
        lambda config: EDMHeunScheduler(sigma_data=0.9),
        # Of the models with 4 channels; "ostris/vae-kl-f8-d16" is that of those with 16.
        {
            "vae": "stabilityai/stable-diffusion-xl-base-1.0/vae",
            "text_encoder": "apple/DFN5B-CLIP-ViT-H-14-378",
        },
    ),
    "ledit": Architecture(
        LEDiTTransformer2DModel,
        LEDiTPipeline,
        ledit_single_file.load_single_file,
        _dit_scheduler,
        {"vae": "stabilityai/sd-vae-ft-ema"},
    ),
    "pixeldit": Architecture(
        PixelDiTTransformer2DModel,
        PixelDiTPipeline,
        pixeldit_single_file.load_single_file,
        lambda config: FlowAdamsBashforthScheduler(shift=1.0 if config.sample_size < 512 else 2.0),
    ),
    "pixeldit_text": Architecture(
        PixelDiTTextTransformer2DModel,
        PixelDiTTextPipeline,
        pixeldit_single_file.load_single_file,
        lambda config: pixeldit_text.published_scheduler(3.0 if config.sample_size < 1024 else 4.0),
        {"text_encoder": "Efficient-Large-Model/gemma-2-2b-it"},
    ),
}


@dataclass(frozen=True)
class ConversionReport:
    """What a conversion came to.

    Attributes:
        target: The file or folder that was written.
        parameters: Of the transformer.
        found: What the source holds, as a phrase.
        dropped: Names of tensors that were left aside, by reason.
        chosen: What was decided where the source leaves it open, a sentence each.
    """

    target: Path
    parameters: int
    found: str
    dropped: Mapping[str, tuple[str, ...]]
    chosen: tuple[str, ...]


def convert(
    source: str | os.PathLike[str],
    target: str | os.PathLike[str],
    *,
    architecture: str | None = None,
    dtype: torch.dtype | None = None,
    overwrite: bool = False,
    **choices: Any,
) -> ConversionReport:
    """Turn a published checkpoint file into a diffusers folder of the transformer, or such a folder back.

    What `source` is decides which. The target appears whole or not at all.

    Args:
        source: A file that `from_single_file` of the architecture's model reads; or a folder of its
            `save_pretrained`, or of a pipeline, whose transformer is taken.
        target: A folder, if `source` is a file; else a `.safetensors` file.
        architecture: One of `ARCHITECTURES`. None: what the folder's config says; of a file, "local_dit".
        dtype: Of what is written. None keeps the source's.
        overwrite: Replace the target. A folder is replaced only if it holds a model or a pipeline.
        choices: Of a file: what else `from_single_file` of the model takes. That is config fields that its
            tensors do not tell, such as `sample_size`; and `global_context` and `seed` of a LocalDiT.

    Raises:
        FileNotFoundError: `source` does not exist.
        ValueError: The target is there already, or holds the source; `source` is no whole model of the
            architecture, as `from_single_file` says; an argument is none of the architecture's, or applies to
            a file and `source` is a folder.
    """
    source, target = Path(source), Path(target)
    if source.is_dir():
        if target.suffix != ".safetensors" or target.is_dir():
            raise ValueError(f"target must be a .safetensors file, as source is a folder, got {target}")
        if target.exists() and not overwrite:
            raise ValueError(f"target must not exist without overwrite=True, got {target}")
        model, report = _load_transformer(source, find_architecture(source, architecture), dtype, choices)
        model.save_single_file(target)
    else:
        with _writing(target, overwrite, sources=[source]) as folder:
            model, report = _load_transformer(source, find_architecture(source, architecture), dtype, choices)
            model.save_pretrained(folder)
    return ConversionReport(target, report.parameters, report.found, report.dropped, (report.chosen,))


def assemble_pipeline(
    target: str | os.PathLike[str],
    *,
    transformer: Name,
    architecture: str | None = None,
    vae: Name | None = None,
    text_encoder: Name | None = None,
    tokenizer: Name | None = None,
    scheduler: Name | None = None,
    dtype: torch.dtype | None = None,
    overwrite: bool = False,
    **choices: Any,
) -> ConversionReport:
    """Write the folder of a whole pipeline. It appears whole or not at all.

    Args:
        target: The folder to write.
        overwrite: Replace the target, if it holds a model or a pipeline.

    The parts, and all else, are the arguments of `load_parts`, which documents them.

    Raises:
        FileNotFoundError: The file of the transformer does not exist.
        ValueError: The target may not be written; a part cannot be loaded; the parts do not fit each other.
    """
    target, given = Path(target), {"vae": vae, "text_encoder": text_encoder, "tokenizer": tokenizer}
    names = _part_names(find_architecture(Path(transformer), architecture), given)
    names |= {} if scheduler is None else {"scheduler": scheduler}
    sources = [Path(name) for name in (transformer, *names.values())]
    with _writing(target, overwrite, sources) as folder:
        pipe, report = load_parts(transformer, architecture=architecture, **names, dtype=dtype, **choices)
        pipe.save_pretrained(folder)
    said = {part: os.fspath(name) for part, name in ({"scheduler": "published"} | names).items()}
    chosen = (report.chosen, *(f"{part}: {name}" for part, name in said.items()))
    return ConversionReport(target, report.parameters, report.found, report.dropped, chosen)


def load_parts(
    transformer: Name,
    *,
    architecture: str | None = None,
    vae: Name | None = None,
    text_encoder: Name | None = None,
    tokenizer: Name | None = None,
    scheduler: Name | None = None,
    dtype: torch.dtype | None = None,
    **choices: Any,
) -> tuple[Any, SingleFileReport]:
    """A pipeline of parts that lie in different places.

    A part is named by its folder; by the folder of a pipeline that has such a part; by a hub name,
    "owner/name"; or by a folder within one, "owner/name/folder". The transformer is named by a folder or one
    file. Weights are read from safetensors alone, that file aside, and no code that comes with them is run.
    A part that is None is the published one, as `ARCHITECTURES` has it.

    Args:
        transformer: A folder, or a file that `from_single_file` of the architecture's model reads.
        architecture: As in `convert`.
        vae: An `AutoencoderKL`, of a pipeline that has one.
        text_encoder: A text encoder of transformers, of a pipeline that has one; or a `.safetensors` file of
            an open_clip, whose text tower is taken (`load_open_clip_text`).
        tokenizer: None for the text encoder's; for that of the published text encoder if it is one file.
        scheduler: Any of diffusers' schedulers, or of ours. None for the published one.
        dtype: Of all weights (T5 keeps in float32 what overflows otherwise). None keeps the transformer's and
            the text encoder's own, and makes the VAE float32.
        choices: Of a transformer in one file, as in `convert`.

    Returns:
        The pipeline, on the CPU, and what was found in the transformer's source, and in a text encoder's
        file.

    Raises:
        FileNotFoundError: The file of the transformer does not exist.
        ValueError: A part cannot be loaded whole, or the parts do not fit each other, or the pipeline has
            no such part.
    """
    name = find_architecture(Path(transformer), architecture)
    given = {"vae": vae, "text_encoder": text_encoder, "tokenizer": tokenizer}
    names, kind = _part_names(name, given), ARCHITECTURES[name]
    model, report = _load_transformer(Path(transformer), name, dtype, choices)
    parts = {
        "transformer": model,
        "scheduler": kind.scheduler(model.config) if scheduler is None else _load_scheduler(scheduler),
    }
    if "vae" in names:
        parts["vae"] = _load("vae", names["vae"], AutoencoderKL, torch_dtype=dtype)
        _check_channels(model, parts["vae"])
    if "text_encoder" in names:
        place, parts["tokenizer"] = names["text_encoder"], _load_tokenizer(names["tokenizer"])
        if _is_file(place):
            parts["text_encoder"], text_report = load_open_clip_text(place, dtype=dtype)
            _check_text(model, parts["tokenizer"], parts["text_encoder"].config)
            chosen = f"{report.chosen}; the text encoder is {text_report.chosen}, of {text_report.found}"
            report = replace(report, dropped={**report.dropped, **text_report.dropped}, chosen=chosen)
        else:
            # Before the text encoder is loaded, which may be ten times the rest.
            config = _read("text_encoder", place, AutoConfig.from_pretrained)
            _check_text(model, parts["tokenizer"], getattr(config, "text_config", config))
            text_class = text_encoder_class(config)
            parts["text_encoder"] = _load("text_encoder", place, text_class, dtype=dtype or "auto")
    return kind.pipeline(**parts), report


def find_architecture(source: Path, name: str | None) -> str:
    """The name of the architecture of a transformer's folder or file, where it is not given.

    Raises:
        ValueError: There is none of that name, or the folder holds none, or another than `name`.
    """
    if name is not None and name not in ARCHITECTURES:
        raise ValueError(f"architecture must be one of {', '.join(ARCHITECTURES)}, got {name!r}")
    if not source.is_dir():
        return name or "local_dit"
    folder = Path(*_place("transformer", source))
    if not (folder / "config.json").is_file():
        raise ValueError(f"source must be the folder of a model, but {folder} has no config.json")
    class_name = str(LocalDiTTransformer2DModel.load_config(folder).get("_class_name"))
    known = {kind.model.__name__: each for each, kind in ARCHITECTURES.items() if name in (None, each)}
    if class_name not in known:
        raise ValueError(f"source must hold a {' or a '.join(known)}, but {folder} holds a {class_name}")
    return known[class_name]


def find_scheduler(class_name: Any) -> Any:
    """The scheduler's class of that name, of diffusers or ours; None where there is none."""
    if not isinstance(class_name, str):
        return None
    found = OUR_SCHEDULERS.get(class_name) or getattr(diffusers, class_name, None)
    return found if inspect.isclass(found) and issubclass(found, SchedulerMixin) else None


# --- Parts --------------------------------------------------------------------------------------------------


def _part_names(architecture: str, given: Mapping[str, Name | None]) -> dict[str, Name]:
    """Where each part of a pipeline lies: as given, else as published.

    Raises:
        ValueError: A part is given that such a pipeline has not.
    """
    names = dict(ARCHITECTURES[architecture].parts)
    if "text_encoder" in names:
        own = given["text_encoder"]
        names["tokenizer"] = names["text_encoder"] if own is None or _is_file(own) else own
    chosen = {part: name for part, name in given.items() if name is not None}
    if strange := chosen.keys() - names.keys():
        raise ValueError(f"{min(strange)} must be left out for {architecture}, whose pipeline has none")
    return names | chosen


def _is_file(name: Name) -> bool:
    return os.fspath(name).endswith(".safetensors")


def _load_transformer(
    source: Path, architecture: str, dtype: torch.dtype | None, choices: Mapping[str, Any]
) -> tuple[Any, SingleFileReport]:
    kind = ARCHITECTURES[architecture]
    if strange := sorted(choices.keys() - {*kind.choices, *config_fields(kind.model)}):
        raise ValueError(
            f"{', '.join(strange)} must be left out for {architecture}: its choices are "
            f"{', '.join(sorted({*kind.choices, *config_fields(kind.model)}))}"
        )
    if not source.is_dir():
        return kind.load_single_file(kind.model, source, dtype=dtype, **choices)
    if choices:
        raise ValueError(f"{', '.join(choices)} must be left out for {source}, which has a config")
    folder = Path(*_place("transformer", source))
    weights = sorted(folder.glob("*.safetensors"))
    if not weights:
        raise ValueError(f"source must hold weights as .safetensors, but {folder} has none")
    if dtype is None:  # where diffusers would make it float32
        dtype = next(iter(read_state_dict(weights[0]).values())).dtype
    model = _load("transformer", folder, kind.model, torch_dtype=dtype)
    report = SingleFileReport(
        parameters=model.num_parameters(),
        found=f"a folder of a {kind.model.__name__}",
        dropped={},
        chosen="the transformer is the folder's, unchanged",
    )
    return model, report


def _load_tokenizer(name: Name) -> Any:
    folder = Path(*_place("tokenizer", name))
    # transformers makes up a vocabulary where a folder has none.
    if folder.is_dir() and not any((folder / file).is_file() for file in TOKENIZER_FILES):
        raise ValueError(f"tokenizer must be a folder with one of {TOKENIZER_FILES}, got {folder}")
    return _read("tokenizer", name, AutoTokenizer.from_pretrained)


def _load_scheduler(name: Name) -> SchedulerMixin:
    config = _read("scheduler", name, DPMSolverMultistepScheduler.load_config)
    scheduler = find_scheduler(config.get("_class_name"))
    if scheduler is None:
        raise ValueError(
            f"scheduler must be one of diffusers' or ours, but {name} says {config.get('_class_name')!r}"
        )
    return scheduler.from_config(config)


def _load(part: str, name: Name, model_class: Any, **kwargs: Any) -> Any:
    """A part with weights, all of them its own: diffusers and transformers make up those that are missing."""
    model, info = _read(
        part, name, model_class.from_pretrained, use_safetensors=True, output_loading_info=True, **kwargs
    )
    if gaps := {kind: sorted(info[kind]) for kind in ("missing_keys", "mismatched_keys") if info[kind]}:
        raise ValueError(f"{part} must be whole, but {name} has {gaps}")
    return model


def _read(part: str, name: Name, read: Callable[..., Any], **kwargs: Any) -> Any:
    """What `read` makes of the place that a name stands for; what it raises says which part it is about."""
    place, subfolder = _place(part, name)
    try:
        return read(place, subfolder=subfolder, **kwargs)
    except (OSError, ValueError) as error:
        raise ValueError(f"{part} could not be loaded from {name}: {error}") from error


def _place(part: str, name: Name) -> tuple[str, str]:
    """The folder, or hub name, that a name stands for, and the folder within it."""
    name = os.fspath(name)
    if os.path.isdir(name):
        return name, part if os.path.isfile(os.path.join(name, "model_index.json")) else ""
    pieces = name.split("/")
    if len(pieces) < 2 or not all(piece.strip(".") for piece in pieces):
        raise ValueError(f"{part} must be a folder that exists or a hub name such as owner/name, got {name}")
    return "/".join(pieces[:2]), "/".join(pieces[2:])


def _check_channels(transformer: Any, vae: AutoencoderKL) -> None:
    if vae.config.latent_channels != transformer.config.in_channels:
        raise ValueError(
            f"vae must have the transformer's {transformer.config.in_channels} channels, "
            f"got {vae.config.latent_channels}"
        )


def _check_text(transformer: Any, tokenizer: Any, text: Any) -> None:
    """text: the config of the text encoder."""
    width = getattr(text, "hidden_size", None)
    if width != transformer.config.caption_channels:
        raise ValueError(
            "text_encoder must be as wide as the transformer's caption_channels, "
            f"{transformer.config.caption_channels}, got {width}"
        )
    if len(tokenizer) > text.vocab_size:
        raise ValueError(
            f"tokenizer must have at most the text encoder's {text.vocab_size} tokens, got {len(tokenizer)}"
        )


# --- Writing ------------------------------------------------------------------------------------------------


def _writing(target: Path, overwrite: bool, sources: list[Path]) -> AbstractContextManager[Path]:
    """`staged_folder`, once it is found that `target` may be written.

    Raises:
        ValueError: `target` is a file; or it holds something, and `overwrite` does not allow it, or it is no
            model, or one of the sources is in it.
    """
    if target.exists() and not target.is_dir():
        raise ValueError(f"target must be a folder, got the file {target}")
    replace = target.exists()
    if not replace or not any(target.iterdir()):
        return staged_folder(target, replace)
    if not overwrite:
        raise ValueError(f"target must be empty or new without overwrite=True, got {target}")
    if not any((target / name).is_file() for name in ("config.json", "model_index.json")):
        raise ValueError(f"target must hold a model or a pipeline to be overwritten, got {target}")
    for source in sources:
        if source.exists() and source.resolve().is_relative_to(target.resolve()):
            raise ValueError(f"target must not hold what it is made from, got {target} and {source}")
    return staged_folder(target, replace)
