"""Every architecture as a toy, with what `test_tools.py` must know of it: a fifth one is one entry of
`ARCHITECTURES`. `subclasses.py` has further entries."""

from collections.abc import Callable, Iterator
from dataclasses import dataclass, field, replace
from typing import Any

import pytest
import torch
from ledit_toys import ledit_inputs, toy_ledit
from peft import LoraConfig
from pixeldit_toys import toy_inputs as pixeldit_inputs
from pixeldit_toys import toy_model as toy_pixeldit
from torch import Tensor, nn
from toy_sparse import sparse_inputs, toy_sparse
from toys import relative_error, run, toy_inputs, toy_model

from localdit.models.ledit import LEDiTTransformer2DModel
from localdit.models.local_dit import LocalDiTTransformer2DModel
from localdit.models.pixeldit import PixelDiTTransformer2DModel
from localdit.models.pixeldit_text import PixelDiTTextTransformer2DModel
from localdit.models.sparse_dit import SparseDiTTransformer2DModel

PROJECTIONS = ("to_q", "to_k", "to_v", "to_out.0")


@dataclass(frozen=True, kw_only=True)
class Toy:
    """A small model and what is its own in tests that hold for all.

    Args:
        cls: Its class.
        build: Makes one with speaking weights, of a class and config fields.
        draw: Draws inputs, of a model, a grid of tokens and a batch.
        attentions: The names of all its attentions.
        blocks: The class names of its repeated blocks.
        config: Fields of its own, beyond those of `build`.
        extra: Inputs of its own.
        training: Inputs in training.
        half: How far it may be off in half precision.
        whole: Of which parameters, by parts of their names, half precision is kept off.
        float8: How far it may be off if linear layers are stored as float8, and how much of its size stays.
        float8_whole: Parts of the names of parameters that are not stored so.
        small: Fields for a model to be compiled whole: tracing takes seconds per block.
        grids: Sizes that it is compiled for.
        dynamic_grids: Sizes that one compilation serves, for three pictures. Of the first no two numbers are
            equal by chance, which the compiler would take for a rule.
        compiled_extra: Inputs that it is compiled for beside.
        repeated: Fields for a model to be compiled by blocks, into `graphs` graphs.
        lora: Layers that take a LoRA.
        still: Fields of a model that draws nothing in training.
        unread: Parameters, by how their names begin, that have no say in the output.
        caches: Which of `test_tools.CACHES` act on it.
    """

    cls: type[nn.Module]
    build: Callable[..., Any]
    draw: Callable[..., dict[str, Any]]
    attentions: frozenset[str]
    blocks: tuple[str, ...]
    config: dict[str, Any] = field(default_factory=dict)
    extra: dict[str, Any] = field(default_factory=dict)
    training: dict[str, Any] = field(default_factory=dict)
    half: float = 0.05
    whole: tuple[str, ...] = ()
    float8: tuple[float, float] = (0.2, 0.7)
    float8_whole: tuple[str, ...]
    small: dict[str, Any]
    grids: tuple[tuple[int, int], ...] = ((4, 6), (3, 5))
    dynamic_grids: tuple[tuple[int, int], ...] = ((10, 14), (18, 6), (22, 26))
    compiled_extra: dict[str, Any] = field(default_factory=dict)
    repeated: dict[str, Any] = field(default_factory=dict)
    graphs: int = 1
    lora: tuple[str, ...] = PROJECTIONS
    still: dict[str, Any] = field(default_factory=dict)
    unread: tuple[str, ...] = ()
    caches: tuple[str, ...] = ("first block", "pyramid")

    def model(self, **config: Any) -> Any:
        return self.build(self.cls, **self.config | config)

    def inputs(self, model: Any, grid: tuple[int, int] = (5, 7), batch: int = 2) -> dict[str, Any]:
        return self.draw(model, grid, batch) | self.extra


