"""The names that saved folders hold. They are a file format: a change here makes older folders unreadable.

A pipeline's `model_index.json` names the module and the class of each component; a model's `config.json`
names its class and its config fields; a weight file names the parameters.
"""

import importlib
import json
from typing import Any

import pytest

import localdit.models.local_dit
import localdit.models.sparse_dit
import localdit.schedulers.edm_heun
from localdit.models.local_dit import LocalDiTTransformer2DModel
from localdit.models.sparse_dit import SparseDiTTransformer2DModel
from localdit.schedulers.edm_heun import EDMHeunScheduler

TOY = {
    "num_attention_heads": 2,
    "attention_head_dim": 12,
    "num_layers": 2,
    "caption_channels": 16,
    "sample_size": 16,
}


def test_the_transformer_keeps_its_module_and_its_name():
    cls = LocalDiTTransformer2DModel
    assert (cls.__module__, cls.__qualname__) == ("localdit.models.local_dit", "LocalDiTTransformer2DModel")
    # Diffusers looks for its base class in the component's own module when it loads a pipeline.
    assert hasattr(localdit.models.local_dit, "ModelMixin")


def test_a_pipeline_folder_names_its_components(tmp_path):
    from localdit.pipelines.local_dit import LocalDiTPipeline

    transformer = LocalDiTTransformer2DModel(**TOY)
    pipe = LocalDiTPipeline(
        tokenizer=None, text_encoder=None, vae=None, transformer=transformer, scheduler=None
    )
    pipe.save_pretrained(tmp_path)
    index = json.loads((tmp_path / "model_index.json").read_text())
    index.pop("_diffusers_version")
    assert index == {
        "_class_name": "LocalDiTPipeline",
        "default_guidance_scale": 7.0,
        "tokenizer": [None, None],
        "text_encoder": [None, None],
        "vae": [None, None],
        "transformer": ["localdit.models.local_dit", "LocalDiTTransformer2DModel"],
        "scheduler": [None, None],
    }
    assert LocalDiTPipeline.__module__ == "localdit.pipelines.local_dit"


def test_the_transformers_config_file_holds_these_fields(tmp_path):
    LocalDiTTransformer2DModel(**TOY).save_config(tmp_path)
    config = json.loads((tmp_path / "config.json").read_text())
    config.pop("_diffusers_version")
    assert config == {
        "_class_name": "LocalDiTTransformer2DModel",
        "attention_head_dim": 12,
        "attention_residual": True,
        "caption_channels": 16,
        "dropout": 0.0,
        "full_attention_layers": [],
        "global_context": True,
        "in_channels": 4,
        "interpolation_scale": None,
        "norm_eps": 1e-06,
        "num_attention_heads": 2,
        "num_layers": 2,
        "out_channels": 4,
        "patch_size": 2,
        "qk_norm_eps": 1e-10,
        "relative_position_bias": None,
        "rope": True,
        "sample_size": 16,
        "use_additional_conditions": True,
        "window_size": 4,
    }


def test_the_transformers_weight_file_holds_these_names():
    def affine(*names: str) -> set[str]:
        return {f"{name}.{kind}" for name in names for kind in ("weight", "bias")}

    features = {
        f"attn1.global_context.query_features.{i}.{name}.weight"
        for i in (0, 1)
        for name in ("depthwise", "squeeze", "excite", "pointwise")
    }
    block = (
        {"scale_shift_table", "attn1.relative_position_bias", "attn1.global_context.relative_position_bias"}
        | {f"{attention}.norm_{side}.weight" for attention in ("attn1", "attn2") for side in "qk"}
        | affine(
            *(f"{a}.{layer}" for a in ("attn1", "attn2") for layer in ("to_q", "to_k", "to_v", "to_out.0"))
        )
        | affine("attn1.global_context.to_kv", "ff.net.0.proj", "ff.net.2")
        | features
    )
    embedders = (
        f"adaln_single.emb.{name}_embedder.linear_{i}"
        for name in ("timestep", "resolution", "aspect_ratio")
        for i in (1, 2)
    )
    whole = {"scale_shift_table"} | affine(
        "pos_embed.proj",
        "adaln_single.linear",
        "proj_out",
        "caption_projection.linear_1",
        "caption_projection.linear_2",
    )
    expected = (
        whole | affine(*embedders) | {f"transformer_blocks.{i}.{name}" for i in (0, 1) for name in block}
    )
    assert LocalDiTTransformer2DModel(**TOY).state_dict().keys() == expected


def test_a_block_without_global_context_leaves_its_names_out():
    names = LocalDiTTransformer2DModel(**TOY, global_context=False).state_dict().keys()
    assert not any("global_context" in name or "relative_position_bias" in name for name in names)


