"""The tools of diffusers, peft and torch on the LEDiT transformer, each compared with the plain model; and
subclasses of it."""

import json
from collections.abc import Iterator
from copy import deepcopy
from typing import Any

import pytest
import torch
from accelerate import cpu_offload
from diffusers import AutoModel, FirstBlockCacheConfig, PyramidAttentionBroadcastConfig
from diffusers.configuration_utils import register_to_config
from diffusers.models.attention_dispatch import AttentionBackendName, _AttentionBackendRegistry
from ledit_toys import LEDIT_TOY, ledit_inputs, toy_ledit
from peft import LoraConfig
from safetensors.torch import load_file
from torch import Tensor, nn
from torch._dynamo.testing import CompileCounterWithBackend
from toys import redraw, relative_error, run

from localdit.models.ledit import LEDiTAttention, LEDiTAttnProcessor, LEDiTBlock, LEDiTTransformer2DModel

pytestmark = pytest.mark.usefixtures("fresh_dynamo")

CONFIGS: list[dict[str, Any]] = [{}, {"causal_variant": "raster", "conv_norm": True, "conv_groups": 24}]
# Tracing takes seconds per block, so models to be compiled whole have one.
COMPILED: dict[str, Any] = {"num_layers": 1, "attention_pattern": ["ca"]}


# --- Subclasses


class GatedBlock(LEDiTBlock):
    """A block that learns how much of itself to use, and hears of a pose, (B, 3), where there is one."""

    def __init__(self, config: Any, index: int):
        super().__init__(config, index)
        dim = config.num_attention_heads * config.attention_head_dim
        self.gate = nn.Parameter(torch.ones(dim))
        self.pose = nn.Linear(3, dim)

    def forward(self, hidden_states: Tensor, *args: Any, pose: Tensor | None = None, **kwargs: Any) -> Tensor:
        if pose is not None:
            hidden_states = hidden_states + self.pose(pose)[:, None]
        return torch.lerp(hidden_states, super().forward(hidden_states, *args, **kwargs), self.gate)


class GatedLEDiT(LEDiTTransformer2DModel):
    block_class = GatedBlock


class NamedLEDiT(GatedLEDiT):
    """Adds a config field, and hands its parent's on."""

    @register_to_config
    def __init__(self, style: str = "plain", **kwargs: Any):
        super().__init__(**kwargs)


class SharpProcessor(LEDiTAttnProcessor):
    """Attention whose output counts twice."""

    def __call__(self, attn: LEDiTAttention, *args: Any, **kwargs: Any) -> Tensor:
        return 2 * super().__call__(attn, *args, **kwargs)


class SharpBlock(LEDiTBlock):
    def __init__(self, config: Any, index: int):
        super().__init__(config, index)
        self.attn1.set_processor(SharpProcessor())


class SharpLEDiT(LEDiTTransformer2DModel):
    block_class = SharpBlock


MODELS = {"plain": LEDiTTransformer2DModel, "gated": GatedLEDiT, "sharp": SharpLEDiT}
every_class = pytest.mark.parametrize("cls", MODELS.values(), ids=MODELS)


def inputs_of(cls: type) -> dict[str, Any]:
    inputs = ledit_inputs((5, 7))
    if cls is GatedLEDiT:
        inputs["attention_kwargs"] = {"pose": torch.linspace(-1, 1, 6).view(2, 3)}
    return inputs


@pytest.mark.parametrize("cls", [GatedLEDiT, SharpLEDiT])
def test_a_subclass_computes_something_of_its_own(cls):
    model, parent = toy_ledit(cls), toy_ledit()
    result = model.load_state_dict(parent.state_dict(), strict=False)
    assert not result.unexpected_keys
    assert all(".gate" in key or ".pose." in key for key in result.missing_keys)
    assert relative_error(run(model, inputs_of(cls)), run(parent, ledit_inputs((5, 7)))) > 1e-3
    assert model._repeated_blocks == model._no_split_modules == [cls.block_class.__name__]
    assert LEDiTTransformer2DModel._repeated_blocks == ["LEDiTBlock"]


