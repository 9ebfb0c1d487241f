"""The configuration of a run is read strictly."""

import re

import pytest

from localdit.training.config import load_config

MINIMAL = """
output_dir: out
model: {_class_name: LocalDiTTransformer2DModel, num_layers: 2}
objective: {name: denoising}
train: {max_steps: 10, batch_size: 2, learning_rate: 1e-3}
"""


@pytest.fixture
def write(tmp_path):
    def write(text: str):
        path = tmp_path / "run.yaml"
        path.write_text(text)
        return path

    return write


def test_a_file_fills_the_configuration_and_1e_minus_3_is_a_number(write):
    config = load_config(write(MINIMAL))
    assert config.train.learning_rate == 1e-3
    assert config.train.max_steps == 10
    assert config.model["num_layers"] == 2
    assert config.train.ema_decay == 0.9999  # a default


def test_the_command_line_overrides_single_values(write):
    config = load_config(write(MINIMAL), ["train.max_steps=7", "model.rope=false", "output_dir=elsewhere"])
    assert (config.train.max_steps, config.model["rope"], config.output_dir) == (7, False, "elsewhere")


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        (["train.max_step=1"], "unknown key train.max_step"),
        (["train.max_steps=1.5"], "train.max_steps must be int, got 1.5"),
        (["train.max_steps=true"], "train.max_steps must be int, got True"),
        (["train.max_steps=-1"], "train.max_steps must not be negative, got -1"),
        (["train.learning_rate=.nan"], "train.learning_rate must be finite, got nan"),
        (["train.learning_rate=fast"], "train.learning_rate must be float, got 'fast'"),
        (
            ["train.schedule=sometimes"],
            "train.schedule must be one of constant, linear, cosine, cosine_with_restarts, polynomial, got",
        ),
        (["lora={rank: 0}"], "lora.rank must be at least 1, got 0"),
        (["lora={alpha: 0}"], "lora.alpha must be above 0, got 0"),
        (["lora={dropout: 1.0}"], "lora.dropout must be below 1, got 1.0"),
        (["train.shard_window=0"], "train.shard_window must be at least 1, got 0"),
        (["train.resample=1"], "train.resample must be bool, got 1"),
        (["train.betas=[0.9]"], "train.betas must be a list of 2, got [0.9]"),
        (["nonsense"], "an override must be section.key=value, got 'nonsense'"),
        (["a.b=1"], "unknown section 'a'"),
    ],
)
def test_a_wrong_value_is_an_error_that_names_its_key(write, overrides, message):
    with pytest.raises(ValueError, match=re.escape(message)):
        load_config(write(MINIMAL), overrides)


def test_missing_and_repeated_keys_are_errors(write):
    with pytest.raises(ValueError, match="missing key objective"):
        load_config(write("output_dir: out\nmodel: {}\ntrain: {max_steps: 1, batch_size: 1}\n"))
    with pytest.raises(ValueError, match="'output_dir' stands twice"):
        load_config(write(MINIMAL + "output_dir: again\n"))


def test_a_file_that_is_no_configuration_is_an_error(write):
    with pytest.raises(ValueError, match="is not valid YAML"):
        load_config(write("model: [1, 2"))
    with pytest.raises(ValueError, match="must hold keys and values, got list"):
        load_config(write("- 1\n- 2\n"))


def test_no_is_a_word_and_true_is_none(write):
    overrides = ["train.mixed_precision=no", "train.compile=true", "train.gradient_checkpointing=False"]
    options = load_config(write(MINIMAL), overrides).train
    assert (options.mixed_precision, options.compile, options.gradient_checkpointing) == ("no", True, False)
