"""Published checkpoints to diffusers' folders and back, and whole pipelines put together from their parts."""

import inspect
import os
from collections.abc import Callable, Mapping
from contextlib import AbstractContextManager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeAlias

import diffusers
import torch
from diffusers import AutoencoderKL, DPMSolverMultistepScheduler, SchedulerMixin
from transformers import AutoConfig, AutoModelForTextEncoding, AutoTokenizer

from localdit.files import staged_folder
from localdit.models.local_dit import LocalDiTTransformer2DModel
from localdit.models.local_dit_single_file import load_single_file
from localdit.models.single_file import SingleFileReport, read_state_dict
from localdit.pipelines.local_dit import LocalDiTPipeline

# What the published model works with. "madebyollin/sdxl-vae-fp16-fix" is this VAE tuned further, to run in
# float16. Its pictures differ a little, and the pipeline runs the original in float32: so the original it is.
VAE = "stabilityai/sdxl-vae"
TEXT_ENCODER = "google/flan-t5-xxl"

TOKENIZER_FILES = ("tokenizer.json", "tokenizer_config.json", "spiece.model")

Name: TypeAlias = str | os.PathLike[str]  # of a folder, or on the hub


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
    global_context: str = "auto",
    seed: int | None = None,
    dtype: torch.dtype | None = None,
    overwrite: bool = False,
    **config_overrides: Any,
) -> ConversionReport:
    """Turn a published checkpoint file into a diffusers folder of the transformer, or such a folder back.

    What `source` is decides which. The target appears whole or not at all.

    Args:
        source: A file that `LocalDiTTransformer2DModel.from_single_file` reads; or a folder of its
            `save_pretrained`, or of a pipeline, whose transformer is taken.
        target: A folder, if `source` is a file; else a `.safetensors` file.
        global_context: Of a file: "auto", "fold", "random" or "none", as in `from_single_file`.
        seed: Of a file, with "random".
        dtype: Of what is written. None keeps the source's.
        overwrite: Replace the target. A folder is replaced only if it holds a model or a pipeline.
        config_overrides: Of a file: config fields that its tensors do not tell, such as `window_size`.

    Raises:
        FileNotFoundError: `source` does not exist.
        ValueError: The target is there already, or holds the source; `source` is no whole LocalDiT, as
            `from_single_file` says; or an argument applies to a file and `source` is a folder.
    """
    source, target = Path(source), Path(target)
    if source.is_dir():
        if target.suffix != ".safetensors" or target.is_dir():
            raise ValueError(f"target must be a .safetensors file, as source is a folder, got {target}")
        if target.exists() and not overwrite:
            raise ValueError(f"target must not exist without overwrite=True, got {target}")
        model, report = _load_transformer(source, global_context, seed, dtype, config_overrides)
        model.save_single_file(target)
    else:
        with _writing(target, overwrite, sources=[source]) as folder:
            model, report = _load_transformer(source, global_context, seed, dtype, config_overrides)
            model.save_pretrained(folder)
    return ConversionReport(target, report.parameters, report.found, report.dropped, (report.chosen,))


def assemble_pipeline(
    target: str | os.PathLike[str],
    *,
    transformer: Name,
    vae: Name = VAE,
    text_encoder: Name = TEXT_ENCODER,
    tokenizer: Name | None = None,
    scheduler: Name | None = None,
    global_context: str = "auto",
    seed: int | None = None,
    dtype: torch.dtype | None = None,
    overwrite: bool = False,
    **config_overrides: Any,
) -> ConversionReport:
    """Write the folder of a whole `LocalDiTPipeline`. It appears whole or not at all.

    Args:
        target: The folder to write.
        overwrite: Replace the target, if it holds a model or a pipeline.

    The parts, and all else, are the arguments of `load_parts`, which documents them.

    Raises:
        FileNotFoundError: The file of the transformer does not exist.
        ValueError: The target may not be written; a part cannot be loaded; the parts do not fit each other.
    """
    target = Path(target)
    tokenizer = text_encoder if tokenizer is None else tokenizer
    names = {"vae": vae, "text_encoder": text_encoder, "tokenizer": tokenizer}
    names |= {} if scheduler is None else {"scheduler": scheduler}
    sources = [Path(name) for name in (transformer, *names.values())]
    with _writing(target, overwrite, sources) as folder:
        pipe, report = load_parts(
            transformer, **names, global_context=global_context, seed=seed, dtype=dtype, **config_overrides
        )
        pipe.save_pretrained(folder)
    said = {part: os.fspath(name) for part, name in ({"scheduler": "published"} | names).items()}
    chosen = (report.chosen, *(f"{part}: {name}" for part, name in said.items()))
    return ConversionReport(target, report.parameters, report.found, report.dropped, chosen)


