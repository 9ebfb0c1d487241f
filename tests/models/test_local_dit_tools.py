"""The tools of diffusers, peft and torch on the LocalDiT transformer, each compared with the plain model."""

import json
from collections.abc import Callable, Iterator
from copy import deepcopy
from typing import Any

import pytest
import torch
from accelerate import cpu_offload
from diffusers import (
    AutoModel,
    FasterCacheConfig,
    FirstBlockCacheConfig,
    PyramidAttentionBroadcastConfig,
)
from diffusers.models.attention_dispatch import AttentionBackendName, _AttentionBackendRegistry
from peft import LoraConfig
from safetensors.torch import load_file
from torch import nn
from torch._dynamo.testing import CompileCounterWithBackend
from toys import TOY, cast, relative_error, run, toy_inputs, toy_model

from localdit.models.local_dit import (
    LocalDiTAttnProcessor,
    LocalDiTCrossAttnProcessor,
    LocalDiTTransformer2DModel,
)

pytestmark = pytest.mark.usefixtures("fresh_dynamo")

CONFIGS: list[dict[str, Any]] = [{}, {"global_context": False}, {"full_attention_layers": (1, 3)}]
# Tracing takes seconds per block and shift, so models to be compiled whole have few.
COMPILED: dict[str, Any] = {"num_layers": 1, "window_size": 2}


@torch.no_grad()
def encoded(model: Any, inputs: dict[str, Any], **kwargs: Any) -> dict[str, Any]:
    """The inputs with the caption encoded by the model."""
    context = model.encode_text(inputs["encoder_hidden_states"], inputs["encoder_attention_mask"], **kwargs)
    return inputs | {"encoder_hidden_states": context, "encoder_attention_mask": None}


# --- Saving and loading


@pytest.mark.parametrize("config", CONFIGS, ids=str)
def test_a_saved_model_loads_with_the_same_config_and_the_same_bits(config, tmp_path):
    model, inputs = toy_model(**config), toy_inputs((5, 7))
    model.save_pretrained(tmp_path)
    loaded = LocalDiTTransformer2DModel.from_pretrained(tmp_path)
    assert not loaded.training
    assert torch.equal(run(loaded, inputs), run(model, inputs))
    loaded.save_pretrained(tmp_path / "again")
    first, second = (
        json.loads((path / "config.json").read_text()) for path in (tmp_path, tmp_path / "again")
    )
    second.pop("_name_or_path")
    assert first == second


def test_a_model_saved_in_shards_loads_with_the_same_bits(tmp_path):
    model, inputs = toy_model(), toy_inputs()
    model.save_pretrained(tmp_path, max_shard_size="50KB")
    assert len(list(tmp_path.glob("*.safetensors"))) > 2
    assert torch.equal(run(LocalDiTTransformer2DModel.from_pretrained(tmp_path), inputs), run(model, inputs))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_a_model_loads_in_another_dtype(dtype, tmp_path):
    model, inputs = toy_model(), toy_inputs()
    model.save_pretrained(tmp_path)
    loaded = LocalDiTTransformer2DModel.from_pretrained(tmp_path, torch_dtype=dtype)
    assert {p.dtype for p in loaded.parameters()} == {dtype}
    assert torch.equal(run(loaded, cast(inputs, dtype)), run(toy_model().to(dtype), cast(inputs, dtype)))


def test_a_variant_is_saved_beside_the_whole_precision(tmp_path):
    model = toy_model()
    model.save_pretrained(tmp_path)
    model.half().save_pretrained(tmp_path, variant="fp16")
    assert LocalDiTTransformer2DModel.from_pretrained(tmp_path).dtype == torch.float32
    half = LocalDiTTransformer2DModel.from_pretrained(tmp_path, variant="fp16", torch_dtype=torch.float16)
    assert all(torch.equal(half.state_dict()[key], tensor) for key, tensor in model.state_dict().items())


def test_everything_that_is_learned_is_in_the_file_and_nothing_else(tmp_path):
    model = toy_model()
    model.save_pretrained(tmp_path)
    (path,) = tmp_path.glob("*.safetensors")
    assert load_file(path).keys() == dict(model.named_parameters()).keys() == model.state_dict().keys()


