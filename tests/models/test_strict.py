"""A folder whose weights do not fit is refused, and so are pickles, and configs that cannot be."""

import math
import re
import time

import pytest
import torch
from safetensors.torch import load_file, save_file
from toys import TOY, run, toy_inputs, toy_model

from localdit.models.local_dit import LocalDiTTransformer2DModel
from localdit.models.strict import MAX_PARAMETERS, check_types

WEIGHTS = "diffusion_pytorch_model"


def changed(folder, **tensors):
    """Save a toy with other tensors, or without those that are None. Two underscores stand for a dot."""
    toy_model().save_pretrained(folder)
    file = folder / f"{WEIGHTS}.safetensors"
    weights = load_file(file) | {name.replace("__", "."): tensor for name, tensor in tensors.items()}
    save_file({name: tensor for name, tensor in weights.items() if tensor is not None}, file)
    return folder


KEY = "transformer_blocks__{}__attn2__to_k__weight"


@pytest.mark.parametrize("options", [{}, {"low_cpu_mem_usage": False}], ids=str)
def test_all_that_is_missing_or_surplus_is_named_at_once(tmp_path, options):
    """Diffusers would leave what is missing without memory, or with what lies in it."""
    changed(tmp_path, **{KEY.format(0): None, KEY.format(2): None, "more__weight": torch.ones(3)})
    with pytest.raises(ValueError, match="must be those of the model") as error:
        LocalDiTTransformer2DModel.from_pretrained(tmp_path, **options)
    assert str(error.value).splitlines() == [
        f"the tensors of {tmp_path / WEIGHTS}.safetensors must be those of the model, but some are",
        "  missing (2):",
        "    transformer_blocks.{0,2}.attn2.to_k.weight",
        "  surplus (1):",
        "    more.weight",
        "  to begin with some of them, build the model, and load_state_dict(..., strict=False)",
    ]


@pytest.mark.parametrize("options", [{}, {"ignore_mismatched_sizes": True}], ids=str)
def test_a_misshapen_tensor_is_named_though_it_be_ignored(tmp_path, options):
    changed(tmp_path, proj_out__bias=torch.zeros(5))
    with pytest.raises(ValueError, match=r"proj_out\.bias"):
        LocalDiTTransformer2DModel.from_pretrained(tmp_path, **options)


def test_a_device_map_makes_up_no_tensor(tmp_path):
    changed(tmp_path, proj_out__bias=None)
    with pytest.raises((ValueError, NotImplementedError)):
        LocalDiTTransformer2DModel.from_pretrained(tmp_path, device_map="cpu")


@pytest.mark.parametrize(
    "options",
    [
        {"low_cpu_mem_usage": False},
        {"device_map": "cpu"},
        {"variant": "fp16"},
        {"subfolder": "part"},
        {"max_shard_size": "50KB"},
        {"max_shard_size": "50KB", "variant": "fp16", "device_map": "cpu"},
        {"use_safetensors": False},
    ],
    ids=str,
)
def test_what_fits_is_loaded_in_every_way_that_diffusers_has(tmp_path, options):
    model, inputs = toy_model(), toy_inputs()
    writing = {name: options.pop(name) for name in ("max_shard_size",) if name in options}
    writing |= {"variant": options["variant"]} if "variant" in options else {}
    model.save_pretrained(
        tmp_path / options.get("subfolder", ""),
        safe_serialization=options.get("use_safetensors", True),
        **writing,
    )
    loaded, found = LocalDiTTransformer2DModel.from_pretrained(tmp_path, output_loading_info=True, **options)
    assert not any(found.values())
    assert torch.equal(run(loaded, inputs), run(model, inputs))


def test_a_shard_that_lacks_what_the_index_says_of_it_is_found(tmp_path):
    toy_model().save_pretrained(tmp_path, max_shard_size="50KB")
    first, second, *_ = sorted(tmp_path.glob("*.safetensors"))
    lost = load_file(first).keys() - load_file(second).keys()
    first.write_bytes(second.read_bytes())
    with pytest.raises(ValueError, match=rf"missing \({len(lost)}\)"):
        LocalDiTTransformer2DModel.from_pretrained(tmp_path)


