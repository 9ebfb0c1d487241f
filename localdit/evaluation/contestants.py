"""The transformers that the speed comparison knows: LocalDiT and its peers, each as it is run for sampling.

All have the sizes that were published, random weights, and prompts that fill half of their text tokens. Each
runs as its pipeline runs it. Ours is given what its pipeline makes once for all steps: the text's keys and
values, without padding, and the modulations of the timestep; with guidance it takes each picture once. The
others, in diffusers' pipelines, project text and timestep in every forward, and take each picture twice.
"""

import importlib.util
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import lru_cache, partial
from pathlib import Path
from typing import Any

import torch
from diffusers import PixArtTransformer2DModel, SanaTransformer2DModel
from diffusers.models.normalization import RMSNorm
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel

from localdit.evaluation import floors
from localdit.evaluation.timing import draw_weights
from localdit.models.local_dit import LocalDiTTransformer2DModel

WIDTH: dict[str, Any] = {"num_attention_heads": 16, "attention_head_dim": 72, "caption_channels": 4096}
LOCAL_DIT_BLOCKS = 18
SANA_600M: dict[str, Any] = {
    "num_attention_heads": 36,
    "attention_head_dim": 32,
    "num_cross_attention_heads": 16,
    "cross_attention_head_dim": 72,
    "cross_attention_dim": 1152,
}
SANA_1600M: dict[str, Any] = {}  # the defaults of diffusers' class
CUDNN_FIRST = [SDPBackend.CUDNN_ATTENTION, SDPBackend.EFFICIENT_ATTENTION, SDPBackend.MATH]
OPTIONS = {
    "torch": "ours without Triton kernels",
    "triton": "ours with Triton kernels, or not at all",
    "cudnn": "cuDNN's attention where it can",
    "compiled": "torch.compile, block by block",
    "graph": "the forward as a CUDA graph",
}


@dataclass(frozen=True)
class Picture:
    """What the transformers are run on."""

    size: int  # side in pixels
    batch: int
    guided: bool  # predicted with and without the prompt
    dtype: torch.dtype
    device: torch.device

    @property
    def rows(self) -> int:
        """Predictions of a forward."""
        return self.batch * (2 if self.guided else 1)


Build = Callable[[Picture, int, Path | None], tuple[Any, dict[str, Any]]]


@dataclass(frozen=True)
class Family:
    """A published transformer."""

    title: str
    depth: int  # blocks
    build: Build  # from picture, blocks and checkout: the model, and the arguments of its forward
    floor: Callable[[floors.Shape], list[floors.Work]]
    width: int = 1152
    text_tokens: int = 120
    pixels: int = 16  # side of a token
    ours: bool = False
    needs_checkout: bool = False