def test_an_input_that_no_block_takes_is_refused_by_name():
    for cls in MODELS.values():
        with pytest.raises(ValueError, match=r"attention_kwargs.*posture"):
            toy_ledit(cls)(**ledit_inputs() | {"attention_kwargs": {"posture": torch.ones(2, 3)}})


def test_an_untrained_subclass_is_initialised_like_its_parent():
    model = GatedLEDiT(**LEDIT_TOY)
    assert all(torch.equal(block.gate, torch.ones(24)) for block in model.transformer_blocks)
    assert not any(block.modulation.weight.any() for block in model.transformer_blocks)


def test_a_subclass_may_add_config_fields(tmp_path):
    model = NamedLEDiT(**LEDIT_TOY, style="fancy", causal_variant="rectangle").eval()
    model.save_pretrained(tmp_path)
    model.save_single_file(tmp_path / "model.safetensors")
    loaded = NamedLEDiT.from_pretrained(tmp_path)
    assert (loaded.config.style, loaded.config.causal_variant) == ("fancy", "rectangle")
    loaded = NamedLEDiT.from_single_file(tmp_path / "model.safetensors")
    assert (loaded.config.style, loaded.config.causal_variant) == ("fancy", "rectangle")
    assert torch.equal(run(loaded, ledit_inputs()), run(model, ledit_inputs()))


# --- Saving and loading


@every_class
def test_a_saved_model_loads_with_the_same_config_and_the_same_bits(cls, tmp_path):
    model, inputs = toy_ledit(cls, attention_pattern=["sa", "ca", "ca", "sa"]), inputs_of(cls)
    model.save_pretrained(tmp_path)
    loaded = cls.from_pretrained(tmp_path)
    assert type(loaded) is cls
    assert not loaded.training
    assert torch.equal(run(loaded, inputs), run(model, inputs))
    assert json.loads((tmp_path / "config.json").read_text())["_class_name"] == cls.__name__
    (path,) = tmp_path.glob("*.safetensors")
    assert load_file(path).keys() == dict(model.named_parameters()).keys()


def test_a_model_saved_in_shards_loads_with_the_same_bits(tmp_path):
    model, inputs = toy_ledit(), ledit_inputs()
    model.save_pretrained(tmp_path, max_shard_size="50KB")
    assert len(list(tmp_path.glob("*.safetensors"))) > 2
    assert torch.equal(run(LEDiTTransformer2DModel.from_pretrained(tmp_path), inputs), run(model, inputs))


def test_a_deep_copy_is_a_model_of_its_own():
    model, inputs = toy_ledit(), ledit_inputs()
    copy = deepcopy(model)
    assert torch.equal(run(copy, inputs), run(model, inputs))
    nn.init.zeros_(copy.proj_out.weight)
    assert not torch.equal(run(copy, inputs), run(model, inputs))


def test_a_model_built_without_memory_and_then_filled_runs():
    """`from_pretrained` builds on the meta device: nothing that the forward pass reads may stay there."""
    model, inputs = toy_ledit(), ledit_inputs((5, 7))
    with torch.device("meta"):
        empty = LEDiTTransformer2DModel(**LEDIT_TOY)
    empty.load_state_dict(model.state_dict(), assign=True)
    assert torch.equal(run(empty.eval(), inputs), run(model, inputs))


# --- Precision


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
@pytest.mark.parametrize("config", CONFIGS, ids=str)
def test_half_precision_loads_runs_and_stays_near(config, dtype, tmp_path):
    model, inputs = toy_ledit(**config), ledit_inputs((5, 7))
    whole = run(model, inputs)
    model.save_pretrained(tmp_path)
    half = LEDiTTransformer2DModel.from_pretrained(tmp_path, torch_dtype=dtype)
    assert {p.dtype for p in half.parameters()} == {dtype}
    prediction = run(half, inputs | {"hidden_states": inputs["hidden_states"].to(dtype)})
    assert prediction.dtype == dtype
    assert prediction.isfinite().all()
    assert relative_error(prediction, whole) < 0.05


