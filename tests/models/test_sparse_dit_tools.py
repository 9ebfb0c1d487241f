"""The tools of diffusers, peft and torch on the SparseDiT transformer, each compared with the plain model."""

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
from peft import LoraConfig
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from torch._dynamo.testing import CompileCounterWithBackend
from torch._subclasses.fake_tensor import FakeTensorMode
from toy_sparse import TOY, redraw, sparse_inputs, toy_sparse
from toys import cast, relative_error, run

from localdit.models.sparse_dit import (
    BlockShape,
    SparseDiTAttention,
    SparseDiTAttnProcessor,
    SparseDiTBlock,
    SparseDiTCrossAttnProcessor,
    SparseDiTTransformer2DModel,
)

pytestmark = [
    pytest.mark.usefixtures("fresh_dynamo"),
    # Dynamo's own, wherever it meets an autograd.Function.
    pytest.mark.filterwarnings("ignore:.*autograd.function.Function.* should not be instantiated"),
]

CONFIGS: list[dict[str, Any]] = [{}, {"mixer_num_layers": 0}, {"use_bias": True, "qk_norm_affine": True}]
BLOCKS = [f"mixer_blocks.{i}" for i in range(2)] + [f"transformer_blocks.{i}" for i in range(4)]
# Tracing takes seconds per block, so models to be compiled whole have few: one with experts, one without.
COMPILED: dict[str, Any] = {"num_layers": 1, "mixer_num_layers": 2, "num_experts": 2}


@torch.no_grad()
def encoded(model: Any, inputs: dict[str, Any], **kwargs: Any) -> dict[str, Any]:
    """The inputs with the caption encoded by the model."""
    return inputs | {"encoder_hidden_states": model.encode_text(inputs["encoder_hidden_states"], **kwargs)}


# --- Saving and loading


@pytest.mark.parametrize("config", CONFIGS, ids=str)
def test_a_saved_model_loads_with_the_same_config_and_the_same_bits(config, tmp_path):
    model, inputs = toy_sparse(**config), sparse_inputs((3, 5))
    model.save_pretrained(tmp_path)
    loaded = SparseDiTTransformer2DModel.from_pretrained(tmp_path)
    assert not loaded.training
    assert torch.equal(run(loaded, inputs), run(model, inputs))
    loaded.save_pretrained(tmp_path / "again")
    first, second = (
        json.loads((path / "config.json").read_text()) for path in (tmp_path, tmp_path / "again")
    )
    second.pop("_name_or_path")
    assert first == second


def test_a_model_saved_in_shards_loads_with_the_same_bits(tmp_path):
    model, inputs = toy_sparse(), sparse_inputs()
    model.save_pretrained(tmp_path, max_shard_size="500KB")
    assert len(list(tmp_path.glob("*.safetensors"))) > 2
    assert torch.equal(run(SparseDiTTransformer2DModel.from_pretrained(tmp_path), inputs), run(model, inputs))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_a_model_loads_in_another_dtype_but_for_its_routers(dtype, tmp_path):
    model, inputs = toy_sparse(), sparse_inputs()
    model.save_pretrained(tmp_path)
    loaded = SparseDiTTransformer2DModel.from_pretrained(tmp_path, torch_dtype=dtype)
    for name, parameter in loaded.named_parameters():
        assert parameter.dtype == (torch.float32 if "router" in name else dtype), name
    assert relative_error(run(loaded, cast(inputs, dtype)), run(model, inputs)) < 0.2


def test_everything_that_is_learned_is_in_the_file_and_nothing_else(tmp_path):
    model = toy_sparse()
    model.save_pretrained(tmp_path)
    (path,) = tmp_path.glob("*.safetensors")
    assert load_file(path).keys() == dict(model.named_parameters()).keys() == model.state_dict().keys()


def test_a_missing_tensor_is_named(tmp_path):
    toy_sparse().save_pretrained(tmp_path)
    (path,) = tmp_path.glob("*.safetensors")
    weights = load_file(path)
    del weights["transformer_blocks.1.ff.experts_in"]
    save_file(weights, path)
    with pytest.raises(ValueError, match=r"missing \(1\):\s+transformer_blocks\.1\.ff\.experts_in"):
        SparseDiTTransformer2DModel.from_pretrained(tmp_path)