def test_auto_model_finds_the_class(tmp_path):
    import localdit.pipelines  # noqa: F401  (registers the names with diffusers)

    model, inputs = toy_model(), toy_inputs()
    model.save_pretrained(tmp_path)
    loaded = AutoModel.from_pretrained(str(tmp_path))
    assert type(loaded) is LocalDiTTransformer2DModel
    assert torch.equal(run(loaded, inputs), run(model, inputs))


def test_a_deep_copy_is_a_model_of_its_own():
    model, inputs = toy_model(), toy_inputs()
    copy = deepcopy(model)
    assert torch.equal(run(copy, inputs), run(model, inputs))
    nn.init.zeros_(copy.proj_out.weight)
    assert not torch.equal(run(copy, inputs), run(model, inputs))


# --- Precision


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
@pytest.mark.parametrize("config", CONFIGS, ids=str)
def test_half_precision_runs_and_stays_near(config, dtype):
    model, inputs = toy_model(**config), toy_inputs((5, 7))
    whole = run(model, inputs)
    half = run(model.to(dtype), cast(inputs, dtype))
    assert half.dtype == dtype
    assert half.isfinite().all()
    assert relative_error(half, whole) < 0.05


@pytest.mark.parametrize("config", CONFIGS, ids=str)
def test_layerwise_casting_stores_float8_and_stays_near(config):
    model, inputs = toy_model(**config), toy_inputs((5, 7))
    plain, size = run(model, inputs), model.get_memory_footprint()
    model.enable_layerwise_casting(storage_dtype=torch.float8_e4m3fn, compute_dtype=torch.float32)
    kept = {
        p.dtype
        for name, p in model.named_parameters()
        if "norm" in name or "adaln" in name or "pos_embed" in name
    }
    assert kept == {torch.float32}
    assert model.transformer_blocks[0].attn1.to_q.weight.dtype == torch.float8_e4m3fn
    assert model.get_memory_footprint() < 0.7 * size
    prediction = run(model, inputs)
    assert prediction.isfinite().all()
    assert 0 < relative_error(prediction, plain) < 0.2


def test_an_encoded_caption_survives_layerwise_casting():
    model, inputs = toy_model(), toy_inputs((5, 7))
    model.enable_layerwise_casting(storage_dtype=torch.float8_e4m3fn, compute_dtype=torch.float32)
    plain = run(model, inputs)
    assert torch.equal(run(model, encoded(model, inputs)), plain)


# --- Offloading


@pytest.mark.parametrize("config", CONFIGS, ids=str)
@pytest.mark.parametrize(
    "kwargs",
    [{"offload_type": "block_level", "num_blocks_per_group": 2}, {"offload_type": "leaf_level"}],
    ids=str,
)
def test_group_offloading_changes_no_bit(kwargs, config):
    model, inputs = toy_model(**config), toy_inputs((5, 7))
    plain = run(model, inputs)
    model.enable_group_offload(onload_device=torch.device("cpu"), **kwargs)
    assert torch.equal(run(model, inputs), plain)
    assert torch.equal(run(model, encoded(model, inputs)), plain)


@pytest.mark.parametrize(
    "level",
    [{"offload_type": "block_level", "num_blocks_per_group": 1}, {"offload_type": "leaf_level"}],
    ids=str,
)
def test_group_offloading_to_disk_changes_no_bit(level, tmp_path):
    """On the disk nothing is left of a weight that a forward pass reads outside the layer that fetches it."""
    model, inputs = toy_model(), toy_inputs((5, 7))
    plain = run(model, inputs)
    model.enable_group_offload(onload_device=torch.device("cpu"), offload_to_disk_path=str(tmp_path), **level)
    assert torch.equal(run(model, inputs), plain)


@pytest.mark.parametrize("config", CONFIGS, ids=str)
def test_sequential_offloading_changes_no_bit(config):
    """Between its calls a layer is on the meta device: no weight may be read outside its module's forward."""
    model, inputs = toy_model(**config), toy_inputs((5, 7))
    plain = run(model, inputs)
    cpu_offload(model, execution_device=torch.device("cpu"))
    assert torch.equal(run(model, inputs), plain)
    assert torch.equal(run(model, encoded(model, inputs)), plain)


def test_the_declarations_that_offloading_and_compilation_read_name_the_block():
    cls = LocalDiTTransformer2DModel
    assert cls._no_split_modules == ["LocalDiTBlock"]
    assert cls._repeated_blocks == ["LocalDiTBlock"]
    assert cls._supports_gradient_checkpointing
    assert {type(block).__name__ for block in toy_model().transformer_blocks} == {"LocalDiTBlock"}
    assert set(cls._skip_layerwise_casting_patterns) >= {"pos_embed", "norm", "adaln_single"}