def test_layerwise_casting_stores_float8_and_stays_near():
    model, inputs = toy_ledit(), ledit_inputs((5, 7))
    plain, size = run(model, inputs), model.get_memory_footprint()
    model.enable_layerwise_casting(storage_dtype=torch.float8_e4m3fn, compute_dtype=torch.float32)
    whole = {name.split(".")[0] for name, p in model.named_parameters() if p.dtype == torch.float32}
    assert whole >= {"patch_embed", "locality_conv", "timestep_embedder", "class_embedder", "modulation_out"}
    assert model.transformer_blocks[0].attn1.to_q.weight.dtype == torch.float8_e4m3fn
    assert model.get_memory_footprint() < 0.7 * size
    assert 0 < relative_error(run(model, inputs), plain) < 0.2


# --- Offloading


@every_class
@pytest.mark.parametrize("level", ["block_level", "leaf_level", "sequential"])
def test_offloading_changes_no_bit(level, cls):
    """Between its calls a layer may be on the meta device: no weight is read outside its module's forward."""
    model, inputs = toy_ledit(cls), inputs_of(cls)
    plain = run(model, inputs)
    if level == "sequential":
        cpu_offload(model, execution_device=torch.device("cpu"))
    else:
        model.enable_group_offload(torch.device("cpu"), offload_type=level, num_blocks_per_group=1)
    assert torch.equal(run(model, inputs), plain)


# --- Attention processors and backends


@pytest.fixture
def _default_backend() -> Iterator[None]:
    """Diffusers makes the last backend that was set for any model the default of all: put it back."""
    before = _AttentionBackendRegistry._active_backend
    yield
    _AttentionBackendRegistry.set_active_backend(before)


@pytest.mark.usefixtures("_default_backend")
@pytest.mark.filterwarnings("ignore:\nflex_attention called without", "ignore:flex_attention called without")
@pytest.mark.parametrize("variant", ["raster", "rectangle", "neighborhood", "corner"])
@pytest.mark.parametrize("backend", ["native", "_native_math", "flex"])
def test_every_attention_follows_the_backend(backend, variant):
    """FlexAttention takes its own form of the mask, by blocks."""
    model, inputs = toy_ledit(causal_variant=variant), ledit_inputs((5, 7))
    plain = run(model, inputs)
    model.set_attention_backend(backend)
    chosen = {processor._attention_backend for processor in model.attn_processors.values()}
    assert chosen == {AttentionBackendName(backend)}
    assert relative_error(run(model, inputs), plain) < 1e-5
    model.reset_attention_backend()
    assert {processor._attention_backend for processor in model.attn_processors.values()} == {None}


def test_every_attention_has_a_processor_that_can_be_exchanged():
    model, inputs = toy_ledit(), ledit_inputs()
    plain, processors = run(model, inputs), model.attn_processors
    assert processors.keys() == {f"transformer_blocks.{i}.attn1.processor" for i in range(4)}
    model.set_attn_processor(SharpProcessor())
    assert relative_error(run(model, inputs), plain) > 1e-3
    model.set_attn_processor(dict(processors))
    assert torch.equal(run(model, inputs), plain)


def test_fusing_the_projections_changes_no_number():
    model, inputs = toy_ledit(), ledit_inputs((5, 7))
    plain = run(model, inputs)
    model.fuse_qkv_projections()
    with torch.no_grad():
        for block in model.transformer_blocks:  # the unfused ones are no longer read
            block.attn1.to_k.weight.mul_(-1)
    assert relative_error(run(model, inputs), plain) < 1e-5
    with torch.no_grad():
        for block in model.transformer_blocks:
            block.attn1.to_k.weight.mul_(-1)
    model.unfuse_qkv_projections()
    assert torch.equal(run(model, inputs), plain)


