"""The tools of diffusers, peft and torch on every architecture, each compared with the plain model."""

import json
from collections.abc import Callable
from copy import deepcopy
from typing import Any

import pytest
import torch
from accelerate import cpu_offload
from architectures import (
    ARCHITECTURES,
    PROJECTIONS,
    VARIANTS,
    Toy,
    each,
    encoded,
    forms,
    gradients,
    steps,
    with_lora,
)
from diffusers import (
    AutoModel,
    FasterCacheConfig,
    FirstBlockCacheConfig,
    PyramidAttentionBroadcastConfig,
)
from diffusers.models.attention_dispatch import AttentionBackendName
from pixeldit_toys import cast
from safetensors.torch import load_file
from subclasses import SUBCLASSES
from torch import nn
from torch._dynamo.testing import CompileCounterWithBackend
from torch._subclasses.fake_tensor import FakeTensorMode
from toys import relative_error, run

import localdit.pipelines  # noqa: F401  (tells diffusers of the models and their blocks)

pytestmark = [
    pytest.mark.usefixtures("fresh_dynamo"),
    # Dynamo's own, wherever it meets an autograd.Function.
    pytest.mark.filterwarnings("ignore:.*autograd.function.Function.* should not be instantiated"),
]


def blocks(model: Any) -> list[Any]:
    return [block for name, part in model.named_children() if name.endswith("_blocks") for block in part]


# --- Saving and loading


@each(VARIANTS | SUBCLASSES)
def test_a_saved_model_loads_with_the_same_config_and_the_same_bits(toy, tmp_path):
    """Everything that is learned is in the file, and nothing else."""
    model = toy.model()
    inputs = toy.inputs(model)
    plain = run(model, inputs)
    model.save_pretrained(tmp_path)
    (path,) = tmp_path.glob("*.safetensors")
    assert load_file(path).keys() == dict(model.named_parameters()).keys() == model.state_dict().keys()
    loaded = toy.cls.from_pretrained(tmp_path)
    assert type(loaded) is toy.cls
    assert not loaded.training
    for given in forms(loaded, inputs):
        assert torch.equal(run(loaded, given), plain)
    loaded.save_pretrained(tmp_path / "again")
    first, second = (
        json.loads((path / "config.json").read_text()) for path in (tmp_path, tmp_path / "again")
    )
    second.pop("_name_or_path")
    assert first == second
    assert first["_class_name"] == toy.cls.__name__
    assert {name: first[name] for name in toy.config} == json.loads(json.dumps(toy.config))