# --- SparseDiT

SPARSE = {
    "sample_size": 8,
    "hidden_size": 64,
    "num_layers": 3,
    "attention_head_dim": 16,
    "ffn_multiple_of": 32,
    "caption_channels": 24,
    "mixer_num_layers": 1,
    "mixer_hidden_size": 48,
    "num_experts": 4,
}


def test_sparse_dit_and_its_scheduler_keep_their_modules_and_their_names():
    for cls, module in (
        (SparseDiTTransformer2DModel, localdit.models.sparse_dit),
        (EDMHeunScheduler, localdit.schedulers.edm_heun),
    ):
        assert (cls.__module__, cls.__qualname__) == (module.__name__, cls.__name__)
    # Diffusers looks for its base classes in the component's own module when it loads a pipeline.
    assert hasattr(localdit.models.sparse_dit, "ModelMixin")
    assert hasattr(localdit.schedulers.edm_heun, "SchedulerMixin")


def test_a_sparse_dit_pipeline_folder_names_its_components(tmp_path):
    from localdit.pipelines.sparse_dit import SparseDiTPipeline

    transformer, scheduler = SparseDiTTransformer2DModel(**SPARSE), EDMHeunScheduler(sigma_data=0.9)
    SparseDiTPipeline(transformer=transformer, scheduler=scheduler).save_pretrained(tmp_path)
    index = json.loads((tmp_path / "model_index.json").read_text())
    index.pop("_diffusers_version")
    assert index == {
        "_class_name": "SparseDiTPipeline",
        "tokenizer": [None, None],
        "text_encoder": [None, None],
        "vae": [None, None],
        "transformer": ["localdit.models.sparse_dit", "SparseDiTTransformer2DModel"],
        "scheduler": ["localdit.schedulers.edm_heun", "EDMHeunScheduler"],
    }
    scheduler_config = json.loads((tmp_path / "scheduler/scheduler_config.json").read_text())
    scheduler_config.pop("_diffusers_version")
    assert scheduler_config == {
        "_class_name": "EDMHeunScheduler",
        "final_sigmas_type": "zero",
        "num_train_timesteps": 1000,
        "prediction_type": "epsilon",
        "rho": 7.0,
        "s_churn": 0.0,
        "s_noise": 1.0,
        "s_tmax": None,
        "s_tmin": 0.0,
        "sigma_data": 0.9,
        "sigma_max": 80.0,
        "sigma_min": 0.002,
        "sigma_schedule": "karras",
        "state_dtype": "float32",
    }


def test_sparse_dits_config_file_holds_these_fields(tmp_path):
    SparseDiTTransformer2DModel(**SPARSE).save_config(tmp_path)
    config = json.loads((tmp_path / "config.json").read_text())
    config.pop("_diffusers_version")
    assert config == {
        "_class_name": "SparseDiTTransformer2DModel",
        "attention_head_dim": 16,
        "attention_ratio": [0.5, 1.0],
        "caption_channels": 24,
        "depth_scaled_init": True,
        "expert_capacity": 2.0,
        "ffn_inner_factor": 2 / 3,
        "ffn_multiple_of": 32,
        "ffn_ratio": [0.5, 4.0],
        "hidden_size": 64,
        "in_channels": 4,
        "interpolation_scale": 1.0,
        "mixer_attention_ratio": 1.0,
        "mixer_depth_scaled_init": False,
        "mixer_ffn_ratio": 4.0,
        "mixer_hidden_size": 48,
        "mixer_num_layers": 1,
        "moe_every_n": 2,
        "norm_eps": 1e-06,
        "num_experts": 4,
        "num_layers": 3,
        "out_channels": None,
        "patch_size": 2,
        "qk_norm_affine": False,
        "residual_init_denominator": 2,
        "sample_size": 8,
        "timestep_embed_dim": 512,
        "use_bias": False,
    }


