"""What all objectives of diffusion models share: samples with their conditions, previews, validation, export.

A clean sample is a latent, or a picture where the pipeline has no autoencoder. It is conditioned on the
features that the pipeline's own `encode_prompt` makes of its caption, so that training and sampling cannot
disagree, or, where the pipeline knows no prompts, on its caption's label. Latents and features are encoded
ahead of training into a cache (`localdit.training.encode`), or as training goes.

An objective adds the noise: it says which levels of noise there are, and how wrong a model is at one.
"""

import gc
import inspect
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator
from diffusers import AutoencoderKL
from diffusers.models.autoencoders.vae import DiagonalGaussianDistribution
from diffusers.utils import make_image_grid
from PIL import Image
from torch import Tensor, nn

from localdit.data.cache import open_cache
from localdit.data.pixels import Pixels
from localdit.data.samples import Samples, split
from localdit.data.sources import Scenes, Source
from localdit.pipelines import find_pipeline
from localdit.training.classes import find_class
from localdit.training.encode import (
    EncodeConfig,
    encode,
    identities,
    load_text_parts,
    load_vae,
    no_text,
    open_config_source,
    text_features,
)
from localdit.training.layout import LayoutHead, WithLayouts
from localdit.training.order import Draws
from localdit.training.stopping import StopRequest

# B batch   C channels and H W sides of a sample   T text tokens   K channels of the text features

_VALIDATION_SEED = 1