def test_auto_model_finds_the_class(tmp_path):
    import localdit.pipelines  # noqa: F401  (registers the names with diffusers)

    model, inputs = toy_sparse(), sparse_inputs()
    model.save_pretrained(tmp_path)
    loaded = AutoModel.from_pretrained(str(tmp_path))
    assert type(loaded) is SparseDiTTransformer2DModel
    assert torch.equal(run(loaded, inputs), run(model, inputs))


def test_a_deep_copy_is_a_model_of_its_own():
    model, inputs = toy_sparse(), sparse_inputs()
    copy = deepcopy(model)
    assert torch.equal(run(copy, inputs), run(model, inputs))
    nn.init.zeros_(copy.proj_out.weight)
    assert not torch.equal(run(copy, inputs), run(model, inputs))


def test_a_model_built_without_memory_and_then_filled_runs():
    model, inputs = toy_sparse(), sparse_inputs((3, 5))
    with torch.device("meta"):
        empty = SparseDiTTransformer2DModel(**TOY)
    empty.load_state_dict(model.state_dict(), assign=True)
    assert torch.equal(run(empty.eval(), inputs), run(model, inputs))


def test_a_dry_run_on_fake_tensors_works():
    """Tools that plan memory or count operations run the model on tensors without data."""
    with FakeTensorMode():
        model = SparseDiTTransformer2DModel(**TOY).train()
        assert model(**sparse_inputs((3, 5)), mask_ratio=0.5).sample.shape == (2, 4, 6, 10)


# --- Memory


def test_layerwise_casting_stores_float8_and_stays_near():
    """Of the linear layers alone: the experts' tensors are left as they are."""
    model, inputs = toy_sparse(), sparse_inputs((3, 5))
    plain = run(model, inputs)
    model.enable_layerwise_casting(storage_dtype=torch.float8_e4m3fn, compute_dtype=torch.float32)
    kept = ("norm", "adaln", "patch_embed", "time_embed", "router", "experts")
    assert {p.dtype for name, p in model.named_parameters() if any(k in name for k in kept)} == {
        torch.float32
    }
    assert model.transformer_blocks[0].attn1.to_q.weight.dtype == torch.float8_e4m3fn
    prediction = run(model, inputs)
    assert prediction.isfinite().all()
    assert 0 < relative_error(prediction, plain) < 0.3
    assert torch.equal(run(model, encoded(model, inputs)), prediction)


@pytest.mark.parametrize("config", CONFIGS, ids=str)
@pytest.mark.parametrize(
    "kwargs",
    [{"offload_type": "block_level", "num_blocks_per_group": 2}, {"offload_type": "leaf_level"}],
    ids=str,
)
def test_group_offloading_changes_no_bit(kwargs, config):
    model, inputs = toy_sparse(**config), sparse_inputs((3, 5))
    plain = run(model, inputs)
    model.enable_group_offload(onload_device=torch.device("cpu"), **kwargs)
    assert torch.equal(run(model, inputs), plain)
    assert torch.equal(run(model, encoded(model, inputs)), plain)


@pytest.mark.parametrize("level", ["block_level", "leaf_level"])
def test_group_offloading_to_disk_changes_no_bit(level, tmp_path):
    """On the disk nothing is left of a weight that a forward pass reads outside the layer that fetches it."""
    model, inputs = toy_sparse(), sparse_inputs((3, 5))
    plain = run(model, inputs)
    model.enable_group_offload(
        onload_device=torch.device("cpu"),
        offload_to_disk_path=str(tmp_path),
        offload_type=level,
        num_blocks_per_group=1,
    )
    assert torch.equal(run(model, inputs), plain)


@pytest.mark.parametrize("config", CONFIGS, ids=str)
def test_sequential_offloading_changes_no_bit(config):
    """Between its calls a layer is on the meta device: no weight may be read outside its module's forward."""
    model, inputs = toy_sparse(**config), sparse_inputs((3, 5))
    plain = run(model, inputs)
    cpu_offload(model, execution_device=torch.device("cpu"))
    assert torch.equal(run(model, inputs), plain)
    assert torch.equal(run(model, encoded(model, inputs)), plain)