# --- Compilation


def test_dynamic_compilation_compiles_once_for_many_sizes():
    """No two of the first call's sizes are equal by chance, which the compiler would take for a rule."""
    counter = CompileCounterWithBackend("eager")
    model = toy_ledit(**COMPILED)
    compiled = torch.compile(model, fullgraph=True, dynamic=True, backend=counter)
    for grid in [(10, 14), (18, 6), (22, 26)]:
        inputs = ledit_inputs(grid, batch=3)
        assert relative_error(run(compiled, inputs), run(model, inputs)) < 1e-5
    assert counter.frame_count == 1


@every_class
def test_the_whole_forward_compiles_to_one_graph(cls):
    model, inputs = toy_ledit(cls, **COMPILED), inputs_of(cls)
    compiled = torch.compile(model, fullgraph=True, backend="eager")
    assert relative_error(run(compiled, inputs), run(model, inputs)) < 1e-5


@pytest.mark.parametrize("prob", [0.0, 1.0])
def test_a_compiled_model_gives_the_same_gradients(prob):
    """In training mode: the draw of the dilation is part of the graph."""
    model, inputs = toy_ledit(**COMPILED, multi_dilation_prob=prob).train(), ledit_inputs((5, 7))
    gradients = []
    for call in (model, torch.compile(model, fullgraph=True, backend="aot_eager")):
        model.zero_grad()
        call(**inputs).sample.square().mean().backward()
        gradients.append({name: p.grad.clone() for name, p in model.named_parameters()})
    for name, gradient in gradients[0].items():
        assert relative_error(gradients[1][name], gradient) < 1e-5, name


@every_class
def test_the_repeated_blocks_compile_by_themselves(cls):
    model, inputs = toy_ledit(cls, num_layers=6), inputs_of(cls)
    plain = run(model, inputs)
    counter = CompileCounterWithBackend("eager")
    model.compile_repeated_blocks(fullgraph=True, backend=counter)
    assert relative_error(run(model, inputs), plain) < 1e-5
    assert counter.frame_count == 2  # with the mask and without


