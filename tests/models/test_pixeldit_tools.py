"""The tools of diffusers, peft and torch on the PixelDiT transformers, each compared with the plain model."""

import json
from collections.abc import Iterator
from copy import deepcopy
from typing import Any

import pytest
import torch
from accelerate import cpu_offload
from diffusers import AutoModel, FirstBlockCacheConfig
from diffusers.configuration_utils import register_to_config
from diffusers.models.attention_dispatch import AttentionBackendName, _AttentionBackendRegistry
from peft import LoraConfig
from pixeldit_toys import TOYS, cast, redraw, relative_error, run, toy_inputs, toy_model
from safetensors.torch import load_file
from torch import Tensor, nn
from torch._dynamo.testing import CompileCounterWithBackend
from torch._subclasses.fake_tensor import FakeTensorMode

from localdit.models.pixeldit import PixelDiTBlock, PixelDiTPixelBlock, PixelDiTTransformer2DModel
from localdit.models.pixeldit_text import PixelDiTTextBlock, PixelDiTTextTransformer2DModel

pytestmark = pytest.mark.usefixtures("fresh_dynamo")
both = pytest.mark.parametrize("cls", TOYS, ids=["class", "text"])
SMALL: dict[str, Any] = {"num_layers": 1, "num_pixel_layers": 1}  # tracing takes seconds per block


# --- Saving and loading


@both
def test_a_saved_model_loads_with_the_same_config_and_the_same_bits(cls, tmp_path):
    import localdit.pipelines  # noqa: F401  (registers the names with diffusers, for AutoModel)

    model = toy_model(cls)
    inputs = toy_inputs(model)
    plain = run(model, inputs)
    model.save_pretrained(tmp_path, max_shard_size="300KB")
    assert len(list(tmp_path.glob("*.safetensors"))) > 2
    for loaded in (cls.from_pretrained(tmp_path), AutoModel.from_pretrained(str(tmp_path))):
        assert type(loaded) is cls
        assert torch.equal(run(loaded, inputs), plain)
    half = cls.from_pretrained(tmp_path, torch_dtype=torch.bfloat16)
    assert {p.dtype for p in half.parameters()} == {torch.bfloat16}
    saved = json.loads((tmp_path / "config.json").read_text())
    assert {name: saved[name] for name in TOYS[cls]} == TOYS[cls]


@both
def test_everything_that_is_learned_is_in_the_file_and_nothing_else(cls, tmp_path):
    model = toy_model(cls)
    run(model, toy_inputs(model))
    model.save_pretrained(tmp_path)
    (path,) = tmp_path.glob("*.safetensors")
    assert load_file(path).keys() == dict(model.named_parameters()).keys() == model.state_dict().keys()


@both
def test_a_model_built_without_memory_and_then_filled_runs(cls):
    model = toy_model(cls)
    inputs = toy_inputs(model)
    with torch.device("meta"):
        empty = cls(**TOYS[cls])
    empty.load_state_dict(model.state_dict(), assign=True)
    assert torch.equal(run(empty.eval(), inputs), run(model, inputs))
    copy = deepcopy(model)
    nn.init.zeros_(copy.proj_out.weight)
    assert not torch.equal(run(copy, inputs), run(model, inputs))


@both
def test_a_dry_run_on_fake_tensors_leaves_nothing_behind(cls):
    model = toy_model(cls)
    inputs = toy_inputs(model, (3, 7))
    with FakeTensorMode():
        assert run(cls(**TOYS[cls]), toy_inputs(model, (3, 7))).shape == (2, 3, 12, 28)
    assert run(model, inputs).isfinite().all()


# --- Precision


@both
def test_layerwise_casting_stores_float8_and_stays_near(cls):
    model = toy_model(cls)
    inputs = toy_inputs(model)
    plain, size = run(model, inputs), model.get_memory_footprint()
    model.enable_layerwise_casting(storage_dtype=torch.float8_e4m3fn, compute_dtype=torch.float32)
    kept = {p.dtype for name, p in model.named_parameters() if "norm" in name or "embed" in name}
    assert kept == {torch.float32}
    assert model.transformer_blocks[0].attn1.to_q.weight.dtype == torch.float8_e4m3fn
    assert model.get_memory_footprint() < 0.7 * size
    prediction = run(model, inputs)
    assert prediction.isfinite().all()
    assert relative_error(prediction, plain) < 0.3