def attentions(blocks: dict[str, int], each: tuple[str, ...] = ("attn1",)) -> frozenset[str]:
    """The names of all attentions, of so many blocks by name."""
    return frozenset(
        f"{name}.{i}.{attn}" for name, count in blocks.items() for i in range(count) for attn in each
    )


_pixeldit = Toy(
    cls=PixelDiTTransformer2DModel,
    build=toy_pixeldit,
    draw=pixeldit_inputs,
    attentions=attentions({"transformer_blocks": 2, "pixel_blocks": 2}),
    blocks=("PixelDiTBlock", "PixelDiTPixelBlock"),
    half=0.2,
    float8=(0.3, 0.7),
    float8_whole=("norm", "embed"),
    small={"num_layers": 1, "num_pixel_layers": 1},
    grids=((3, 5),),
    dynamic_grids=(
        (5, 11),
        (9, 3),
        (13, 6),
    ),  # more patches are worked on in more goes, which is another graph
    graphs=2,
    lora=(*PROJECTIONS, "compress", "modulation2"),
    caches=("first block",),
)

ARCHITECTURES = {
    "local_dit": Toy(
        cls=LocalDiTTransformer2DModel,
        build=toy_model,
        draw=lambda model, grid, batch: toy_inputs(grid, batch),
        attentions=attentions({"transformer_blocks": 4}, ("attn1", "attn2")),
        blocks=("LocalDiTBlock",),
        float8_whole=("norm", "adaln", "pos_embed"),
        small={"num_layers": 1, "window_size": 2},
        grids=((8, 9), (5, 7)),
        caches=("first block", "pyramid", "pyramid of both", "faster"),
    ),
    "sparse_dit": Toy(
        cls=SparseDiTTransformer2DModel,
        build=toy_sparse,
        draw=lambda model, grid, batch: sparse_inputs(grid, batch),
        attentions=attentions({"mixer_blocks": 2, "transformer_blocks": 4}, ("attn1", "attn2"))
        | {"caption_refiner.attn1"},
        blocks=("SparseDiTBlock",),
        training={"mask_ratio": 0.5},
        half=0.2,
        whole=("router",),
        float8=(0.3, 1.0),  # the experts' tensors, of no linear layer, are left as they are
        float8_whole=("norm", "adaln", "patch_embed", "time_embed", "router", "experts"),
        small={"num_layers": 1, "mixer_num_layers": 2, "num_experts": 2},  # one with experts, one without
        # One graph for each shape of a block, of which the compiler takes eight unless told to take more. The
        # first and the last are alike here, and the one between has experts.
        repeated={
            "mixer_num_layers": 0,
            "num_layers": 3,
            "attention_ratio": (1.0, 1.0),
            "ffn_ratio": (2.0, 2.0),
        },
        graphs=2,
    ),
    "ledit": Toy(
        cls=LEDiTTransformer2DModel,
        build=toy_ledit,
        draw=lambda model, grid, batch: ledit_inputs(grid, batch),
        attentions=attentions({"transformer_blocks": 4}),
        blocks=("LEDiTBlock",),
        float8_whole=(
            "patch_embed",
            "locality_conv",
            "timestep_embedder",
            "class_embedder",
            "modulation_out",
        ),
        small={"num_layers": 1, "attention_pattern": ["ca"]},
        grids=((5, 7),),
        repeated={"num_layers": 6, "attention_pattern": "sa_ca"},
        graphs=2,  # with the mask and without
        lora=(*PROJECTIONS, "locality_conv", "ff.net.2"),
        still={"multi_dilation_prob": 0.0},
    ),
    "pixeldit": _pixeldit,
    "pixeldit_text": replace(
        _pixeldit,
        cls=PixelDiTTextTransformer2DModel,
        attentions=attentions({"transformer_blocks": 2, "pixel_blocks": 1}),
        blocks=("PixelDiTTextBlock", "PixelDiTPixelBlock"),
        compiled_extra={"encoder_attention_mask": torch.tensor([[1.0] * 7, [1.0] * 3 + [0.0] * 4])},
        # After the last block the text is dropped, and what only the text hears of it.
        unread=tuple(
            f"transformer_blocks.1.{layer}."
            for layer in (
                "norm2_context",
                "ff_context",
                "attn1.to_add_out",
                "attn1.add_q_proj",
                "attn1.norm_added_q",
            )
        ),
    ),
}
_local, _sparse, _ledit = (ARCHITECTURES[name] for name in ("local_dit", "sparse_dit", "ledit"))