def test_sparse_dits_weight_file_holds_these_names():
    def weights(*names: str) -> set[str]:
        return {f"{name}.weight" for name in names}

    def affine(*names: str) -> set[str]:
        return {f"{name}.{kind}" for name in names for kind in ("weight", "bias")}

    attention = [f"attn1.{layer}" for layer in ("to_q", "to_k", "to_v", "to_out.0")]
    dense = {f"ff.{name}_proj.weight" for name in ("gate", "up", "down")}
    sparse = {"ff.router.weight", "ff.experts_in", "ff.experts_out"}
    block = weights("norm1", "norm2", "norm3", *attention) | affine("adaln")
    block |= weights(*(name.replace("attn1", "attn2") for name in attention))
    whole = affine("patch_embed.proj", "time_embed.linear_1", "time_embed.linear_2", "adaln_out", "proj_out")
    for part in ("caption_projection", "pooled_projection"):
        whole |= affine(f"{part}.linear_1", f"{part}.linear_2") | weights(f"{part}.norm")
    for part in ("mixer_in", "mixer_context", "mixer_out"):
        whole |= weights(f"{part}.norm", f"{part}.proj")
    whole |= weights("norm_out")
    expected = (
        whole
        | {f"caption_refiner.{name}" for name in weights("norm1", "norm2", *attention) | dense}
        | {f"mixer_blocks.0.{name}" for name in block | dense}
        | {f"transformer_blocks.{i}.{name}" for i in (0, 2) for name in block | dense}
        | {f"transformer_blocks.1.{name}" for name in block | sparse}
    )
    assert SparseDiTTransformer2DModel(**SPARSE).state_dict().keys() == expected
    affine_norms = SparseDiTTransformer2DModel(**SPARSE, qk_norm_affine=True).state_dict().keys() - expected
    assert len(affine_norms) == 2 * (1 + 2 * 4)
    assert all(name.endswith(("norm_q.weight", "norm_k.weight")) for name in affine_norms)


# --- LEDiT

LEDIT_TOY = {"num_attention_heads": 2, "attention_head_dim": 12, "num_layers": 2, "sample_size": 8}


def test_a_ledit_pipeline_folder_names_its_components(tmp_path):
    from localdit import LEDiTPipeline, LEDiTTransformer2DModel

    transformer = LEDiTTransformer2DModel(**LEDIT_TOY)
    pipe = LEDiTPipeline(vae=None, transformer=transformer, scheduler=None, id2label={3: "a, b"})
    pipe.save_pretrained(tmp_path)
    index = json.loads((tmp_path / "model_index.json").read_text())
    index.pop("_diffusers_version")
    assert index == {
        "_class_name": "LEDiTPipeline",
        "id2label": {"3": "a, b"},
        "vae": [None, None],
        "transformer": ["localdit.models.ledit", "LEDiTTransformer2DModel"],
        "scheduler": [None, None],
    }
    assert LEDiTPipeline.__module__ == "localdit.pipelines.ledit"
    config = json.loads((tmp_path / "transformer" / "config.json").read_text())
    config.pop("_diffusers_version")
    assert config == {
        "_class_name": "LEDiTTransformer2DModel",
        "attention_head_dim": 12,
        "attention_pattern": "sa_ca",
        "causal_variant": "corner",
        "conv_groups": 1,
        "conv_kernel_size": 3,
        "conv_norm": False,
        "in_channels": 4,
        "mlp_ratio": 4.0,
        "multi_dilation": 2,
        "multi_dilation_prob": 0.1,
        "norm_eps": 1e-06,
        "num_attention_heads": 2,
        "num_classes": 1000,
        "num_layers": 2,
        "out_channels": 8,
        "patch_size": 2,
        "sample_size": 8,
        "scale_attention": True,
    }


def test_a_ledit_weight_file_holds_these_names():
    from localdit import LEDiTTransformer2DModel

    block = ("modulation", "ff.net.0.proj", "ff.net.2")
    block += tuple(f"attn1.{layer}" for layer in ("to_q", "to_k", "to_v", "to_out.0"))
    layers = {f"transformer_blocks.{i}.{layer}" for i in (0, 1) for layer in block}
    layers |= {"patch_embed", "locality_conv", "locality_norm", "modulation_out", "proj_out"}
    layers |= {"timestep_embedder.linear_1", "timestep_embedder.linear_2"}
    expected = {f"{layer}.{kind}" for layer in layers for kind in ("weight", "bias")}
    names = LEDiTTransformer2DModel(**LEDIT_TOY, conv_norm=True).state_dict().keys()
    assert names == expected | {"class_embedder.weight"}


# --- PixelDiT

PIXELDIT_TOY: dict[str, Any] = {
    "num_layers": 1,
    "num_attention_heads": 2,
    "attention_head_dim": 8,
    "num_pixel_layers": 1,
    "pixel_dim": 4,
    "patch_size": 4,
}


@pytest.mark.parametrize(
    ("module", "name", "base"),
    [
        ("localdit.models.pixeldit", "PixelDiTTransformer2DModel", "ModelMixin"),
        ("localdit.models.pixeldit_text", "PixelDiTTextTransformer2DModel", "ModelMixin"),
        ("localdit.schedulers.flow_adams_bashforth", "FlowAdamsBashforthScheduler", "SchedulerMixin"),
    ],
)
def test_pixeldits_components_keep_their_module_and_their_name(module, name, base):
    """And diffusers finds its base class in the component's own module."""
    cls = getattr(localdit, name)
    assert (cls.__module__, cls.__qualname__) == (module, name)
    assert issubclass(cls, getattr(importlib.import_module(module), base))


