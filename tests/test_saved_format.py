"""The names that saved folders hold. They are a file format: a change here makes older folders unreadable.

A pipeline's `model_index.json` names the module and the class of each component; a model's `config.json`
names its class and its config fields; a weight file names the parameters.
"""

import json

import localdit.models.local_dit
from localdit.models.local_dit import LocalDiTTransformer2DModel

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