def test_the_declarations_that_offloading_and_compilation_read_name_the_block():
    cls = SparseDiTTransformer2DModel
    assert cls._no_split_modules == cls._repeated_blocks == ["SparseDiTBlock"]
    assert cls._supports_gradient_checkpointing
    assert {type(block).__name__ for block in toy_sparse()._blocks} == {"SparseDiTBlock"}


# --- Attention processors and backends


@pytest.fixture
def _default_backend() -> Iterator[None]:
    """Diffusers makes the last backend that was set for any model the default of all: put it back."""
    before = _AttentionBackendRegistry._active_backend
    yield
    _AttentionBackendRegistry.set_active_backend(before)


@pytest.mark.usefixtures("_default_backend")
@pytest.mark.parametrize("backend", ["native", "_native_math"])
def test_every_attention_follows_the_backend(backend):
    model, inputs = toy_sparse(), sparse_inputs((3, 5))
    plain = run(model, inputs)
    model.set_attention_backend(backend)
    chosen = {processor._attention_backend for processor in model.attn_processors.values()}
    assert chosen == {AttentionBackendName(backend)}
    assert relative_error(run(model, inputs), plain) < 1e-5
    model.reset_attention_backend()
    assert {processor._attention_backend for processor in model.attn_processors.values()} == {None}


def test_every_attention_has_a_processor_that_can_be_exchanged():
    model, inputs = toy_sparse(), sparse_inputs()
    plain, processors = run(model, inputs), model.attn_processors
    assert processors.keys() == {f"{block}.attn{k}.processor" for block in BLOCKS for k in (1, 2)} | {
        "caption_refiner.attn1.processor"
    }

    class Counting(SparseDiTAttnProcessor):
        calls = 0

        def __call__(self, *args: Any, **kwargs: Any) -> Any:
            type(self).calls += 1
            return super().__call__(*args, **kwargs)

    model.set_attn_processor(
        {key: Counting() if ".attn1." in key else SparseDiTCrossAttnProcessor() for key in processors}
    )
    assert torch.equal(run(model, inputs), plain)
    assert Counting.calls == 7
    model.set_attn_processor(dict(processors))
    assert torch.equal(run(model, inputs), plain)
    assert Counting.calls == 7


@pytest.mark.parametrize("config", CONFIGS, ids=str)
def test_fusing_the_projections_changes_no_number(config):
    model, inputs = toy_sparse(**config), sparse_inputs((3, 5))
    plain = run(model, inputs)
    model.fuse_qkv_projections()
    assert all(block.attn1.fused_projections and block.attn2.fused_projections for block in model._blocks)
    with torch.no_grad():
        for block in model._blocks:  # the unfused ones are no longer read
            block.attn1.to_k.weight.mul_(-1)
    assert relative_error(run(model, inputs), plain) < 1e-5
    with torch.no_grad():
        for block in model._blocks:
            block.attn1.to_k.weight.mul_(-1)
    model.unfuse_qkv_projections()
    assert torch.equal(run(model, inputs), plain)


# --- Compilation


def test_the_whole_forward_compiles_to_one_graph_for_every_size():
    model = toy_sparse(**COMPILED)
    compiled = torch.compile(model, fullgraph=True, backend="eager")
    for grid in [(4, 6), (3, 5)]:
        inputs = sparse_inputs(grid)
        assert relative_error(run(compiled, inputs), run(model, inputs)) < 1e-5


def test_dynamic_compilation_compiles_once_for_many_sizes():
    """No two of the first call's sizes are equal by chance, which the compiler would take for a rule."""
    counter = CompileCounterWithBackend("eager")
    model = toy_sparse(**COMPILED)
    compiled = torch.compile(model, fullgraph=True, dynamic=True, backend=counter)
    for grid in [(10, 14), (18, 6), (22, 26)]:
        inputs = sparse_inputs(grid, batch=3)
        assert relative_error(run(compiled, inputs), run(model, inputs)) < 1e-5
    assert counter.frame_count == 1


def test_a_compiled_model_takes_an_encoded_caption():
    model, inputs = toy_sparse(**COMPILED), sparse_inputs((3, 5))
    compiled = torch.compile(model, fullgraph=True, backend="eager")
    assert relative_error(run(compiled, encoded(model, inputs)), run(model, inputs)) < 1e-5