@both
def test_autocast_runs_without_warnings_and_stays_near(cls):
    model = toy_model(cls)
    inputs = toy_inputs(model)
    if cls is PixelDiTTextTransformer2DModel:
        inputs["timestep"] = inputs["timestep"] / 1000
    with torch.autocast("cpu", dtype=torch.bfloat16):
        half = run(model, inputs)
    assert relative_error(half, run(model, inputs)) < 0.1


# --- Offloading


@both
@pytest.mark.parametrize("offload_type", ["block_level", "leaf_level"])
@pytest.mark.parametrize("to_disk", [False, True], ids=["memory", "disk"])
def test_group_offloading_changes_no_bit(cls, offload_type, to_disk, tmp_path):
    model = toy_model(cls)
    inputs = toy_inputs(model)
    plain = run(model, inputs)
    blocks = {"num_blocks_per_group": 1} if offload_type == "block_level" else {}
    disk = {"offload_to_disk_path": str(tmp_path)} if to_disk else {}
    model.enable_group_offload(onload_device=torch.device("cpu"), offload_type=offload_type, **blocks, **disk)
    assert torch.equal(run(model, inputs), plain)


@both
def test_sequential_offloading_changes_no_bit(cls):
    """Between its calls a layer is on the meta device: no weight may be read outside its module's forward."""
    model = toy_model(cls)
    inputs = toy_inputs(model)
    plain = run(model, inputs)
    cpu_offload(model, execution_device=torch.device("cpu"))
    assert torch.equal(run(model, inputs), plain)


@both
def test_the_declarations_that_offloading_and_compilation_read_name_the_blocks(cls):
    block = PixelDiTBlock if cls is PixelDiTTransformer2DModel else PixelDiTTextBlock
    assert cls._no_split_modules == cls._repeated_blocks == [block.__name__, "PixelDiTPixelBlock"]
    assert cls._supports_gradient_checkpointing


# --- Attention


@pytest.fixture
def _default_backend() -> Iterator[None]:
    """Diffusers makes the last backend that was set for any model the default of all: put it back."""
    before = _AttentionBackendRegistry._active_backend
    yield
    _AttentionBackendRegistry.set_active_backend(before)


@pytest.mark.usefixtures("_default_backend")
@both
def test_every_attention_follows_the_backend(cls):
    model = toy_model(cls)
    inputs = toy_inputs(model)
    plain = run(model, inputs)
    model.set_attention_backend("_native_math")
    chosen = {processor._attention_backend for processor in model.attn_processors.values()}
    assert chosen == {AttentionBackendName("_native_math")}
    assert relative_error(run(model, inputs), plain) < 1e-5


@both
def test_every_attention_has_a_processor_that_can_be_exchanged(cls):
    model = toy_model(cls)
    inputs = toy_inputs(model)
    plain, processors = run(model, inputs), model.attn_processors
    levels = (("transformer_blocks", 2), ("pixel_blocks", model.config.num_pixel_layers))
    assert processors.keys() == {
        f"{name}.{i}.attn1.processor" for name, count in levels for i in range(count)
    }
    calls: list[str] = []

    class Counting:
        def __init__(self, name: str, inner: Any):
            self.name, self.inner = name, inner

        def __call__(self, *args: Any, **kwargs: Any) -> Any:
            calls.append(self.name)
            return self.inner(*args, **kwargs)

    model.set_attn_processor({name: Counting(name, inner) for name, inner in processors.items()})
    assert torch.equal(run(model, inputs), plain)
    assert sorted(calls) == sorted(processors)


@both
def test_fusing_the_projections_changes_no_number(cls):
    model = toy_model(cls)
    inputs = toy_inputs(model)
    plain = run(model, inputs)
    model.fuse_qkv_projections()
    with torch.no_grad():
        for block in (*model.transformer_blocks, *model.pixel_blocks):  # the unfused ones are no longer read
            block.attn1.to_k.weight.mul_(-1)
    assert relative_error(run(model, inputs), plain) < 1e-5
    with torch.no_grad():
        for block in (*model.transformer_blocks, *model.pixel_blocks):
            block.attn1.to_k.weight.mul_(-1)
    model.unfuse_qkv_projections()
    assert torch.equal(run(model, inputs), plain)


# --- Compilation