@each(ARCHITECTURES)
def test_a_model_saved_in_shards_loads_with_the_same_bits(toy, tmp_path):
    model = toy.model()
    inputs = toy.inputs(model)
    model.save_pretrained(tmp_path, max_shard_size=model.get_memory_footprint() // 4)
    assert len(list(tmp_path.glob("*.safetensors"))) > 2
    assert torch.equal(run(toy.cls.from_pretrained(tmp_path), inputs), run(model, inputs))


@each(ARCHITECTURES)
def test_auto_model_finds_the_class(toy, tmp_path):
    model = toy.model()
    inputs = toy.inputs(model)
    model.save_pretrained(tmp_path)
    loaded = AutoModel.from_pretrained(str(tmp_path))
    assert type(loaded) is toy.cls
    assert torch.equal(run(loaded, inputs), run(model, inputs))


@each(ARCHITECTURES)
def test_a_deep_copy_is_a_model_of_its_own(toy):
    model = toy.model()
    inputs, copy = toy.inputs(model), deepcopy(model)
    assert torch.equal(run(copy, inputs), run(model, inputs))
    nn.init.zeros_(copy.proj_out.weight)
    assert not torch.equal(run(copy, inputs), run(model, inputs))


@each(ARCHITECTURES)
def test_a_model_built_without_memory_and_then_filled_runs(toy):
    """`from_pretrained` builds on the meta device: nothing that the forward pass reads may stay there."""
    model = toy.model()
    inputs = toy.inputs(model)
    with torch.device("meta"):
        empty = toy.cls.from_config(model.config)
    empty.load_state_dict(model.state_dict(), assign=True)
    assert torch.equal(run(empty.eval(), inputs), run(model, inputs))


@each(ARCHITECTURES)
def test_a_dry_run_on_fake_tensors_leaves_nothing_behind(toy):
    """Tools that plan memory or count operations run the model on tensors without data."""
    model = toy.model()
    inputs = toy.inputs(model)
    plain = run(model, inputs)
    with FakeTensorMode():
        dry = toy.cls.from_config(model.config)
        assert run(dry, toy.inputs(dry)).shape == plain.shape
    assert torch.equal(run(model, inputs), plain)


# --- Precision


@each(VARIANTS)
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_precision_loads_runs_and_stays_near(toy, dtype, tmp_path):
    model = toy.model()
    inputs = toy.inputs(model)
    plain = run(model, inputs)
    model.save_pretrained(tmp_path)
    loaded = toy.cls.from_pretrained(tmp_path, torch_dtype=dtype)
    for name, parameter in loaded.named_parameters():
        kept = any(part in name for part in toy.whole)
        assert parameter.dtype == (torch.float32 if kept else dtype), name
    half = run(loaded, cast(inputs, dtype))
    assert half.dtype == dtype
    assert half.isfinite().all()
    assert relative_error(half, plain) < toy.half
    if not toy.whole:
        assert torch.equal(run(model.to(dtype), cast(inputs, dtype)), half)


@each(VARIANTS)
def test_layerwise_casting_stores_float8_and_stays_near(toy):
    model = toy.model()
    inputs = toy.inputs(model)
    plain, size = run(model, inputs), model.get_memory_footprint()
    model.enable_layerwise_casting(storage_dtype=torch.float8_e4m3fn, compute_dtype=torch.float32)
    for name, parameter in model.named_parameters():
        assert parameter.dtype == torch.float32 or not any(part in name for part in toy.float8_whole), name
    assert model.transformer_blocks[0].attn1.to_q.weight.dtype == torch.float8_e4m3fn
    error, share = toy.float8
    assert model.get_memory_footprint() < share * size
    prediction = run(model, inputs)
    assert prediction.isfinite().all()
    assert 0 < relative_error(prediction, plain) < error
    for given in forms(model, inputs):
        assert torch.equal(run(model, given), prediction)


# --- Offloading


@each(VARIANTS | SUBCLASSES)
@pytest.mark.parametrize("level", ["block_level", "leaf_level"])
def test_group_offloading_changes_no_bit(toy, level):
    model = toy.model()
    inputs = toy.inputs(model)
    plain = run(model, inputs)
    model.enable_group_offload(torch.device("cpu"), offload_type=level, num_blocks_per_group=1)
    for given in forms(model, inputs):
        assert torch.equal(run(model, given), plain)


@each(VARIANTS)
def test_group_offloading_of_two_blocks_at_a_time_changes_no_bit(toy):
    model = toy.model()
    inputs = toy.inputs(model)
    plain = run(model, inputs)
    model.enable_group_offload(torch.device("cpu"), offload_type="block_level", num_blocks_per_group=2)
    for given in forms(model, inputs):
        assert torch.equal(run(model, given), plain)


@each(ARCHITECTURES)
@pytest.mark.parametrize("level", ["block_level", "leaf_level"])
def test_group_offloading_to_disk_changes_no_bit(toy, level, tmp_path):
    """On the disk nothing is left of a weight that a forward pass reads outside the layer that fetches it."""
    model = toy.model()
    inputs = toy.inputs(model)
    plain = run(model, inputs)
    model.enable_group_offload(
        onload_device=torch.device("cpu"),
        offload_to_disk_path=str(tmp_path),
        offload_type=level,
        num_blocks_per_group=1,
    )
    assert torch.equal(run(model, inputs), plain)


@each(VARIANTS | SUBCLASSES)
def test_sequential_offloading_changes_no_bit(toy):
    """Between its calls a layer is on the meta device: no weight may be read outside its module's forward."""
    model = toy.model()
    inputs = toy.inputs(model)
    plain = run(model, inputs)
    cpu_offload(model, execution_device=torch.device("cpu"))
    for given in forms(model, inputs):
        assert torch.equal(run(model, given), plain)


@each(ARCHITECTURES | SUBCLASSES)
def test_the_declarations_that_offloading_and_compilation_read_name_the_blocks(toy):
    model = toy.model()
    assert model._no_split_modules == model._repeated_blocks == list(toy.blocks)
    assert {type(block).__name__ for block in blocks(model)} == set(toy.blocks)
    assert toy.cls._supports_gradient_checkpointing


# --- Attention processors and backends


@pytest.mark.usefixtures("default_backend")
@each(VARIANTS)
@pytest.mark.parametrize("backend", ["native", "_native_math"])
def test_every_attention_follows_the_backend(toy, backend):
    model = toy.model()
    inputs = toy.inputs(model)
    plain = run(model, inputs)
    model.set_attention_backend(backend)
    chosen = {processor._attention_backend for processor in model.attn_processors.values()}
    assert chosen == {AttentionBackendName(backend)}
    assert relative_error(run(model, inputs), plain) < 1e-5
    model.reset_attention_backend()
    assert {processor._attention_backend for processor in model.attn_processors.values()} == {None}


@each(ARCHITECTURES)
def test_every_attention_has_a_processor_that_can_be_exchanged(toy):
    model = toy.model()
    inputs = toy.inputs(model)
    plain, processors = run(model, inputs), model.attn_processors
    assert processors.keys() == {f"{name}.processor" for name in toy.attentions}
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
    model.set_attn_processor(dict(processors))
    assert model.attn_processors == processors
    assert torch.equal(run(model, inputs), plain)
    assert len(calls) == len(processors)


@each(VARIANTS)
def test_fusing_the_projections_changes_no_number(toy):
    model = toy.model()
    inputs = toy.inputs(model)
    plain = run(model, inputs)
    model.fuse_qkv_projections()
    assert all(block.attn1.fused_projections for block in blocks(model))
    with torch.no_grad():
        for block in blocks(model):  # the unfused ones are no longer read
            block.attn1.to_k.weight.mul_(-1)
    assert relative_error(run(model, inputs), plain) < 1e-5
    with torch.no_grad():
        for block in blocks(model):
            block.attn1.to_k.weight.mul_(-1)
    model.unfuse_qkv_projections()
    assert torch.equal(run(model, inputs), plain)


# --- Compilation


@each(ARCHITECTURES | SUBCLASSES)
def test_the_whole_forward_compiles_to_one_graph_for_every_size(toy):
    model = toy.model(**toy.small)
    compiled = torch.compile(model, fullgraph=True, backend="eager")
    for grid in toy.grids:
        inputs = toy.inputs(model, grid)
        assert relative_error(run(compiled, inputs), run(model, inputs)) < 1e-5
    if toy.compiled_extra:
        inputs |= toy.compiled_extra
        assert relative_error(run(compiled, inputs), run(model, inputs)) < 1e-5


@each({name: toy for name, toy in ARCHITECTURES.items() if hasattr(toy.cls, "encode_text")})
def test_a_compiled_model_takes_an_encoded_caption(toy):
    model = toy.model(**toy.small)
    inputs = toy.inputs(model)
    compiled = torch.compile(model, fullgraph=True, backend="eager")
    assert relative_error(run(compiled, encoded(model, inputs)), run(model, inputs)) < 1e-5


@each(ARCHITECTURES)
def test_dynamic_compilation_compiles_once_for_many_sizes(toy):
    counter = CompileCounterWithBackend("eager")
    model = toy.model(**toy.small)
    compiled = torch.compile(model, fullgraph=True, dynamic=True, backend=counter)
    for grid in toy.dynamic_grids:
        inputs = toy.inputs(model, grid, batch=3)
        assert relative_error(run(compiled, inputs), run(model, inputs)) < 1e-5
    assert counter.frame_count == 1


@each(
    {name: toy for name, toy in VARIANTS.items() if name.startswith("local_dit")} | ARCHITECTURES | SUBCLASSES
)
def test_the_repeated_blocks_compile_by_themselves(toy):
    """One graph serves all blocks of a kind: the compiler gives up after eight."""
    model = toy.model(**toy.repeated)
    inputs = toy.inputs(model, (3, 5))
    plain = run(model, inputs)
    counter = CompileCounterWithBackend("eager")
    model.compile_repeated_blocks(fullgraph=True, backend=counter)
    assert relative_error(run(model, inputs), plain) < 1e-5
    assert counter.frame_count == toy.graphs


@each(ARCHITECTURES)
def test_the_model_exports(toy):
    """`torch.export` traces the forward pass without running its Python again."""
    model = toy.model(**toy.small)
    inputs = toy.inputs(model)
    program = torch.export.export(model, (), inputs | {"return_dict": False}, strict=False)
    (sample,) = program.module()(**inputs, return_dict=False)
    assert relative_error(sample.detach(), run(model, inputs)) < 1e-5


# --- LoRA


def scaled(inputs: dict[str, Any], scale: float) -> dict[str, Any]:
    return inputs | {"attention_kwargs": inputs.get("attention_kwargs", {}) | {"scale": scale}}


@each(VARIANTS | SUBCLASSES)
def test_a_lora_can_be_added_scaled_saved_loaded_fused_and_taken_off(toy, tmp_path):
    model = toy.model()
    inputs = toy.inputs(model)
    plain = run(model, inputs)
    adapted = run(with_lora(model, toy.lora), inputs)
    assert relative_error(adapted, plain) > 1e-2
    model.save_lora_adapter(tmp_path)

    half = run(model, scaled(inputs, 0.5))
    assert 1e-3 < relative_error(half, plain) < relative_error(adapted, plain)
    assert relative_error(run(model, scaled(inputs, 0.0)), plain) < 1e-6
    for given in forms(model, scaled(inputs, 0.5), attention_kwargs={"scale": 0.5}):
        assert torch.equal(run(model, given), half)
    for given in forms(model, inputs):  # a scale holds for one call
        assert torch.equal(run(model, given), adapted)
    model.set_adapters("default", 0.5)
    assert relative_error(run(model, inputs), half) < 1e-5

    model.unload_lora()
    assert torch.equal(run(model, inputs), plain)
    model.load_lora_adapter(tmp_path, prefix=None, weight_name="pytorch_lora_weights.safetensors")
    assert torch.equal(run(model, inputs), adapted)
    model.disable_lora()
    assert torch.equal(run(model, inputs), plain)
    model.enable_lora()
    model.fuse_lora()
    model.unload_lora()
    assert relative_error(run(model, inputs), adapted) < 1e-5


@each(ARCHITECTURES)
def test_a_lora_adapts_every_attention_of_every_block(toy, tmp_path):
    model = with_lora(toy.model())
    model.save_lora_adapter(tmp_path)
    (path,) = tmp_path.glob("*.safetensors")
    layers = {key.rpartition(".lora_")[0] for key in load_file(path)}
    assert layers == {f"{attention}.{layer}" for attention in toy.attentions for layer in PROJECTIONS}


@each(ARCHITECTURES)
def test_training_a_lora_leaves_the_model_alone(toy):
    model = toy.model()
    inputs = toy.inputs(model) | toy.training
    model.requires_grad_(False)
    with_lora(model, toy.lora).train()
    model(**inputs).sample.square().mean().backward()
    for name, parameter in model.named_parameters():
        assert (parameter.grad is not None) == ("lora_" in name), name
        assert parameter.grad is None or parameter.grad.abs().max() > 0, name


# --- Training


@each(ARCHITECTURES | SUBCLASSES)
def test_gradient_checkpointing_changes_no_bit_and_every_parameter_that_is_read_learns(toy):
    model = toy.model(**toy.still).train()
    inputs = toy.inputs(model)
    plain = gradients(model, inputs)
    model.enable_gradient_checkpointing()
    checkpointed = gradients(model, inputs)
    for name, gradient in plain.items():
        assert (gradient.abs().max() > 0) == (not name.startswith(toy.unread)), name
        assert torch.equal(checkpointed[name], gradient), name


# --- Caches


CACHES: dict[str, Callable[[], Any]] = {
    "first block": lambda: FirstBlockCacheConfig(threshold=1e9),
    "pyramid": lambda: PyramidAttentionBroadcastConfig(
        spatial_attention_block_skip_range=2, current_timestep_callback=lambda: 500
    ),
    "pyramid of both": lambda: PyramidAttentionBroadcastConfig(
        spatial_attention_block_skip_range=2,
        cross_attention_block_skip_range=3,
        current_timestep_callback=lambda: 500,
    ),
    "faster": lambda: FasterCacheConfig(
        current_timestep_callback=lambda: 500, tensor_format="BCHW", attention_weight_callback=lambda _: 0.3
    ),
}


@pytest.mark.filterwarnings("ignore:torch.meshgrid")  # inside FasterCache
@pytest.mark.parametrize(
    ("toy", "cache"),
    [
        pytest.param(toy, cache, id=f"{name}-{cache}")
        for name, toy in ARCHITECTURES.items()
        for cache in toy.caches
    ],
)
def test_a_cache_acts_while_it_is_on_and_leaves_nothing_behind(toy: Toy, cache):
    model = toy.model()
    plain = steps(toy, model)
    for _ in range(2):
        model.enable_cache(CACHES[cache]())
        assert model.is_cache_enabled
        cached = steps(toy, model)
        assert torch.equal(cached[0], plain[0])  # there is nothing to reuse yet
        assert all(prediction.isfinite().all() for prediction in cached)
        assert any(not torch.equal(c, p) for c, p in zip(cached, plain))  # and here there was
        assert max(relative_error(c, p) for c, p in zip(cached, plain)) < 0.5
        model.disable_cache()
        assert not model.is_cache_enabled
        for after, before in zip(steps(toy, model), plain):
            assert torch.equal(after, before)


@each(ARCHITECTURES)
def test_a_first_block_cache_of_threshold_zero_skips_nothing(toy):
    model = toy.model()
    plain = steps(toy, model)
    model.enable_cache(FirstBlockCacheConfig(threshold=0.0))
    for cached, expected in zip(steps(toy, model), plain):
        assert torch.equal(cached, expected)


# --- Moving


@pytest.mark.gpu
@each(VARIANTS)
def test_the_gpu_computes_what_the_cpu_does(toy):
    model = toy.model()
    inputs = toy.inputs(model)
    plain = run(model, inputs)
    on_gpu = torch.utils._pytree.tree_map_only(torch.Tensor, lambda tensor: tensor.cuda(), inputs)
    assert relative_error(run(model.cuda(), on_gpu).cpu(), plain) < 1e-4  # its matrix products may round more