def test_a_compiled_model_gives_the_same_gradients_with_dropped_tokens():
    model, inputs = toy_sparse(**COMPILED).train(), sparse_inputs((3, 5))
    inputs |= {"mask_ratio": 0.5, "mask_noise": torch.rand(2, 15)}
    gradients = []
    for call in (model, torch.compile(model, fullgraph=True, backend="aot_eager")):
        model.zero_grad()
        call(**inputs).sample.square().mean().backward()
        gradients.append({name: p.grad.clone() for name, p in model.named_parameters()})
    for name, gradient in gradients[0].items():
        assert relative_error(gradients[1][name], gradient) < 1e-5, name


def test_the_blocks_compile_by_themselves():
    """One graph for each shape of a block, of which the compiler takes eight unless told to take more."""
    alike = {"mixer_num_layers": 0, "num_layers": 3, "attention_ratio": (1.0, 1.0), "ffn_ratio": (2.0, 2.0)}
    model, inputs = toy_sparse(**alike), sparse_inputs((3, 5))
    plain = run(model, inputs)
    counter = CompileCounterWithBackend("eager")
    model.compile_repeated_blocks(fullgraph=True, backend=counter)
    assert relative_error(run(model, inputs), plain) < 1e-5
    assert counter.frame_count == 2  # the first and the last are alike, the one between has experts


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore:`torch.jit.script")  # inductor's own imports
def test_inductor_computes_the_same():
    model = toy_sparse(**COMPILED)
    compiled = torch.compile(model, fullgraph=True)
    for grid in [(4, 4), (3, 5)]:
        inputs = sparse_inputs(grid)
        assert relative_error(run(compiled, inputs), run(model, inputs)) < 1e-5


def test_the_model_exports():
    """`torch.export` traces the forward pass without running its Python again."""
    model, inputs = toy_sparse(**COMPILED), sparse_inputs((3, 5))
    program = torch.export.export(model, (), inputs | {"return_dict": False}, strict=False)
    (sample,) = program.module()(**inputs, return_dict=False)
    assert relative_error(sample.detach(), run(model, inputs)) < 1e-5


# --- LoRA


def with_lora(model: Any, *, seed: int = 3) -> Any:
    """Put an adapter of rank 3 on every attention, with both of its matrices speaking."""
    model.add_adapter(LoraConfig(r=3, lora_alpha=6, target_modules=["to_q", "to_k", "to_v", "to_out.0"]))
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "lora_" in name:
                parameter.copy_(0.2 * torch.randn(parameter.shape, generator=generator))
    return model


def test_a_lora_can_be_added_scaled_saved_loaded_and_taken_off(tmp_path):
    model, inputs = toy_sparse(), sparse_inputs((3, 5))
    plain = run(model, inputs)
    adapted = run(with_lora(model), inputs)
    assert relative_error(adapted, plain) > 1e-2
    model.save_lora_adapter(tmp_path)
    half = run(model, inputs, attention_kwargs={"scale": 0.5})
    assert relative_error(half, plain) > 1e-3
    assert relative_error(run(model, inputs, attention_kwargs={"scale": 0.0}), plain) < 1e-6
    assert torch.equal(run(model, inputs), adapted)  # a scale holds for one call
    for kwargs in ({}, {"attention_kwargs": {"scale": 0.3}}):
        assert torch.equal(
            run(model, encoded(model, inputs, **kwargs), **kwargs), run(model, inputs, **kwargs)
        )
    model.unload_lora()
    assert torch.equal(run(model, inputs), plain)
    model.load_lora_adapter(tmp_path, prefix=None, weight_name="pytorch_lora_weights.safetensors")
    assert torch.equal(run(model, inputs), adapted)


def test_a_lora_adapts_every_attention_of_every_block(tmp_path):
    model = with_lora(toy_sparse())
    model.save_lora_adapter(tmp_path)
    (path,) = tmp_path.glob("*.safetensors")
    layers = {key.rpartition(".lora_")[0] for key in load_file(path)}
    attentions = [f"{block}.attn{k}" for block in BLOCKS for k in (1, 2)] + ["caption_refiner.attn1"]
    assert layers == {
        f"{attn}.{layer}" for attn in attentions for layer in ("to_q", "to_k", "to_v", "to_out.0")
    }


def test_training_a_lora_leaves_the_model_alone():
    model, inputs = toy_sparse(), sparse_inputs((3, 5))
    model.requires_grad_(False)
    with_lora(model).train()
    model(**inputs, mask_ratio=0.5).sample.square().mean().backward()
    for name, parameter in model.named_parameters():
        assert (parameter.grad is not None) == ("lora_" in name), name
        assert parameter.grad is None or parameter.grad.abs().max() > 0, name


def test_a_lora_can_reach_the_experts():
    """By peft's `target_parameters`: no linear layer holds them."""
    model, inputs = toy_sparse(), sparse_inputs((3, 5))
    plain = run(model, inputs)
    model.add_adapter(LoraConfig(r=2, target_modules=[], target_parameters=["ff.experts_in"]))
    adapted = [name for name, _ in model.named_parameters() if "lora_" in name]
    assert adapted
    assert all(".ff." in name for name in adapted)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "lora_" in name:
                parameter.normal_()
    assert relative_error(run(model, inputs), plain) > 1e-2


# --- Caches


@pytest.fixture
def _registered() -> None:
    """Importing the pipelines tells diffusers about the block, once, for its caches."""
    import localdit.pipelines  # noqa: F401


CACHES = {
    "first block": lambda: FirstBlockCacheConfig(threshold=0.5),
    "pyramid": lambda: PyramidAttentionBroadcastConfig(
        spatial_attention_block_skip_range=2, current_timestep_callback=lambda: 500
    ),
}


@pytest.mark.usefixtures("_registered")
@pytest.mark.parametrize("cache", CACHES)
def test_a_cache_acts_while_it_is_on_and_leaves_nothing_behind(cache):
    model, inputs = toy_sparse(), sparse_inputs()

    def steps() -> list[Tensor]:
        predictions = []
        for i in range(4):
            now = {"hidden_states": inputs["hidden_states"] * (1 + 0.02 * i), "timestep": 1 - 0.01 * i}
            with model.cache_context("cond"):
                predictions.append(run(model, inputs | now))
        return predictions

    plain = steps()
    model.enable_cache(CACHES[cache]())
    cached = steps()
    assert torch.equal(cached[0], plain[0])  # there is nothing to reuse yet
    assert any(not torch.equal(c, p) for c, p in zip(cached, plain))  # and here there was
    model.disable_cache()
    for after, before in zip(steps(), plain):
        assert torch.equal(after, before)


# --- Subclasses


class GatedBlock(SparseDiTBlock):
    """A block that learns, channel by channel, how much of itself to use."""

    def __init__(self, config: Any, shape: BlockShape):
        super().__init__(config, shape)
        self.gate = nn.Parameter(torch.ones(shape.dim))

    def forward(self, hidden_states: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        return torch.lerp(hidden_states, super().forward(hidden_states, *args, **kwargs), self.gate)


class GatedSparseDiT(SparseDiTTransformer2DModel):
    block_class = GatedBlock


class PosedBlock(SparseDiTBlock):
    """A block that also hears of a pose, (B, pose_channels)."""

    def __init__(self, config: Any, shape: BlockShape):
        super().__init__(config, shape)
        self.pose = nn.Linear(config.pose_channels, shape.dim)

    def forward(self, hidden_states: Tensor, *args: Any, pose: Tensor | None = None, **kwargs: Any) -> Tensor:
        if pose is not None:
            hidden_states = hidden_states + self.pose(pose)[:, None]
        return super().forward(hidden_states, *args, **kwargs)


class PosedSparseDiT(SparseDiTTransformer2DModel):
    block_class = PosedBlock

    @register_to_config
    def __init__(self, pose_channels: int = 3, **kwargs: Any):
        super().__init__(**kwargs)


class SharpProcessor(SparseDiTAttnProcessor):
    """Attention whose output counts twice."""

    def __call__(self, attn: SparseDiTAttention, *args: Any, **kwargs: Any) -> Tensor:
        return 2 * super().__call__(attn, *args, **kwargs)


class SharpBlock(SparseDiTBlock):
    def __init__(self, config: Any, shape: BlockShape):
        super().__init__(config, shape)
        self.attn1.set_processor(SharpProcessor())


class SharpSparseDiT(SparseDiTTransformer2DModel):
    block_class = SharpBlock


SUBCLASSES = {
    "block": (GatedSparseDiT, {}),
    "config field and input": (PosedSparseDiT, {"pose_channels": 5}),
    "processor": (SharpSparseDiT, {}),
}
every_subclass = pytest.mark.parametrize(("cls", "config"), SUBCLASSES.values(), ids=SUBCLASSES)


def subclass_inputs(config: dict[str, Any]) -> dict[str, Any]:
    inputs = sparse_inputs((3, 5))
    if "pose_channels" in config:
        inputs["attention_kwargs"] = {"pose": torch.randn(2, 5, generator=torch.Generator().manual_seed(7))}
    return inputs


@every_subclass
def test_a_subclass_computes_something_of_its_own_and_is_saved_and_loaded(cls, config, tmp_path):
    model, parent, inputs = toy_sparse(cls, **config), toy_sparse(), subclass_inputs(config)
    result = model.load_state_dict(parent.state_dict(), strict=False)
    assert not result.unexpected_keys
    assert all(".gate" in key or ".pose." in key for key in result.missing_keys)
    plain = {key: value for key, value in inputs.items() if key != "attention_kwargs"}
    assert relative_error(run(model, inputs), run(parent, plain)) > 1e-3
    model.save_pretrained(tmp_path)
    saved = json.loads((tmp_path / "config.json").read_text())
    assert saved["_class_name"] == cls.__name__
    assert saved.get("pose_channels") == config.get("pose_channels")
    assert torch.equal(run(cls.from_pretrained(tmp_path), inputs), run(model, inputs))
    assert torch.equal(run(model, encoded(model, inputs)), run(model, inputs))


@every_subclass
def test_a_subclass_compiles_whole_and_block_by_block(cls, config):
    model = toy_sparse(cls, num_layers=1, mixer_num_layers=0, **config)
    inputs = subclass_inputs(config)
    plain = run(model, inputs)
    compiled = torch.compile(model, fullgraph=True, backend="eager")
    assert relative_error(run(compiled, inputs), plain) < 1e-5
    assert model._repeated_blocks == model._no_split_modules == [cls.block_class.__name__]
    model.compile_repeated_blocks(fullgraph=True, backend="eager")
    assert relative_error(run(model, inputs), plain) < 1e-5


@every_subclass
@pytest.mark.parametrize("level", ["block_level", "leaf_level", "sequential"])
def test_a_subclass_offloads(level, cls, config):
    model, inputs = toy_sparse(cls, **config), subclass_inputs(config)
    plain = run(model, inputs)
    if level == "sequential":
        cpu_offload(model, execution_device=torch.device("cpu"))
    else:
        model.enable_group_offload(torch.device("cpu"), offload_type=level, num_blocks_per_group=1)
    assert torch.equal(run(model, inputs), plain)


@every_subclass
def test_a_subclass_takes_a_lora(cls, config):
    model, inputs = toy_sparse(cls, **config), subclass_inputs(config)
    plain = run(model, inputs)
    model.add_adapter(LoraConfig(r=2, target_modules=["to_q", "to_out.0"]))
    redraw(model)
    assert relative_error(run(model, inputs), plain) > 1e-2
    scaled = inputs | {"attention_kwargs": {"scale": 0.0} | inputs.get("attention_kwargs", {})}
    unscaled = run(model, scaled)
    model.unload_lora()
    assert relative_error(unscaled, run(model, inputs)) < 1e-6


@every_subclass
def test_a_subclass_trains_with_gradient_checkpointing(cls, config):
    model, inputs = toy_sparse(cls, **config).train(), subclass_inputs(config)
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


def test_an_untrained_subclass_is_initialised_like_its_parent():
    model = GatedSparseDiT(**TOY)
    assert all((block.gate == 1).all() for block in model._blocks)
    assert not any(block.adaln.weight.any() for block in model._blocks)
    assert not model.proj_out.weight.any()


@pytest.mark.gpu
def test_the_gpu_computes_what_the_cpu_does():
    model, inputs = toy_sparse(), sparse_inputs((3, 5))
    plain = run(model, inputs)
    on_gpu = {key: value.cuda() for key, value in inputs.items()}
    assert relative_error(run(model.cuda(), on_gpu).cpu(), plain) < 1e-4  # its matrix products may round more