def test_the_model_exports():
    model, inputs = toy_ledit(num_layers=2), ledit_inputs((5, 7))
    program = torch.export.export(model, (), inputs | {"return_dict": False}, strict=False)
    (sample,) = program.module()(**inputs, return_dict=False)
    assert relative_error(sample.detach(), run(model, inputs)) < 1e-5


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore:`torch.jit.script")  # inductor's own imports
@pytest.mark.parametrize("backend", ["native", "flex"])
@pytest.mark.usefixtures("_default_backend")
def test_inductor_computes_the_same(backend):
    model = toy_ledit(num_layers=2, attention_head_dim=16)
    plain = {grid: run(model, ledit_inputs(grid)) for grid in [(4, 4), (5, 7)]}
    model.set_attention_backend(backend)
    model.compile_repeated_blocks(fullgraph=True)
    for grid, expected in plain.items():
        assert relative_error(run(model, ledit_inputs(grid)), expected) < 1e-5


# --- LoRA


@every_class
def test_a_lora_can_be_added_scaled_saved_loaded_and_taken_off(cls, tmp_path):
    model, inputs = toy_ledit(cls), inputs_of(cls)
    plain = run(model, inputs)
    layers = ["to_q", "to_k", "to_v", "to_out.0", "locality_conv"]
    model.add_adapter(LoraConfig(r=3, lora_alpha=6, target_modules=layers))
    state = deepcopy(model.state_dict())
    redraw(model, seed=3)
    model.load_state_dict({key: value for key, value in state.items() if "lora_" not in key}, strict=False)
    adapted = run(model, inputs)
    assert relative_error(adapted, plain) > 1e-2
    scaled = {"attention_kwargs": inputs.get("attention_kwargs", {}) | {"scale": 0.0}}
    assert relative_error(run(model, inputs | scaled), plain) < 1e-6
    model.save_lora_adapter(tmp_path)
    model.unload_lora()
    assert torch.equal(run(model, inputs), plain)
    model.load_lora_adapter(tmp_path, prefix=None, weight_name="pytorch_lora_weights.safetensors")
    assert torch.equal(run(model, inputs), adapted)
    model.fuse_lora()
    model.unload_lora()
    assert relative_error(run(model, inputs), adapted) < 1e-5


def test_training_a_lora_leaves_the_model_alone():
    model, inputs = toy_ledit(), ledit_inputs((5, 7))
    model.requires_grad_(False)
    model.add_adapter(LoraConfig(r=2, target_modules=["to_q", "ff.net.2"], init_lora_weights=False))
    model.train()(**inputs).sample.square().mean().backward()
    for name, parameter in model.named_parameters():
        assert (parameter.grad is not None) == ("lora_" in name), name
        assert parameter.grad is None or parameter.grad.abs().max() > 0, name


@every_class
def test_a_subclass_trains_with_gradient_checkpointing(cls):
    model, inputs = toy_ledit(cls, multi_dilation_prob=0.0).train(), inputs_of(cls)
    gradients = []
    for checkpointing in (False, True):
        model.zero_grad()
        if checkpointing:
            model.enable_gradient_checkpointing()
        model(**inputs).sample.square().mean().backward()
        gradients.append({name: p.grad for name, p in model.named_parameters()})
    for name, gradient in gradients[0].items():
        assert gradient.abs().max() > 0, name
        assert torch.equal(gradients[1][name], gradient), name


# --- Caches


def steps(model: nn.Module) -> list[Tensor]:
    """Predictions along a few steps."""
    inputs, predictions = ledit_inputs((5, 7)), []
    for i in range(4):
        now = {"timestep": 600 - 50 * i, "hidden_states": inputs["hidden_states"] * (1 + 0.02 * i)}
        with model.cache_context("cond"):
            predictions.append(run(model, inputs | now))
    return predictions


@pytest.mark.parametrize(
    "cache",
    [
        FirstBlockCacheConfig(threshold=0.5),
        PyramidAttentionBroadcastConfig(
            spatial_attention_block_skip_range=2, current_timestep_callback=lambda: 500
        ),
    ],
    ids=lambda cache: type(cache).__name__,
)
def test_a_cache_acts_while_it_is_on_and_leaves_nothing_behind(cache):
    import localdit.pipelines  # noqa: F401  (tells diffusers about the block)

    model = toy_ledit()
    plain = steps(model)
    model.enable_cache(cache)
    cached = steps(model)
    assert torch.equal(cached[0], plain[0])  # there is nothing to reuse yet
    assert any(not torch.equal(c, p) for c, p in zip(cached, plain))  # and here there was
    assert max(relative_error(c, p) for c, p in zip(cached, plain)) < 0.5
    model.disable_cache()
    for after, before in zip(steps(model), plain):
        assert torch.equal(after, before)


def test_auto_model_finds_the_class(tmp_path):
    import localdit.pipelines  # noqa: F401  (registers the names with diffusers)

    toy_ledit().save_pretrained(tmp_path)
    assert type(AutoModel.from_pretrained(str(tmp_path))) is LEDiTTransformer2DModel


@pytest.mark.gpu
@pytest.mark.parametrize("config", CONFIGS, ids=str)
def test_the_gpu_computes_what_the_cpu_does(config):
    model, inputs = toy_ledit(**config), ledit_inputs((5, 7))
    plain = run(model, inputs)
    on_gpu = {name: value.cuda() for name, value in inputs.items()}
    assert relative_error(run(model.cuda(), on_gpu).cpu(), plain) < 1e-4  # its matrix products may round more