@both
@pytest.mark.parametrize("post", [False, True], ids=["pre", "post"])
def test_the_whole_forward_compiles_to_one_graph(cls, post):
    model = toy_model(cls, **SMALL, pixel_post_modulation=post)
    compiled = torch.compile(model, fullgraph=True, backend="eager")
    inputs = toy_inputs(model, (3, 5))
    assert relative_error(run(compiled, inputs), run(model, inputs)) < 1e-5
    if cls is PixelDiTTextTransformer2DModel:
        mask = torch.ones(2, 7)
        mask[1, 3:] = 0
        masked = inputs | {"encoder_attention_mask": mask}
        assert relative_error(run(compiled, masked), run(model, masked)) < 1e-5


@both
def test_dynamic_compilation_compiles_once_for_many_sizes(cls):
    """No two of the first call's sizes are equal by chance, which the compiler would take for a rule."""
    counter = CompileCounterWithBackend("eager")
    model = toy_model(cls, **SMALL)
    compiled = torch.compile(model, fullgraph=True, dynamic=True, backend=counter)
    for grid in [(5, 11), (9, 3), (13, 6)]:
        inputs = toy_inputs(model, grid, batch=3)
        assert relative_error(run(compiled, inputs), run(model, inputs)) < 1e-5
    assert counter.frame_count == 1


@both
def test_the_repeated_blocks_compile_by_themselves(cls):
    model = toy_model(cls)
    inputs = toy_inputs(model, (3, 5))
    plain = run(model, inputs)
    counter = CompileCounterWithBackend("eager")
    model.compile_repeated_blocks(fullgraph=True, backend=counter)
    assert relative_error(run(model, inputs), plain) < 1e-5
    assert counter.frame_count == 2  # one graph serves all blocks of a level