def load_parts(
    transformer: Name,
    *,
    vae: Name = VAE,
    text_encoder: Name = TEXT_ENCODER,
    tokenizer: Name | None = None,
    scheduler: Name | None = None,
    global_context: str = "auto",
    seed: int | None = None,
    dtype: torch.dtype | None = None,
    **config_overrides: Any,
) -> tuple[LocalDiTPipeline, SingleFileReport]:
    """A pipeline of parts that lie in different places.

    A part is named by its folder; by the folder of a pipeline that has such a part; by a hub name,
    "owner/name"; or by a folder within one, "owner/name/folder". The transformer is named by a folder or one
    file. Weights are read from safetensors alone, that file aside, and no code that comes with them is run.

    Args:
        transformer: A folder, or a file that `LocalDiTTransformer2DModel.from_single_file` reads.
        vae: An `AutoencoderKL`. The default, SDXL's, is the published model's.
        text_encoder: A text encoder of transformers. The default, FLAN-T5-XXL, is the published model's.
        tokenizer: None for the text encoder's.
        scheduler: Any of diffusers' schedulers. None for the published one, `published_scheduler`.
        global_context: Of a transformer in one file, as in `convert`; likewise `seed` and `config_overrides`.
        seed: See `global_context`.
        dtype: Of all weights (T5 keeps in float32 what overflows otherwise). None keeps the transformer's and
            the text encoder's own, and makes the VAE float32.
        config_overrides: See `global_context`.

    Returns:
        The pipeline, on the CPU, and what was found in the transformer's source.

    Raises:
        FileNotFoundError: The file of the transformer does not exist.
        ValueError: A part cannot be loaded whole, or the parts do not fit each other.
    """
    model, report = _load_transformer(Path(transformer), global_context, seed, dtype, config_overrides)
    parts = {
        "transformer": model,
        "scheduler": published_scheduler() if scheduler is None else _load_scheduler(scheduler),
        "tokenizer": _load_tokenizer(text_encoder if tokenizer is None else tokenizer),
        "vae": _load("vae", vae, AutoencoderKL, torch_dtype=dtype),
    }
    # Before the text encoder is loaded, which may be ten times the rest.
    text_config = _read("text_encoder", text_encoder, AutoConfig.from_pretrained)
    _check_fit(model, parts["vae"], parts["tokenizer"], text_config)
    parts["text_encoder"] = _load(
        "text_encoder", text_encoder, AutoModelForTextEncoding, dtype=dtype or "auto"
    )
    return LocalDiTPipeline(**parts), report


def published_scheduler() -> DPMSolverMultistepScheduler:
    """PixArt-Sigma's schedule, which the published model was trained on, sampled with DPM-Solver++ 2M."""
    return DPMSolverMultistepScheduler(
        num_train_timesteps=1000,
        beta_start=0.0001,
        beta_end=0.02,
        beta_schedule="linear",
        prediction_type="epsilon",
        algorithm_type="dpmsolver++",
        solver_order=2,
    )


# --- Parts --------------------------------------------------------------------------------------------------


def _load_transformer(
    source: Path,
    global_context: str,
    seed: int | None,
    dtype: torch.dtype | None,
    config_overrides: Mapping[str, Any],
) -> tuple[LocalDiTTransformer2DModel, SingleFileReport]:
    model_class = LocalDiTTransformer2DModel
    if not source.is_dir():
        return load_single_file(
            model_class, source, global_context=global_context, seed=seed, dtype=dtype, **config_overrides
        )
    if global_context != "auto" or seed is not None or config_overrides:
        raise ValueError(
            f"global_context, seed and config overrides must be left out for {source}, which has a config, "
            f"got {global_context!r}, {seed!r} and {dict(config_overrides)!r}"
        )
    folder = Path(*_place("transformer", source))
    if not (folder / "config.json").is_file():
        raise ValueError(f"source must be the folder of a model, but {folder} has no config.json")
    class_name = model_class.load_config(folder).get("_class_name")
    if class_name != model_class.__name__:
        raise ValueError(f"source must hold a {model_class.__name__}, but {folder} holds a {class_name}")
    weights = sorted(folder.glob("*.safetensors"))
    if not weights:
        raise ValueError(f"source must hold weights as .safetensors, but {folder} has none")
    if dtype is None:  # where diffusers would make it float32
        dtype = next(iter(read_state_dict(weights[0]).values())).dtype
    model = _load("transformer", folder, model_class, torch_dtype=dtype)
    heads = f"{model.config.num_attention_heads} heads of {model.config.attention_head_dim}"
    branch = "with" if model.config.global_context else "no"
    report = SingleFileReport(
        parameters=model.num_parameters(),
        found=f"a folder: {model.config.num_layers} blocks, {heads}, {branch} global context",
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
    class_name = config.get("_class_name")
    scheduler: Any = getattr(diffusers, class_name, None) if isinstance(class_name, str) else None
    if not (inspect.isclass(scheduler) and issubclass(scheduler, SchedulerMixin)):
        raise ValueError(f"scheduler must be one of diffusers', but {name} says {class_name!r}")
    return scheduler.from_config(config)  # type: ignore[attr-defined]


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


def _check_fit(
    transformer: LocalDiTTransformer2DModel, vae: AutoencoderKL, tokenizer: Any, text: Any
) -> None:
    """text: the config of the text encoder."""
    wanted = transformer.config
    if vae.config.latent_channels != wanted.in_channels:
        raise ValueError(
            f"vae must have the transformer's {wanted.in_channels} channels, got {vae.config.latent_channels}"
        )
    if getattr(text, "hidden_size", None) != wanted.caption_channels:
        raise ValueError(
            f"text_encoder must be as wide as the transformer's caption_channels, {wanted.caption_channels}, "
            f"got {getattr(text, 'hidden_size', None)}"
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