# --- Attention processors and backends


@pytest.fixture
def _default_backend() -> Iterator[None]:
    """Diffusers makes the last backend that was set for any model the default of all: put it back."""
    before = _AttentionBackendRegistry._active_backend
    yield
    _AttentionBackendRegistry.set_active_backend(before)


@pytest.mark.usefixtures("_default_backend")
@pytest.mark.parametrize("config", CONFIGS, ids=str)
@pytest.mark.parametrize("backend", ["native", "_native_math"])
def test_every_attention_follows_the_backend(backend, config):
    model, inputs = toy_model(**config), toy_inputs((5, 7))
    plain = run(model, inputs)
    model.set_attention_backend(backend)
    chosen = {processor._attention_backend for processor in model.attn_processors.values()}
    assert chosen == {AttentionBackendName(backend)}
    assert relative_error(run(model, inputs), plain) < 1e-5
    model.reset_attention_backend()
    assert {processor._attention_backend for processor in model.attn_processors.values()} == {None}


def test_every_attention_has_a_processor_that_can_be_exchanged():
    model, inputs = toy_model(), toy_inputs()
    plain, processors = run(model, inputs), model.attn_processors
    assert processors.keys() == {
        f"transformer_blocks.{i}.attn{k}.processor" for i in range(4) for k in (1, 2)
    }

    class Counting(LocalDiTAttnProcessor):
        calls = 0

        def __call__(self, *args: Any, **kwargs: Any) -> Any:
            type(self).calls += 1
            return super().__call__(*args, **kwargs)

    model.set_attn_processor(
        {key: Counting() if ".attn1." in key else LocalDiTCrossAttnProcessor() for key in processors}
    )
    assert torch.equal(run(model, inputs), plain)
    assert Counting.calls == 4
    model.set_attn_processor(dict(processors))
    assert model.attn_processors == processors
    assert torch.equal(run(model, inputs), plain)
    assert Counting.calls == 4


@pytest.mark.parametrize("config", CONFIGS, ids=str)
def test_fusing_the_projections_changes_no_number(config):
    model, inputs = toy_model(**config), toy_inputs((5, 7))
    plain = run(model, inputs)
    model.fuse_qkv_projections()
    assert all(block.attn1.fused_projections for block in model.transformer_blocks)
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


@pytest.mark.parametrize("config", [{}, {"full_attention_layers": (0,)}], ids=str)
def test_the_whole_forward_compiles_to_one_graph_for_every_size(config):
    model = toy_model(**COMPILED | config)
    compiled = torch.compile(model, fullgraph=True, backend="eager")
    for grid in [(8, 9), (5, 7)]:
        inputs = toy_inputs(grid)
        assert relative_error(run(compiled, inputs), run(model, inputs)) < 1e-5


def test_dynamic_compilation_compiles_once_for_many_sizes():
    """No two of the first call's sizes are equal by chance, which the compiler would take for a rule."""
    counter = CompileCounterWithBackend("eager")
    model = toy_model(**COMPILED)
    compiled = torch.compile(model, fullgraph=True, dynamic=True, backend=counter)
    for grid in [(10, 14), (18, 6), (22, 26)]:
        inputs = toy_inputs(grid, batch=3)
        assert relative_error(run(compiled, inputs), run(model, inputs)) < 1e-5
    assert counter.frame_count == 1


def test_a_compiled_model_takes_an_encoded_caption():
    model, inputs = toy_model(**COMPILED), toy_inputs((5, 7))
    plain = run(model, inputs)
    compiled = torch.compile(model, fullgraph=True, backend="eager")
    assert relative_error(run(compiled, encoded(model, inputs)), plain) < 1e-5


def test_a_compiled_model_gives_the_same_gradients():
    model, inputs = toy_model(**COMPILED), toy_inputs((5, 7))
    gradients = []
    for call in (model, torch.compile(model, fullgraph=True, backend="aot_eager")):
        model.zero_grad()
        call(**inputs).sample.square().mean().backward()
        gradients.append({name: p.grad.clone() for name, p in model.named_parameters()})
    for name, gradient in gradients[0].items():
        assert relative_error(gradients[1][name], gradient) < 1e-5, name