VARIANTS = ARCHITECTURES | {
    "local_dit, no global context": replace(_local, config={"global_context": False}),
    "local_dit, full attention": replace(_local, config={"full_attention_layers": (1, 3)}, graphs=2),
    "sparse_dit, no mixer": replace(_sparse, config={"mixer_num_layers": 0}),
    "sparse_dit, biases": replace(_sparse, config={"use_bias": True, "qk_norm_affine": True}),
    "ledit, raster": replace(
        _ledit,
        config={
            "causal_variant": "raster",
            "conv_norm": True,
            "conv_groups": 24,
            "attention_pattern": ["sa", "ca", "ca", "sa"],
        },
        lora=(*PROJECTIONS, "ff.net.2"),  # peft merges none into a convolution of groups
    ),
}


def each(toys: dict[str, Toy]) -> pytest.MarkDecorator:
    """Run a test, which takes `toy`, with each of them."""
    return pytest.mark.parametrize("toy", toys.values(), ids=toys)


# --- What the tests of one architecture share with those of all


@torch.no_grad()
def encoded(model: Any, inputs: dict[str, Any], **kwargs: Any) -> dict[str, Any]:
    """The inputs with the caption encoded by the model."""
    text, mask = inputs["encoder_hidden_states"], inputs.get("encoder_attention_mask")
    context = model.encode_text(text, mask, **kwargs)
    return inputs | {"encoder_hidden_states": context, "encoder_attention_mask": None}


def forms(model: Any, inputs: dict[str, Any], **kwargs: Any) -> Iterator[dict[str, Any]]:
    """The inputs; and, of a model that reads captions beforehand, those with the caption read."""
    yield inputs
    if hasattr(model, "encode_text"):
        yield encoded(model, inputs, **kwargs)


def with_lora(model: Any, layers: tuple[str, ...] = PROJECTIONS) -> Any:
    """Put an adapter of rank 3 on layers, with both of its matrices speaking."""
    model.add_adapter(LoraConfig(r=3, lora_alpha=6, target_modules=list(layers)))
    generator = torch.Generator().manual_seed(3)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "lora_" in name:
                parameter.copy_(0.15 * torch.randn(parameter.shape, generator=generator))
    return model


def gradients(model: Any, inputs: dict[str, Any], call: Any = None) -> dict[str, Tensor]:
    """Of a squared output, by parameter. call: in place of the model, to which the parameters belong."""
    model.zero_grad()
    (model if call is None else call)(**inputs).sample.square().mean().backward()
    return {
        name: torch.zeros_like(p) if p.grad is None else p.grad.clone()
        for name, p in model.named_parameters()
    }


def assert_compiles_with_its_gradients(model: Any, inputs: dict[str, Any]) -> None:
    compiled = torch.compile(model, fullgraph=True, backend="aot_eager")
    found = gradients(model, inputs, compiled)
    for name, gradient in gradients(model, inputs).items():
        assert relative_error(found[name], gradient) < 1e-5, name


def steps(toy: Toy, model: Any) -> list[Tensor]:
    """Predictions along a few steps of one prompt or label; sizes are derived, as in a pipeline."""
    inputs = toy.inputs(model)
    inputs.pop("added_cond_kwargs", None)
    predictions = []
    for i in range(4):
        scales = {"hidden_states": 1 + 0.02 * i, "timestep": 1 - 0.02 * i}
        with model.cache_context("cond"):
            predictions.append(run(model, inputs | {name: inputs[name] * scales[name] for name in scales}))
    return predictions