def test_pixeldit_pipeline_folders_name_their_components(tmp_path):
    model = localdit.PixelDiTTransformer2DModel(**PIXELDIT_TOY, num_classes=2)
    scheduler = localdit.FlowAdamsBashforthScheduler()
    localdit.PixelDiTPipeline(model, scheduler, {0: "hen", 1: "owl"}).save_pretrained(tmp_path / "class")
    localdit.PixelDiTTextPipeline().save_pretrained(tmp_path / "text")
    indices = [json.loads((tmp_path / name / "model_index.json").read_text()) for name in ("class", "text")]
    for index in indices:
        index.pop("_diffusers_version")
    assert indices[0] == {
        "_class_name": "PixelDiTPipeline",
        "id2label": {"0": "hen", "1": "owl"},
        "transformer": ["localdit.models.pixeldit", "PixelDiTTransformer2DModel"],
        "scheduler": ["localdit.schedulers.flow_adams_bashforth", "FlowAdamsBashforthScheduler"],
    }
    parts = ("transformer", "scheduler", "text_encoder", "tokenizer")
    assert indices[1] == {"_class_name": "PixelDiTTextPipeline"} | {part: [None, None] for part in parts}


def test_pixeldits_config_files_hold_these_fields(tmp_path):
    shared = PIXELDIT_TOY | {
        "sample_size": 256,
        "in_channels": 3,
        "mlp_ratio": 4.0,
        "pixel_mlp_ratio": 4.0,
        "rope_theta": 10000.0,
        "rope_extent": 16.0,
        "timestep_period": 10.0,
        "pixel_position": True,
        "pixel_post_modulation": False,
        "zero_init_modulation": True,
        "norm_eps": 1e-06,
    }
    own: dict[str, dict[str, Any]] = {
        "PixelDiTTransformer2DModel": {
            "num_classes": 1000,
            "pixel_num_attention_heads": None,
            "pixel_attention_head_dim": None,
        },
        "PixelDiTTextTransformer2DModel": {
            "sample_size": 1024,
            "pixel_num_attention_heads": 16,
            "pixel_attention_head_dim": 72,
            "caption_channels": 2304,
            "max_text_tokens": 300,
            "text_rope": True,
            "text_rope_theta": 10000.0,
        },
    }
    for name, fields in own.items():
        getattr(localdit, name)(**PIXELDIT_TOY).save_config(tmp_path)
        config = json.loads((tmp_path / "config.json").read_text())
        config.pop("_diffusers_version")
        assert config == {"_class_name": name} | shared | fields


def test_pixeldits_weight_files_hold_these_names():
    def affine(*names: str) -> set[str]:
        return {f"{name}.{kind}" for name in names for kind in ("weight", "bias")}

    def weights(*names: str) -> set[str]:
        return {f"{name}.weight" for name in names}

    attention = affine("attn1.to_out.0") | weights(
        *(f"attn1.{layer}" for layer in ("to_q", "to_k", "to_v", "norm_q", "norm_k"))
    )
    block = attention | affine("modulation") | weights("norm1", "norm2", "ff.net.0.proj", "ff.net.2")
    context = affine("attn1.to_add_out", "modulation_context") | weights(
        *(f"attn1.{layer}" for layer in ("add_q_proj", "add_k_proj", "add_v_proj")),
        *(f"attn1.{layer}" for layer in ("norm_added_q", "norm_added_k")),
        *("norm1_context", "norm2_context", "ff_context.net.0.proj", "ff_context.net.2"),
    )
    pixel_block = (
        attention
        | affine("compress", "expand", "modulation1", "modulation2", "ff.net.0.proj", "ff.net.2")
        | weights("norm1", "norm2")
    )
    layers = ("patch_embed", "time_embed.linear_1", "time_embed.linear_2", "pixel_embed", "proj_out")
    whole = affine(*layers) | weights("norm_out") | {f"pixel_blocks.0.{name}" for name in pixel_block}
    model = localdit.PixelDiTTransformer2DModel(**PIXELDIT_TOY)
    blocks = {f"transformer_blocks.0.{name}" for name in block}
    assert model.state_dict().keys() == whole | blocks | weights("class_embed")
    text_model = localdit.PixelDiTTextTransformer2DModel(**PIXELDIT_TOY)
    blocks |= {f"transformer_blocks.0.{name}" for name in context}
    caption = affine("caption_projection") | weights("caption_norm") | {"caption_position"}
    assert text_model.state_dict().keys() == whole | blocks | caption