@pytest.mark.parametrize("config", CONFIGS, ids=str)
def test_the_repeated_blocks_compile_by_themselves(config):
    model, inputs = toy_model(**config), toy_inputs((5, 7))
    plain = run(model, inputs)
    counter = CompileCounterWithBackend("eager")
    model.compile_repeated_blocks(fullgraph=True, backend=counter)
    assert relative_error(run(model, inputs), plain) < 1e-5
    # One graph serves all blocks of a kind, whatever their shift: the compiler gives up after eight.
    assert counter.frame_count == len({type(block.attn1) for block in model.transformer_blocks})


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore:`torch.jit.script")  # inductor's own imports
@pytest.mark.parametrize("global_context", [False, True])
def test_inductor_computes_the_same(global_context):
    model = toy_model(num_layers=2, window_size=2, global_context=global_context)  # one block is shifted
    compiled = torch.compile(model, fullgraph=True)
    for grid in [(8, 8), (5, 7)]:
        inputs = toy_inputs(grid)
        assert relative_error(run(compiled, inputs), run(model, inputs)) < 1e-5


def test_the_model_exports():
    """`torch.export` traces the forward pass without running its Python again."""
    model, inputs = toy_model(**COMPILED), toy_inputs((5, 7))
    program = torch.export.export(model, (), inputs | {"return_dict": False}, strict=False)
    (sample,) = program.module()(**inputs, return_dict=False)
    assert relative_error(sample.detach(), run(model, inputs)) < 1e-5


# --- LoRA


def with_lora(model: nn.Module, *, seed: int = 3) -> nn.Module:
    """Put an adapter of rank 3 on every attention, with both of its matrices speaking."""
    model.add_adapter(LoraConfig(r=3, lora_alpha=6, target_modules=["to_q", "to_k", "to_v", "to_out.0"]))
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "lora_" in name:
                parameter.copy_(0.2 * torch.randn(parameter.shape, generator=generator))
    return model


@pytest.mark.parametrize("config", CONFIGS, ids=str)
def test_a_lora_can_be_added_scaled_saved_loaded_and_taken_off(config, tmp_path):
    model, inputs = toy_model(**config), toy_inputs((5, 7))
    plain = run(model, inputs)
    adapted = run(with_lora(model), inputs)
    assert relative_error(adapted, plain) > 1e-2
    model.save_lora_adapter(tmp_path)

    half = run(model, inputs, attention_kwargs={"scale": 0.5})
    assert 1e-3 < relative_error(half, plain) < relative_error(adapted, plain)
    assert relative_error(run(model, inputs, attention_kwargs={"scale": 0.0}), plain) < 1e-6
    assert torch.equal(run(model, inputs), adapted)  # a scale holds for one call
    model.set_adapters("default", 0.5)
    assert relative_error(run(model, inputs), half) < 1e-5

    model.unload_lora()
    assert torch.equal(run(model, inputs), plain)
    model.load_lora_adapter(tmp_path, prefix=None, weight_name="pytorch_lora_weights.safetensors")
    assert torch.equal(run(model, inputs), adapted)
    model.disable_lora()
    assert torch.equal(run(model, inputs), plain)


def test_a_lora_adapts_every_attention_of_every_block(tmp_path):
    model = with_lora(toy_model())
    model.save_lora_adapter(tmp_path)
    (path,) = tmp_path.glob("*.safetensors")
    layers = {key.rpartition(".lora_")[0] for key in load_file(path)}
    assert layers == {
        f"transformer_blocks.{i}.{attention}.{layer}"
        for i in range(4)
        for attention in ("attn1", "attn2")
        for layer in ("to_q", "to_k", "to_v", "to_out.0")
    }


def test_a_fused_lora_gives_the_adapted_numbers():
    model, inputs = with_lora(toy_model()), toy_inputs((5, 7))
    adapted = run(model, inputs)
    model.fuse_lora()
    model.unload_lora()
    assert relative_error(run(model, inputs), adapted) < 1e-5


def test_training_a_lora_leaves_the_model_alone():
    model, inputs = toy_model(), toy_inputs((5, 7))
    model.requires_grad_(False)
    with_lora(model).train()
    model(**inputs).sample.square().mean().backward()
    for name, parameter in model.named_parameters():
        assert (parameter.grad is not None) == ("lora_" in name), name
        assert parameter.grad is None or parameter.grad.abs().max() > 0, name


@torch.no_grad()
def test_a_lora_reaches_an_encoded_caption_with_its_scale():
    model, inputs = with_lora(toy_model()), toy_inputs((5, 7))
    for kwargs in ({}, {"attention_kwargs": {"scale": 0.3}}):
        assert torch.equal(
            run(model, encoded(model, inputs, **kwargs), **kwargs), run(model, inputs, **kwargs)
        )


def test_a_lora_compiles():
    model, inputs = with_lora(toy_model(**COMPILED)), toy_inputs((5, 7))
    compiled = torch.compile(model, fullgraph=True, backend="eager")
    assert relative_error(run(compiled, inputs), run(model, inputs)) < 1e-5


# --- Caches


@pytest.fixture
def _registered() -> None:
    """Importing the pipelines tells diffusers about the block, once, for its caches."""
    import localdit.pipelines  # noqa: F401


def steps(model: nn.Module, count: int = 4) -> list[torch.Tensor]:
    """Predictions along a few steps of one guided prompt; sizes are derived, as in a pipeline."""
    inputs = {key: value for key, value in toy_inputs((8, 8)).items() if key != "added_cond_kwargs"}
    predictions = []
    for i in range(count):
        now = {
            "timestep": torch.full((2,), 600 - 50 * i),
            "hidden_states": inputs["hidden_states"] * (1 + 0.02 * i),
        }
        with model.cache_context("cond"):
            predictions.append(run(model, inputs | now))
    return predictions


CACHES: dict[str, Callable[[], Any]] = {
    "first block": lambda: FirstBlockCacheConfig(threshold=0.5),
    "pyramid": lambda: PyramidAttentionBroadcastConfig(
        spatial_attention_block_skip_range=2,
        cross_attention_block_skip_range=3,
        current_timestep_callback=lambda: 500,
    ),
    "faster": lambda: FasterCacheConfig(
        current_timestep_callback=lambda: 500, tensor_format="BCHW", attention_weight_callback=lambda _: 0.3
    ),
}


@pytest.mark.usefixtures("_registered")
@pytest.mark.filterwarnings("ignore:torch.meshgrid")  # inside FasterCache
@pytest.mark.parametrize("cache", CACHES)
def test_a_cache_acts_while_it_is_on_and_leaves_nothing_behind(cache):
    model = toy_model()
    plain = steps(model)
    for _ in range(2):
        model.enable_cache(CACHES[cache]())
        assert model.is_cache_enabled
        cached = steps(model)
        assert torch.equal(cached[0], plain[0])  # there is nothing to reuse yet
        assert all(prediction.isfinite().all() for prediction in cached)
        assert any(not torch.equal(c, p) for c, p in zip(cached, plain))  # and here there was
        assert max(relative_error(c, p) for c, p in zip(cached, plain)) < 0.5
        model.disable_cache()
        assert not model.is_cache_enabled
        for after, before in zip(steps(model), plain):
            assert torch.equal(after, before)


@pytest.mark.usefixtures("_registered")
def test_a_first_block_cache_of_threshold_zero_skips_nothing():
    model = toy_model()
    plain = steps(model)
    model.enable_cache(FirstBlockCacheConfig(threshold=0.0))
    for cached, expected in zip(steps(model), plain):
        assert torch.equal(cached, expected)


# --- Moving


def test_a_model_built_without_memory_and_then_filled_runs():
    """`from_pretrained` builds on the meta device: nothing that the forward pass reads may stay there."""
    model, inputs = toy_model(), toy_inputs((5, 7))
    with torch.device("meta"):
        empty = LocalDiTTransformer2DModel(**TOY)
    empty.load_state_dict(model.state_dict(), assign=True)
    assert torch.equal(run(empty.eval(), inputs), run(model, inputs))


@pytest.mark.gpu
@pytest.mark.parametrize("config", CONFIGS, ids=str)
def test_the_gpu_computes_what_the_cpu_does(config):
    model, inputs = toy_model(**config), toy_inputs((5, 7))
    plain = run(model, inputs)
    on_gpu = {key: value.cuda() for key, value in inputs.items() if key != "added_cond_kwargs"}
    on_gpu["added_cond_kwargs"] = {key: value.cuda() for key, value in inputs["added_cond_kwargs"].items()}
    assert relative_error(run(model.cuda(), on_gpu).cpu(), plain) < 1e-4  # its matrix products may round more