@dataclass
class Diffusion:
    """The fields and methods that every objective has; one is a subclass with the methods that raise
    `NotImplementedError` here."""

    # The pictures, the pipeline, the encoders and the cache; see `localdit.training.encode.EncodeConfig`.
    data: EncodeConfig = field(metadata={"nested": EncodeConfig})
    scheduler: dict[str, Any]  # what the finished pipeline samples with
    on_the_fly: bool = False  # encode each batch anew, without a cache
    caption_dropout: float = 0.1  # share of captions replaced by none
    layout_weight: float = 0.0  # of the side task in `localdit.training.layout`, for scenes
    layout_block: int = 3  # the block that the side task reads
    validation_samples: int = 0  # kept out of training and measured every train.validate_every steps
    preview_prompts: tuple[str, ...] = ()  # or names of classes; none: the first two captions of the source
    preview_guidance_scale: float = 4.0
    preview_steps: int = 20
    # What the finished pipeline draws with unless told otherwise, if it has such a default; None: its own.
    default_guidance_scale: float | None = None
    export_encoders: bool = True  # write the frozen parts into the finished pipeline too

    # --- What an objective says --------------------------------------------------------------------------

    def use_scheduler(self, scheduler: Any) -> None:
        """Take from the scheduler what training has to agree with.

        Raises:
            ValueError: The objective is not for such a scheduler.
        """
        raise NotImplementedError

    def levels(self, draws: Draws) -> Tensor:
        """Random levels of noise, (B,), in the objective's own unit."""
        raise NotImplementedError

    def validation_levels(self) -> dict[str, float]:
        """Levels that validation measures, by names for the log."""
        raise NotImplementedError

    def errors(
        self,
        model: nn.Module,
        clean: Tensor,
        noise: Tensor,
        level: Tensor,
        draws: Draws,
        **condition: Tensor,
    ) -> Tensor:
        """How wrong the model is about each sample: (B,), float32.

        Args:
            model: The transformer. What is for training alone depends on `model.training`.
            clean: Samples without noise, (B, C, H, W).
            noise: Standard normal, of the same shape.
            level: How much of it, (B,), as of `levels`.
            draws: For whatever else is random.
            condition: Arguments of the transformer: `encoder_hidden_states` (B, T, K), with an
                `encoder_attention_mask` where the pipeline has one; or `class_labels` (B,).
        """
        raise NotImplementedError

    def weights(self, level: Tensor) -> Tensor:
        """What an error at these levels, (B,), counts in training: 1."""
        return torch.ones_like(level, dtype=torch.float32)

    # --- Data --------------------------------------------------------------------------------------------

    def prepare(self, model: Any, folder: Path, accelerator: Accelerator, stop: StopRequest) -> Samples:
        """Load the frozen parts and the training set, which is encoded first where it is not yet."""
        scheduler = find_class("objective.scheduler._class_name", self.scheduler.get("_class_name", ""))
        self.parts: dict[str, Any] = {"scheduler": scheduler.from_config(self.scheduler)}
        self.use_scheduler(self.parts["scheduler"])
        self.pipeline_class = find_pipeline(self.data.pipeline)
        takes = inspect.signature(self.pipeline_class).parameters
        self._check_parts(takes, model)

        samples: Samples
        with accelerator.main_process_first():
            source = open_config_source(self.data, progress=accelerator.is_main_process)
        if self.on_the_fly:
            data = self.data
            samples = Pixels(source, data.resolution, data.flips, data.seed, data.square)
        else:
            encode(self.data, accelerator, stop)
            expected = {part: encoder["sha256"] for part, encoder in identities(self.data).items()}
            samples = open_cache(self.data.cache, expected=expected, seed=self.data.seed)
        if self.layout_weight:
            samples = self._add_layouts(model, samples, source)

        if "vae" in takes:
            self.parts["vae"] = load_vae(self.data).to(accelerator.device)
        if "text_encoder" in takes:
            self.parts |= load_text_parts(self.data, accelerator.device)
        if self.default_guidance_scale is not None:
            if "default_guidance_scale" not in takes:
                raise ValueError(
                    f"objective.default_guidance_scale must be left out for {self.data.pipeline}, "
                    f"got {self.default_guidance_scale}"
                )
            self.parts["default_guidance_scale"] = self.default_guidance_scale
        if "id2label" in takes:
            self.parts["id2label"] = classes_of(source, model.config.num_classes)
        self.pipeline = self.assemble(None)
        self._prepare_conditions(source)
        if "text_encoder" in takes and not self.on_the_fly:
            # It may be larger than all else, and its work is done.
            self.pipeline.text_encoder = self.parts["text_encoder"] = None
            gc.collect()
            if accelerator.device.type == "cuda":
                torch.cuda.empty_cache()
        rest, self.kept_apart = split(samples, self.validation_samples)
        return rest

    def clean(self, sample: dict[str, Any], draws: Draws | None) -> Tensor:
        """Samples without noise, (B, C, H, W). Of what the autoencoder gives one is drawn, or the mean taken
        without `draws`."""
        moments = sample.get("moments")
        if moments is None:
            images = sample["pixels"] / 127.5 - 1
            if "vae" not in self.parts:
                return images
            vae = self.parts["vae"]
            with torch.no_grad():
                moments = vae.encode(images.to(vae.dtype)).latent_dist.parameters.float()
        posterior = DiagonalGaussianDistribution(moments)
        if draws is None:
            return scale_latents(posterior.mean, self.parts["vae"])
        noise = draws.normal(*posterior.mean.shape[1:])
        return scale_latents(posterior.mean + posterior.std * noise, self.parts["vae"])

    def condition(self, sample: dict[str, Any], dropped: Tensor) -> dict[str, Tensor]:
        """What the transformer is told of samples, but of those that are dropped, (B,) bool."""
        if "id2label" in self.parts:
            labels = torch.tensor([self.label_of[name] for name in sample["caption"]], device=dropped.device)
            return self.without_caption({"class_labels": labels}, dropped)
        text, mask = (
            (sample["text"], sample["text_mask"])
            if "text" in sample
            else self._encode_text(sample["caption"])
        )
        told = {"encoder_hidden_states": text}
        if self.masks_text:
            told["encoder_attention_mask"] = mask
        return self.without_caption(told, dropped)

    def without_caption(
        self, condition: dict[str, Tensor], dropped: Tensor | slice = slice(None)
    ) -> dict[str, Tensor]:
        """What `condition` gives, with no caption in the rows that are `dropped`: all, unless given."""
        told = {name: tensor.clone() for name, tensor in condition.items()}
        if "class_labels" in told:
            told["class_labels"][dropped] = self.no_label
            return told
        text = told["encoder_hidden_states"]
        length = self.empty_text.shape[1]  # that of no caption, which is the shortest
        text[dropped, :length] = self.empty_text.to(text)
        if self.masks_text:
            mask = told["encoder_attention_mask"]
            mask[dropped] = torch.arange(mask.shape[1], device=mask.device) < length
        return told

    # --- Training ----------------------------------------------------------------------------------------

    def loss(
        self,
        model: nn.Module,
        draws: Draws,
        *,
        labels: Tensor | None = None,
        places: Tensor | None = None,
        **sample: Any,
    ) -> Tensor:
        """The weighted mean of the errors at random levels of noise, plus the side task's loss.

        Args:
            model: The transformer.
            draws: Noise, its levels and which captions are dropped.
            labels, places: What `layout_of` gives, batched, where there is a side task.
            sample: What a `Cache` or `Pixels` gives, batched.

        Returns a scalar, float32.
        """
        clean = self.clean(sample, draws)
        condition = self.condition(sample, draws.uniform() < self.caption_dropout)
        level, noise = self.levels(draws), draws.normal(*clean.shape[1:])
        errors = self.errors(model, clean, noise, level, draws, **condition)
        loss = (errors * self.weights(level)).mean()
        if labels is None or places is None:
            return loss
        return loss + self.layout_weight * self.layout_head.loss(labels, places)

    @torch.no_grad()
    def validate(self, model: Any, accelerator: Accelerator, stop: StopRequest) -> dict[str, float]:
        """The errors at some levels of noise, on samples kept out of training, and their mean.

        A sample's noise is the same each time, so that curves can be compared.
        """
        names, values = zip(*self.validation_levels().items())
        level, count = torch.tensor(values, device=accelerator.device), len(values)
        sums = torch.zeros(count + 1, device=accelerator.device)  # the errors of each level, and the samples
        for number in range(accelerator.process_index, len(self.kept_apart), accelerator.num_processes):
            if stop:
                break
            sample = self.kept_apart[number, number]
            same = self.kept_apart.collate([dict(sample) for _ in values])
            same = {k: v.to(accelerator.device) if isinstance(v, Tensor) else v for k, v in same.items()}
            clean = self.clean(same, None)
            condition = self.condition(same, torch.zeros_like(level, dtype=torch.bool))
            draws = Draws(_VALIDATION_SEED, range(count * number, count * (number + 1)), accelerator.device)
            noise = draws.normal(*clean.shape[1:])
            sums[:count] += self.errors(model, clean, noise, level, draws, **condition)
            sums[count] += 1
        sums = accelerator.reduce(sums, "sum")
        if stop or not sums[count]:
            return {}
        means = (sums[:count] / sums[count]).tolist()
        losses = {f"validation_loss/{name}": mean for name, mean in zip(names, means)}
        return {"validation_loss": sum(means) / count, **losses}

    def layout_blocks(self, model: Any) -> tuple[nn.ModuleList, int]:
        """The blocks that `layout_block` counts, which have to see all tokens, and their width."""
        return model.transformer_blocks, model.config.num_attention_heads * model.config.attention_head_dim

    def report(self, model: Any) -> dict[str, float]:
        """What else the log should say of the steps since the last report."""
        return {}

    # --- Results -----------------------------------------------------------------------------------------

    def assemble(self, model: Any, **parts: Any) -> Any:
        """The pipeline around a transformer, with other parts where they are given."""
        return self.pipeline_class(**{**self.parts, "transformer": model, **parts})

    def preview(self, model: Any, stop: StopRequest) -> Image.Image | None:
        """Fixed prompts or classes and seeds, as one picture: a row of four for each."""
        pipeline = self.assemble(model)

        def ask(pipe: Any, index: int, timestep: Any, tensors: dict[str, Any]) -> dict[str, Any]:
            pipe._interrupt = bool(stop)
            return tensors

        pipeline.set_progress_bar_config(disable=True)
        rows = len(self.preview_texts)
        (images,) = pipeline(
            **self.preview_condition,
            num_inference_steps=self.preview_steps,
            guidance_scale=self.preview_guidance_scale,
            generator=[torch.Generator().manual_seed(seed) for _ in range(rows) for seed in range(4)],
            callback_on_step_end=ask,
            return_dict=False,
        )
        return None if stop else make_image_grid(images, rows=rows, cols=4)

    def export(self, model: Any, folder: Path) -> None:
        """Write the finished pipeline; of a trained LoRA, the LoRA alone, with its rank and alpha."""
        if getattr(model, "peft_config", None):
            from peft.utils import get_peft_model_state_dict

            self.pipeline_class.save_lora_weights(
                folder,
                transformer_lora_layers=get_peft_model_state_dict(model),
                transformer_lora_adapter_metadata=model.peft_config["default"].to_dict(),
            )
            return
        frozen: dict[str, Any] = {
            name: None for name in ("vae", "text_encoder", "tokenizer") if name in self.parts
        }
        if self.export_encoders:
            frozen = load_text_parts(self.data, torch.device("cpu")) if "text_encoder" in self.parts else {}
        self.assemble(model, **frozen).save_pretrained(folder)

    # --- Details -----------------------------------------------------------------------------------------

    def _check_parts(self, takes: Any, model: Any) -> None:
        """Raise ValueError unless model and encoders are such as the pipeline takes."""
        if ("class_labels" in inspect.signature(model.forward).parameters) != ("id2label" in takes):
            kind = "texts" if "id2label" in takes else "classes"
            raise ValueError(
                f"objective.data.pipeline must be one of {kind} for {type(model).__name__}, "
                f"got {self.data.pipeline}"
            )
        for name in ("vae", "text_encoder"):
            given = getattr(self.data, name)
            if (given is not None) != (name in takes):
                rule = "must be given for" if name in takes else "must be left out for"
                raise ValueError(f"objective.data.{name} {rule} {self.data.pipeline}, got {given!r}")
        if "vae" not in takes and not self.on_the_fly:
            raise ValueError(f"objective.on_the_fly must be true for {self.data.pipeline}, which has no vae")

    def _prepare_conditions(self, source: Source) -> None:
        """What stands for no caption, and what previews are conditioned on."""
        texts = (
            list(self.preview_prompts)
            or list(dict.fromkeys(source.record(i).captions[0] for i in range(min(len(source), 100))))[:2]
        )
        self.preview_texts = texts
        if "id2label" in self.parts:
            names = self.parts["id2label"]
            self.label_of, self.no_label = {name: label for label, name in names.items()}, len(names)
            if unknown := [text for text in texts if text not in self.label_of]:
                raise ValueError(f"objective.preview_prompts must be names of classes, got {unknown}")
            self.preview_condition: dict[str, Any] = {
                "class_labels": [text for text in texts for _ in range(4)]
            }
            return
        arguments = text_arguments(self.pipeline_class)
        self.masks_text = "prompt_attention_mask" in arguments
        self.empty_text = self._cut(*no_text(self.pipeline, self.data.max_sequence_length))[0]
        encoded = self.pipeline.encode_prompt(
            texts, num_images_per_prompt=4, max_sequence_length=self.data.max_sequence_length
        )
        self.preview_condition = dict(zip(arguments, encoded))

    @torch.no_grad()
    def _encode_text(self, texts: list[str]) -> tuple[Tensor, Tensor]:
        """Features (B, T, K) of texts, cut to the longest, and which are kept (B, T)."""
        return self._cut(*text_features(self.pipeline, texts, self.data.max_sequence_length))

    @staticmethod
    def _cut(embeds: Tensor, mask: Tensor) -> tuple[Tensor, Tensor]:
        longest = int(mask.sum(1).max())
        return embeds[:, :longest].float(), mask[:, :longest]

    def _add_layouts(self, model: Any, samples: Samples, source: Source) -> Samples:
        """Put the head of the side task into the model, and its targets into the samples."""
        blocks, dim = self.layout_blocks(model)
        if self.layout_block >= len(blocks):
            raise ValueError(f"objective.layout_block must be below {len(blocks)}, got {self.layout_block}")
        if not isinstance(source, Scenes):
            raise ValueError("objective.layout_weight is for a source of scenes")
        layouts = WithLayouts(samples, source, model.config.sample_size // model.config.patch_size)
        self.layout_head: LayoutHead = LayoutHead(dim, blocks[self.layout_block])
        model.layout_head = self.layout_head
        return layouts


def text_arguments(pipeline_class: Any) -> list[str]:
    """The arguments of a pipeline that take what its `encode_prompt` gives, in that order."""
    names = ("prompt_embeds", "prompt_attention_mask")
    taken = [name for name in names if name in inspect.signature(pipeline_class.__call__).parameters]
    return [*taken, *(f"negative_{name}" for name in taken)]


def classes_of(source: Source, count: int) -> dict[int, str]:
    """The captions of a source by label: in alphabetical order, whatever the order of its samples.

    Raises:
        ValueError: They are not as many as the model has classes.
    """
    names = sorted({name for i in range(len(source)) for name in source.record(i).captions})
    if len(names) != count:
        raise ValueError(
            f"model.num_classes must be {len(names)}, the different captions of objective.data.source, "
            f"got {count}"
        )
    return dict(enumerate(names))


def scale_latents(latents: Tensor, vae: AutoencoderKL) -> Tensor:
    """Latents as the autoencoder gives them, to the unit scale that the transformer works in."""
    return (latents - (vae.config.shift_factor or 0.0)) * vae.config.scaling_factor