@both
def test_the_model_exports(cls):
    model = toy_model(cls, **SMALL)
    inputs = toy_inputs(model, (3, 5))
    program = torch.export.export(model, (), inputs | {"return_dict": False}, strict=False)
    (sample,) = program.module()(**inputs, return_dict=False)
    assert relative_error(sample.detach(), run(model, inputs)) < 1e-5


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore:`torch.jit.script")  # inductor's own imports
@both
def test_inductor_computes_the_same(cls):
    model = toy_model(cls)
    compiled = torch.compile(model, fullgraph=True)
    for grid in [(4, 4), (5, 3)]:
        inputs = toy_inputs(model, grid)
        assert relative_error(run(compiled, inputs), run(model, inputs)) < 1e-4


# --- LoRA and caches


def with_lora(model: Any) -> Any:
    """Put an adapter on both levels, with both of its matrices speaking."""
    targets = ["to_q", "to_k", "to_v", "to_out.0", "compress", "modulation2"]
    model.add_adapter(LoraConfig(r=3, lora_alpha=6, target_modules=targets))
    generator = torch.Generator().manual_seed(3)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "lora_" in name:
                parameter.copy_(0.1 * torch.randn(parameter.shape, generator=generator))
    return model


@both
def test_a_lora_can_be_added_scaled_saved_loaded_fused_and_taken_off(cls, tmp_path):
    model = toy_model(cls)
    inputs = toy_inputs(model)
    plain = run(model, inputs)
    adapted = run(with_lora(model), inputs)
    assert relative_error(adapted, plain) > 1e-2
    model.save_lora_adapter(tmp_path)
    half = run(model, inputs, attention_kwargs={"scale": 0.5})
    assert 1e-3 < relative_error(half, plain) < relative_error(adapted, plain)
    assert relative_error(run(model, inputs, attention_kwargs={"scale": 0.0}), plain) < 1e-6
    model.unload_lora()
    assert torch.equal(run(model, inputs), plain)
    model.load_lora_adapter(tmp_path, prefix=None, weight_name="pytorch_lora_weights.safetensors")
    assert torch.equal(run(model, inputs), adapted)
    model.fuse_lora()
    model.unload_lora()
    assert relative_error(run(model, inputs), adapted) < 1e-5


@both
def test_training_a_lora_leaves_the_model_alone(cls):
    model = toy_model(cls)
    inputs = toy_inputs(model)
    model.requires_grad_(False)
    with_lora(model).train()
    model(**inputs).sample.square().mean().backward()
    for name, parameter in model.named_parameters():
        assert (parameter.grad is not None) == ("lora_" in name), name
        assert parameter.grad is None or parameter.grad.abs().max() > 0, name


@both
def test_a_first_block_cache_of_threshold_zero_skips_nothing(cls):
    import localdit.pipelines  # noqa: F401  (tells diffusers about the blocks)

    model = toy_model(cls)
    inputs = toy_inputs(model)
    plain = run(model, inputs)
    for threshold in (0.0, 1e9):
        model.enable_cache(FirstBlockCacheConfig(threshold=threshold))
        with model.cache_context("cond"):
            assert torch.equal(run(model, inputs), plain)
            again = run(model, inputs | {"hidden_states": 1.1 * inputs["hidden_states"]})
        model.disable_cache()
        fresh = run(model, inputs | {"hidden_states": 1.1 * inputs["hidden_states"]})
        assert torch.equal(again, fresh) == (threshold == 0)


# --- Subclassing


class PosedBlock(PixelDiTBlock):
    """A block that also hears of a pose, (B, pose_channels)."""

    def __init__(self, config: Any):
        super().__init__(config)
        self.pose = nn.Linear(config.pose_channels, config.num_attention_heads * config.attention_head_dim)

    def forward(
        self, hidden_states: Tensor, conditioning: Tensor, rotary: Tensor, pose: Tensor | None = None
    ) -> Tensor:
        if pose is not None:
            hidden_states = hidden_states + self.pose(pose)[:, None]
        return super().forward(hidden_states, conditioning, rotary)


class SharpPixelBlock(PixelDiTPixelBlock):
    """A pixel block that counts twice."""

    def forward(self, hidden_states: Tensor, conditioning: Tensor, rotary: Tensor) -> Tensor:
        return 2 * super().forward(hidden_states, conditioning, rotary)


class PosedPixelDiT(PixelDiTTransformer2DModel):
    block_class = PosedBlock
    pixel_block_class = SharpPixelBlock

    @register_to_config
    def __init__(self, pose_channels: int = 3, **kwargs: Any):
        super().__init__(**kwargs)


def test_a_subclass_with_a_field_and_an_input_saves_loads_offloads_and_takes_a_lora(tmp_path):
    model = toy_model(PosedPixelDiT, pose_channels=5)
    inputs = toy_inputs(model)
    posed = inputs | {"attention_kwargs": {"pose": torch.randn(2, 5)}}
    plain = run(model, posed)
    assert relative_error(plain, run(model, inputs)) > 1e-3
    parent = toy_model()
    model.load_state_dict(parent.state_dict(), strict=False)
    assert relative_error(run(model, inputs), run(parent, inputs)) > 1e-3  # the pixel block's own
    redraw(model)
    assert model._no_split_modules == model._repeated_blocks == ["PosedBlock", "SharpPixelBlock"]
    model.save_pretrained(tmp_path)
    loaded = PosedPixelDiT.from_pretrained(tmp_path)
    assert loaded.config.pose_channels == 5
    assert torch.equal(run(loaded, posed), plain)
    model.train().enable_gradient_checkpointing()
    model(**posed).sample.square().mean().backward()
    assert model.transformer_blocks[1].pose.weight.grad.abs().max() > 0
    loaded.add_adapter(LoraConfig(r=2, target_modules=["to_q", "pose"]))
    assert torch.equal(run(loaded, posed), plain)
    other = PosedPixelDiT.from_pretrained(tmp_path)
    cpu_offload(other, execution_device=torch.device("cpu"))
    assert torch.equal(run(other, posed), plain)


def test_a_subclass_compiles():
    model = toy_model(PosedPixelDiT, pose_channels=5, **SMALL)
    inputs = toy_inputs(model) | {"attention_kwargs": {"pose": torch.randn(2, 5)}}
    plain = run(model, inputs)
    compiled = torch.compile(model, fullgraph=True, backend="eager")
    assert relative_error(run(compiled, inputs), plain) < 1e-5
    model.compile_repeated_blocks(fullgraph=True, backend="eager")
    assert relative_error(run(model, inputs), plain) < 1e-5


@pytest.mark.gpu
@both
def test_the_gpu_computes_what_the_cpu_does(cls):
    model = toy_model(cls)
    inputs = toy_inputs(model)
    plain = run(model, inputs)
    on_gpu = {name: value.cuda() for name, value in inputs.items()}
    assert relative_error(run(model.cuda(), on_gpu).cpu(), plain) < 1e-4  # its matrix products round more
    half = run(model.bfloat16(), cast(on_gpu, torch.bfloat16))
    assert half.isfinite().all()