@dataclass(frozen=True)
class Contestant:
    """A transformer and how it is run: "pixart-sigma:cudnn+compiled" is `pixart-sigma` with two options."""

    model: str
    options: tuple[str, ...] = ()

    @property
    def name(self) -> str:
        return f"{self.model}:{'+'.join(self.options)}" if self.options else self.model

    @property
    def family(self) -> Family:
        return FAMILIES[self.model]

    def floor(self, picture: Picture) -> list[floors.Work]:
        """The least work of a forward of the whole model."""
        family = self.family
        shape = floors.Shape(
            tokens=(picture.size // family.pixels) ** 2,
            batch=picture.rows,
            width=family.width,
            depth=family.depth,
            text_tokens=family.text_tokens,
            itemsize=picture.dtype.itemsize,
        )
        return family.floor(shape)

    def build(
        self, picture: Picture, blocks: int, checkout: Path | None = None
    ) -> tuple[Any, Callable[[], object]]:
        """A model with so many blocks and random weights, and its forward on a random input."""
        model, inputs = self.family.build(picture, blocks, checkout)
        for option in self.options:
            if option in ("torch", "triton"):
                model.set_kernels(option)
            if option == "compiled":
                for block in model.transformer_blocks:
                    block.compile(backend=_inductor(self.model, "cudnn" in self.options), dynamic=False)
        with_cudnn = "cudnn" in self.options

        @torch.no_grad()
        def forward() -> object:
            if with_cudnn:
                with sdpa_kernel(CUDNN_FIRST, set_priority=True):
                    return model(**inputs)
            return model(**inputs)

        return model, Graphed(forward) if "graph" in self.options else forward


def parse(names: Sequence[str], checkout: Path | None, device: str) -> list[Contestant]:
    """Contestants from "model" or "model:option+option".

    Raises:
        ValueError: for one that is not known, that is not for this device, or that is there twice; for a
            checkout that none of them is made of.
    """
    contestants = []
    for name in names:
        model, _, tail = name.partition(":")
        options = tuple(tail.split("+")) if tail else ()
        if model not in FAMILIES:
            raise ValueError(f"models must be among {', '.join(FAMILIES)}, got {name!r}")
        for option in options:
            if option not in OPTIONS:
                raise ValueError(f"options of models must be among {', '.join(OPTIONS)}, got {name!r}")
            if option in ("torch", "triton") and not FAMILIES[model].ours:
                raise ValueError(f"the option {option} is for LocalDiT's own models, got {name!r}")
            if option in ("triton", "cudnn", "graph") and device != "cuda":
                raise ValueError(f"the option {option} needs the device cuda, got {name!r} on {device}")
        if FAMILIES[model].needs_checkout and checkout is None:
            raise ValueError(f"{model} needs a reference, a checkout of the published LocalDiT, got none")
        contestants.append(Contestant(model, options))
    if checkout is not None and not any(one.family.needs_checkout for one in contestants):
        raise ValueError(
            f"a reference is for {' and '.join(PUBLISHED)} among the models, got {' '.join(names)}"
        )
    if len(set(contestants)) < len(contestants):
        raise ValueError(f"models must differ from each other, got {' '.join(names)}")
    return contestants


@lru_cache
def _inductor(model: str, with_cudnn: bool) -> Callable[..., Any]:
    """PyTorch's compiler, for one model and attention alone.

    Which attention PyTorch chooses is settled when a block is compiled, and nobody looks whether it would be
    another now: of two contestants whose blocks are alike, the second would run the code of the first.
    """

    def compile_graph(graph: Any, inputs: Any) -> Any:
        return torch._dynamo.lookup_backend("inductor")(graph, inputs)

    return compile_graph


class Graphed:
    """A forward, recorded at the first call and played from then on, without the CPU's part."""

    peak_bytes = 0  # allocated for the recording. Playing it allocates nothing: the graph keeps what it needs

    def __init__(self, forward: Callable[[], object]):
        self.forward = forward
        self._graph: torch.cuda.CUDAGraph | None = None

    def __call__(self) -> None:
        if self._graph is None:
            self._graph = self._record()
        self._graph.replay()

    def _record(self) -> torch.cuda.CUDAGraph:
        aside = torch.cuda.Stream()
        aside.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(aside):
            for _ in range(3):  # compiles, tunes, and makes what is kept
                self.forward()
        torch.cuda.current_stream().wait_stream(aside)
        before = torch.cuda.memory_allocated()
        torch.cuda.reset_peak_memory_stats()
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            self.forward()
        self.peak_bytes = torch.cuda.max_memory_allocated() - before
        return graph


# --- The models ---------------------------------------------------------------------------------------------


def _create(model_class: Callable[..., nn.Module], picture: Picture, **config: Any) -> Any:
    with picture.device:
        model = model_class(**config)
    draw_weights(model, picture.dtype)
    return model.eval()


def _text(picture: Picture, tokens: int, channels: int) -> dict[str, Tensor]:
    """Prompts that fill half of the text tokens; with guidance, behind as many empty ones, of one token."""
    mask = torch.zeros(picture.rows, tokens, device=picture.device)
    mask[:, 0] = 1
    mask[-picture.batch :, : tokens // 2] = 1
    text = torch.randn(picture.rows, tokens, channels, dtype=picture.dtype, device=picture.device)
    return {"encoder_hidden_states": text, "encoder_attention_mask": mask}


def _latents(picture: Picture, rows: int, channels: int, pixels: int) -> Tensor:
    shape = (rows, channels, picture.size // pixels, picture.size // pixels)
    return torch.randn(shape, dtype=picture.dtype, device=picture.device)


def _timestep(rows: int, picture: Picture) -> Tensor:
    return torch.full((rows,), 500, device=picture.device)


def _sizes(rows: int, picture: Picture) -> dict[str, Tensor]:
    like: dict[str, Any] = {"dtype": picture.dtype, "device": picture.device}
    return {
        "resolution": torch.full((rows, 2), float(picture.size), **like),
        "aspect_ratio": torch.ones(rows, **like),
    }


def _local_dit(
    picture: Picture, blocks: int, _: Path | None, *, global_context: bool
) -> tuple[Any, dict[str, Any]]:
    model = _create(
        LocalDiTTransformer2DModel,
        picture,
        **WIDTH,
        num_layers=blocks,
        sample_size=picture.size // 8,
        global_context=global_context,
    )
    with torch.no_grad():
        text = model.encode_text(**_text(picture, 120, WIDTH["caption_channels"]))
        (step,) = model.encode_timesteps(_timestep(1, picture), _sizes(1, picture))
    # Both halves of guidance share the first self-attention: in a slice that would weigh six times as much.
    latents = _latents(picture, picture.batch if blocks == LOCAL_DIT_BLOCKS else picture.rows, 4, 8)
    return model, {"hidden_states": latents, "encoder_hidden_states": text, "timestep": step}


def _pixart(
    picture: Picture, blocks: int, _: Path | None = None, *, text_tokens: int, out_channels: int = 8
) -> tuple[Any, dict[str, Any]]:
    """PixArt-alpha is told of the sizes, PixArt-Sigma is not."""
    alpha = text_tokens == 120
    model = _create(
        PixArtTransformer2DModel,
        picture,
        **WIDTH,
        num_layers=blocks,
        sample_size=picture.size // 8,
        cross_attention_dim=WIDTH["num_attention_heads"] * WIDTH["attention_head_dim"],
        out_channels=out_channels,
        use_additional_conditions=alpha,
    )
    return model, {
        "hidden_states": _latents(picture, picture.rows, 4, 8),
        "timestep": _timestep(picture.rows, picture),
        "added_cond_kwargs": _sizes(picture.rows, picture) if alpha else dict.fromkeys(_sizes(1, picture)),
        **_text(picture, text_tokens, WIDTH["caption_channels"]),
    }


def _sana(
    picture: Picture, blocks: int, _: Path | None, *, config: dict[str, Any]
) -> tuple[Any, dict[str, Any]]:
    model = _create(
        SanaTransformer2DModel, picture, **config, num_layers=blocks, sample_size=picture.size // 32
    )
    return model, {
        "hidden_states": _latents(picture, picture.rows, model.config.in_channels, 32),
        "timestep": _timestep(picture.rows, picture),
        **_text(picture, 300, model.config.caption_channels),
    }


def _published(
    picture: Picture, blocks: int, checkout: Path | None, *, global_context: bool
) -> tuple[Any, dict[str, Any]]:
    """PixArt with the attention of a checkout put in, as the published `load_model` does it."""
    assert checkout is not None
    attention = load_published_attention(checkout)
    model, inputs = _pixart(picture, blocks, text_tokens=120, out_channels=4)
    heads, head_dim = WIDTH["num_attention_heads"], WIDTH["attention_head_dim"]
    window = 4
    for index, block in enumerate(model.transformer_blocks):
        for attn in (block.attn1, block.attn2):
            attn.fuse_projections()
            for name in ("norm_q", "norm_k"):
                norm = RMSNorm(head_dim, eps=1e-10).to(picture.device, picture.dtype)
                setattr(attn, name, norm)
        try:
            processor = attention(
                window_size=window,
                num_heads=heads,
                use_global=global_context,
                shift_size=index % window,
                dim=heads * head_dim,
                do_rope=True,
                device=picture.device,
                dtype=picture.dtype,
            )
            processor.set_image_size(picture.size // 16, picture.size // 16)
        except (AttributeError, TypeError) as error:
            raise ValueError(
                f"reference: {checkout} is another LocalDiT than the published one: {error}"
            ) from error
        block.attn1.set_processor(processor)
    return model, inputs


def load_published_attention(checkout: Path) -> Any:
    """The attention processor of a checkout of the published LocalDiT. This runs the checkout's code.

    Raises:
        ValueError: There is none, or it does not load.
    """
    path = checkout / "localdit/models/attentions.py"
    if not path.is_file():
        raise ValueError(f"reference must be a checkout of the published LocalDiT: {path} is not there")
    # Under a name of its own: the checkout's package is called as this one is.
    spec = importlib.util.spec_from_file_location("published_localdit_attentions", path)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    try:
        spec.loader.exec_module(module)
        return module.GCAttnProcessor2_0
    except Exception as error:
        raise ValueError(f"reference: {path} does not load: {error}") from error


def _family(kind: str, global_context: bool) -> dict[str, Any]:
    return {
        "depth": LOCAL_DIT_BLOCKS,
        "build": partial(_local_dit if kind == "ours" else _published, global_context=global_context),
        "floor": partial(floors.local_dit, global_context=global_context),
        "ours": kind == "ours",
        "needs_checkout": kind == "published",
    }


def _pixart_family(text_tokens: int) -> dict[str, Any]:
    build = partial(_pixart, text_tokens=text_tokens)
    return {"depth": 28, "build": build, "floor": floors.pixart, "text_tokens": text_tokens}


_SANA: dict[str, Any] = {"floor": floors.sana, "text_tokens": 300, "pixels": 32}
FAMILIES = {
    "local": Family("LocalDiT", **_family("ours", False)),
    "global": Family("LocalDiT, global context", **_family("ours", True)),
    "pixart-alpha": Family("PixArt-alpha XL", **_pixart_family(120)),
    "pixart-sigma": Family("PixArt-Sigma XL", **_pixart_family(300)),
    "sana-0.6b": Family("Sana 0.6B", 28, partial(_sana, config=SANA_600M), **_SANA),
    "sana-1.6b": Family("Sana 1.6B", 20, partial(_sana, config=SANA_1600M), width=2240, **_SANA),
    "published": Family("published LocalDiT", **_family("published", False)),
    "published-global": Family("published LocalDiT, global context", **_family("published", True)),
}
PUBLISHED = tuple(name for name, family in FAMILIES.items() if family.needs_checkout)