def test_pickles_are_refused_and_the_way_to_convert_them_that_is_told_works(tmp_path):
    model = toy_model()
    model.save_pretrained(tmp_path, safe_serialization=False)
    with pytest.raises(ValueError, match=rf"{WEIGHTS}\.bin.*use_safetensors=False\), and save_pretrained"):
        LocalDiTTransformer2DModel.from_pretrained(tmp_path)
    LocalDiTTransformer2DModel.from_pretrained(tmp_path, use_safetensors=False).save_pretrained(tmp_path)
    (tmp_path / f"{WEIGHTS}.bin").write_bytes(b"never opened")
    loaded = LocalDiTTransformer2DModel.from_pretrained(tmp_path)
    assert torch.equal(run(loaded, toy_inputs()), run(model, toy_inputs()))


# --- Config -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("name", "value", "rule"),
    [
        ("rope", "yes", "bool"),
        ("rope", 1, "bool"),
        ("relative_position_bias", 0, "bool | None"),
        ("num_layers", True, "a positive integer"),
        ("num_layers", None, "int"),
        ("out_channels", 0, "a positive integer"),
        ("out_channels", 2.0, "a positive integer"),
        ("norm_eps", math.nan, "float"),
        ("norm_eps", None, "float"),
        ("norm_eps", -1e-6, "at least 0 and less than 1"),
        ("dropout", 1, "at least 0 and less than 1"),
        ("dropout", False, "float"),
        ("interpolation_scale", math.inf, "float | None"),
        ("interpolation_scale", -1, "positive or None"),
        ("full_attention_layers", 2, "tuple[int, ...]"),
        ("full_attention_layers", [0, "1"], "tuple[int, ...]"),
        ("full_attention_layers", (True,), "tuple[int, ...]"),
    ],
)
def test_a_config_value_of_another_kind_is_refused_with_its_rule(name, value, rule):
    with pytest.raises(ValueError, match=re.escape(f"{name} must be {rule}, got {value!r}")):
        LocalDiTTransformer2DModel(**TOY | {name: value})


def test_types_are_read_from_a_signature():
    """A list for a tuple, as a file has it, and an integer for a float; however large it is."""

    def init(self, ratio: float = 1.0, ratios: tuple[float, float] | None = None, name: str = "a"): ...

    for good in ({}, {"ratio": 10**400}, {"ratios": [1, 0.5]}, {"ratios": None, "name": "", "unknown": {}}):
        check_types(init, good)
    for bad in ({"ratio": "1"}, {"ratio": True}, {"ratios": [None]}, {"ratios": "12"}, {"name": None}):
        with pytest.raises(ValueError, match=f"{next(iter(bad))} must be"):
            check_types(init, bad)


@pytest.mark.parametrize(
    "name", [*(name for name in TOY if name != "sample_size"), "in_channels", "out_channels", "patch_size"]
)
def test_a_size_that_no_memory_holds_is_refused_before_any_is_taken(name):
    began = time.process_time()
    with pytest.raises(ValueError, match=rf"at most {MAX_PARAMETERS:,} parameters.*{name}={12 * 10**9}"):
        LocalDiTTransformer2DModel(**TOY | {name: 12 * 10**9})
    assert time.process_time() - began < 1


@pytest.mark.parametrize("config", [{}, {"global_context": False}, {"in_channels": 300, "num_layers": 1}])
def test_no_model_is_refused_for_parameters_that_it_does_not_have(config, monkeypatch):
    """What is estimated of the parameters is less than there are."""
    found = []
    monkeypatch.setattr("localdit.models.local_dit.check_parameters", lambda n, sizes: found.append(n))
    model = LocalDiTTransformer2DModel(**TOY | config)
    assert 0.5 * model.num_parameters() < found[0] <= model.num_parameters()
