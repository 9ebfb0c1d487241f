"""Every file in configs/ builds its model on the meta device, with the stated number of parameters."""

from pathlib import Path

import pytest
import torch

from localdit.training.config import load_config
from localdit.training.loop import build_model
from localdit.training.objectives import build_objective

CONFIGS = Path(__file__).parent.parent / "configs"
PARAMETERS = {
    "local_dit/mini.yaml": 3_576_016,
    "local_dit/mini_text.yaml": 742_682,
    "local_dit/mini_vae.yaml": 944_567,
}


def test_every_config_is_counted():
    assert {str(path.relative_to(CONFIGS)) for path in CONFIGS.rglob("*.yaml")} == set(PARAMETERS)


@pytest.mark.parametrize("name", sorted(PARAMETERS))
def test_a_config_is_read_and_its_model_has_the_stated_size(name):
    config = load_config(CONFIGS / name)
    build_objective(config.objective)
    with torch.device("meta"):
        model = build_model(config.model)
    assert sum(parameter.numel() for parameter in model.parameters()) == PARAMETERS[name]


def test_an_unknown_model_field_or_class_is_an_error():
    with pytest.raises(ValueError, match=r"unknown key model\.num_layer;"):
        build_model({"_class_name": "LocalDiTTransformer2DModel", "num_layer": 2})
    with pytest.raises(ValueError, match=r"_class_name must name a model .*, got 'DiTX'"):
        build_model({"_class_name": "DiTX"})
    with pytest.raises(ValueError, match=r"objective\.name must be one of .*, got 'magic'"):
        build_objective({"name": "magic"})
