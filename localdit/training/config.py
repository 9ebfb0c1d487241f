"""The configuration of a training run: a YAML file that says everything the run depends on, read strictly."""

import dataclasses
import math
import types
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal, get_args, get_origin

import yaml


@dataclass(frozen=True)
class TrainConfig:
    """How the loop runs. Every process takes `batch_size` samples a step."""

    max_steps: int  # optimizer steps
    batch_size: int  # samples a step and process
    optimizer: Literal["adamw", "muon"] = "adamw"  # see `localdit.training.optimizers`
    learning_rate: float = 1e-4  # after warm-up
    warmup_steps: int = 1000  # linear, from 0
    schedule: Literal["constant", "cosine", "linear"] = "constant"  # after warm-up, down to 0 at max_steps
    weight_decay: float = 0.03
    betas: tuple[float, float] = (0.9, 0.999)
    eps: float = 1e-8
    max_grad_norm: float = 1.0
    gradient_accumulation: int = 1  # batches a step
    mixed_precision: Literal["no", "fp16", "bf16"] = "no"
    gradient_checkpointing: bool = False
    compile: bool = False  # torch.compile of the model
    ema_decay: float = 0.9999
    seed: int = 0
    num_workers: int = 0  # of the data loader
    num_threads: int | None = None  # of PyTorch on the CPU; None leaves its default
    log_every: int = 50  # steps
    save_every: int = 1000  # steps
    keep_checkpoints: int = 2  # newest ones kept
    preview_every: int | None = None  # steps; None makes no previews


@dataclass(frozen=True)
class Config:
    """One run.

    `model` is a model's own config with its `_class_name`; `objective` names what is learned and on which
    data, with the fields of that objective (`localdit.training.objectives`).
    """

    output_dir: str
    model: dict[str, Any]
    objective: dict[str, Any]
    train: TrainConfig = field(metadata={"nested": TrainConfig})
    init_from: str | None = (
        None  # folder of a model, or of a pipeline with one, whose weights a fresh run takes
    )


def load_config(path: str | Path, overrides: list[str] | None = None) -> Config:
    """Read a run's YAML file.

    Args:
        path: The file.
        overrides: `section.key=value`, the value in YAML (`train.max_steps=100`, `model.rope=false`).

    Raises:
        ValueError: An unknown or missing key, a value of the wrong type, or an override that is none.
    """
    try:
        values = yaml.load(Path(path).read_text(encoding="utf-8"), Loader=_UniqueKeyLoader)
    except yaml.YAMLError as error:
        raise ValueError(f"{path} is not valid YAML: {error}") from error
    if not isinstance(values, dict):
        raise ValueError(f"{path} must hold the sections of a run, got {type(values).__name__}")
    for override in overrides or []:
        _override(values, override)
    return build(Config, values, where="")


def build(kind: Any, values: dict[str, Any], where: str) -> Any:
    """Fill a dataclass from plain values: unknown or missing keys and wrong types are errors."""
    if not isinstance(values, dict):
        raise ValueError(f"{where or 'the configuration'} must be a mapping, got {values!r}")
    fields = {f.name: f for f in dataclasses.fields(kind) if f.init}
    for name in values:
        if name not in fields:
            raise ValueError(f"unknown key {where}{name}; known are {', '.join(sorted(fields))}")
    filled = {}
    for name, f in fields.items():
        if name in values:
            value, nested, signed = values[name], f.metadata.get("nested"), f.metadata.get("signed", False)
            filled[name] = (
                build(nested, value, f"{where}{name}.")
                if nested
                else _cast(value, f.type, where + name, signed)
            )
        elif f.default is dataclasses.MISSING and f.default_factory is dataclasses.MISSING:
            raise ValueError(f"missing key {where}{name}")
    return kind(**filled)


def _cast(value: Any, kind: Any, name: str, signed: bool = False) -> Any:
    """`value` as `kind`, with no conversion that could hide a mistake."""
    origin = get_origin(kind)
    if origin is types.UnionType:
        if value is None:
            return None
        (kind,) = (k for k in get_args(kind) if k is not type(None))
        return _cast(value, kind, name, signed)
    if origin is Literal:
        if value not in get_args(kind):
            raise ValueError(f"{name} must be one of {', '.join(map(str, get_args(kind)))}, got {value!r}")
        return value
    if origin is tuple:
        kinds = get_args(kind)
        kinds = kinds[:1] * len(value) if len(kinds) == 2 and kinds[1] is Ellipsis else kinds
        if not isinstance(value, list | tuple) or len(value) != len(kinds):
            raise ValueError(f"{name} must be a list of {len(kinds)}, got {value!r}")
        return tuple(_cast(v, k, f"{name}[{i}]", signed) for i, (v, k) in enumerate(zip(value, kinds)))
    if kind is float and isinstance(value, int) and not isinstance(value, bool):
        value = float(value)
    expected = origin or kind
    if not isinstance(value, expected) or (expected is int and isinstance(value, bool)):
        raise ValueError(f"{name} must be {expected.__name__}, got {value!r}")
    if expected is float and not math.isfinite(value):
        raise ValueError(f"{name} must be finite, got {value!r}")
    if expected in (int, float) and value < 0 and not signed:
        raise ValueError(f"{name} must not be negative, got {value!r}")
    return value


def _override(values: dict[str, Any], override: str) -> None:
    path, equals, text = override.partition("=")
    if not equals:
        raise ValueError(f"an override must be section.key=value, got {override!r}")
    *sections, key = path.split(".")
    for section in sections:
        values = values.get(section)  # type: ignore[assignment]
        if not isinstance(values, dict):
            raise ValueError(f"unknown section {section!r} in override {override!r}")
    values[key] = yaml.load(text, Loader=_UniqueKeyLoader)


class _UniqueKeyLoader(yaml.SafeLoader):
    """YAML whose repeated keys are errors, and where 1e-4 is a number (YAML 1.1 takes it for text)."""

    def construct_mapping(self, node: Any, deep: bool = False) -> dict[Any, Any]:
        keys = [self.construct_object(key, deep=deep) for key, _ in node.value]
        for key in keys:
            if keys.count(key) > 1:
                raise ValueError(f"key {key!r} stands twice{node.start_mark}")
        return super().construct_mapping(node, deep)


def _construct_scalar(loader: yaml.SafeLoader, node: Any) -> Any:
    text = loader.construct_scalar(node)
    try:
        return float(text) if any(c.isdigit() for c in text) and "e" in text.lower() else text
    except ValueError:
        return text


_UniqueKeyLoader.add_constructor("tag:yaml.org,2002:str", _construct_scalar)
