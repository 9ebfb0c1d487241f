"""The configuration of a training run: a YAML file that says everything the run depends on, read strictly."""

import dataclasses
import math
import re
import types
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal, get_args, get_origin

import yaml


@dataclass(frozen=True)
class ParameterGroup:
    """Parameters with a learning rate or weight decay of their own."""

    match: str  # regular expression, searched in the parameter's full name; the first group that fits counts
    learning_rate_scale: float = 1.0  # times the run's learning rate
    weight_decay: float | None = None  # None: the run's


@dataclass(frozen=True)
class LoraConfig:
    """Train low-rank updates of some layers instead of the weights (Hu et al. 2021)."""

    rank: int = 16
    alpha: float = 16.0  # the update is scaled by alpha / rank
    dropout: float = 0.0  # of the update's input
    target_modules: tuple[str, ...] = (
        "to_q",
        "to_k",
        "to_v",
        "to_out.0",
    )  # names of linear layers, or ends of

    def __post_init__(self) -> None:
        if self.rank < 1:
            raise ValueError(f"lora.rank must be at least 1, got {self.rank}")
        if self.alpha == 0:
            raise ValueError("lora.alpha must be above 0, got 0: the update would count nothing")
        if self.dropout >= 1:
            raise ValueError(f"lora.dropout must be below 1, got {self.dropout}")


@dataclass(frozen=True)
class TrainConfig:
    """How the loop runs. Every process takes `batch_size` samples, `gradient_accumulation` times a step."""

    max_steps: int  # optimizer steps
    batch_size: int  # samples of a process's micro-batch
    optimizer: Literal["adamw", "muon", "adamw8bit", "schedule_free_adamw"] = "adamw"
    learning_rate: float = 1e-4  # after warm-up
    warmup_steps: int = 1000  # linear, from 0
    schedule: Literal["constant", "linear", "cosine", "cosine_with_restarts", "polynomial"] = "constant"
    learning_rate_floor: float = 0.0  # share of learning_rate that a falling schedule ends at in place of 0
    weight_decay: float = 0.03
    betas: tuple[float, float] = (0.9, 0.999)
    eps: float = 1e-8
    parameter_groups: tuple[ParameterGroup, ...] = field(default=(), metadata={"nested": ParameterGroup})
    max_grad_norm: float = 1.0
    max_skipped_steps: int = 20  # in a row, for a gradient that is not finite; then the run stops
    gradient_accumulation: int = 1  # micro-batches a step
    mixed_precision: Literal["no", "fp16", "bf16"] = "no"
    gradient_checkpointing: bool = False
    compile: bool = False  # torch.compile of the repeated blocks, or of a whole model that declares none
    ema_decay: float = 0.9999  # 0 averages nothing
    ema_start: int = 0  # steps before the average begins; until then it is the weights themselves
    seed: int = 0
    resample: bool = False  # draw each sample from all, with replacement; else in passes, as often as others
    shard_window: int = 8  # shards whose samples are mixed with each other, if the data lies in shards
    num_workers: int = 0  # of the data loader, in each process
    num_threads: int | None = None  # of PyTorch on the CPU; None leaves its default
    max_bad_fraction: float = 0.01  # of the samples seen, that may turn out unusable
    log_every: int = 50  # steps
    log_with: tuple[
        str, ...
    ] = ()  # trackers besides log.jsonl: tensorboard, wandb, trackio, ... (accelerate's)
    peak_tflops: float | None = (
        None  # of one device, for the share of it that is used; None: known GPUs' bf16
    )
    save_every: int = 1000  # steps
    keep_checkpoints: int = 2  # newest ones kept
    preview_every: int | None = None  # steps; None makes no previews
    validate_every: int | None = None  # steps; None measures no validation loss

    def __post_init__(self) -> None:
        for name in (
            "max_steps",
            "batch_size",
            "gradient_accumulation",
            "shard_window",
            "log_every",
            "save_every",
            "keep_checkpoints",
        ):
            if getattr(self, name) < 1:
                raise ValueError(f"train.{name} must be at least 1, got {getattr(self, name)}")
        if self.learning_rate_floor > 1:
            raise ValueError(f"train.learning_rate_floor must be at most 1, got {self.learning_rate_floor}")


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
    # What a fresh run starts from: folder of a model or of a pipeline with one, "mini" for that of the
    # package, or a published checkpoint.
    init_from: str | None = None
    lora: LoraConfig | None = field(default=None, metadata={"nested": LoraConfig})


def load_config(path: str | Path, overrides: list[str] | None = None, kind: Any = Config) -> Any:
    """Read a YAML file strictly.

    Args:
        path: The file.
        overrides: `section.key=value`, the value in YAML (`train.max_steps=100`, `model.rope=false`).
        kind: The dataclass to fill; a run's `Config` unless another is given.

    Raises:
        ValueError: An unknown or missing key, a value of the wrong type, or an override that is none.
    """
    try:
        values = yaml.load(Path(path).read_text(encoding="utf-8"), Loader=_UniqueKeyLoader)
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        raise ValueError(f"{path} is not valid YAML: {error}") from error
    if not isinstance(values, dict):
        raise ValueError(f"{path} must hold keys and values, got {type(values).__name__}")
    for override in overrides or []:
        _override(values, override)
    return build(kind, values, where="")


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
            if nested and isinstance(f.default, tuple):
                if not isinstance(value, list | tuple):
                    raise ValueError(f"{where}{name} must be a list, got {value!r}")
                filled[name] = tuple(build(nested, v, f"{where}{name}[{i}].") for i, v in enumerate(value))
            elif nested and (value is not None or f.default is not None):
                filled[name] = build(nested, value, f"{where}{name}.")
            else:
                filled[name] = _cast(value, f.type, where + name, signed)
        elif f.default is dataclasses.MISSING and f.default_factory is dataclasses.MISSING:
            raise ValueError(f"missing key {where}{name}")
    return kind(**filled)


def _cast(value: Any, kind: Any, name: str, signed: bool = False) -> Any:
    """`value` as `kind`, with no conversion that could hide a mistake."""
    origin = get_origin(kind)
    if origin is types.UnionType:
        if value is None and types.NoneType in get_args(kind):
            return None
        first, *more = (k for k in get_args(kind) if k is not types.NoneType)
        kind = next((k for k in more if isinstance(value, get_origin(k) or k)), first)
        return _cast(value, kind, name, signed)
    if origin is Literal:
        if value not in get_args(kind):
            raise ValueError(f"{name} must be one of {', '.join(map(str, get_args(kind)))}, got {value!r}")
        return value
    if origin is tuple:
        if not isinstance(value, list | tuple):
            raise ValueError(f"{name} must be a list, got {value!r}")
        kinds = get_args(kind)
        kinds = kinds[:1] * len(value) if len(kinds) == 2 and kinds[1] is Ellipsis else kinds
        if len(value) != len(kinds):
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
    """YAML whose repeated keys are errors, where 1e-4 is a number and `no` a word (not so in YAML 1.1)."""

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


# As in YAML 1.2 only true and false are truth values: `mixed_precision: no` means the word.
_BOOL = "tag:yaml.org,2002:bool"
_UniqueKeyLoader.yaml_implicit_resolvers = {
    first: [pair for pair in pairs if pair[0] != _BOOL]
    for first, pairs in yaml.SafeLoader.yaml_implicit_resolvers.items()
}
_UniqueKeyLoader.add_implicit_resolver(
    _BOOL, re.compile(r"(?:true|True|TRUE|false|False|FALSE)$"), list("tTfF")
)
_UniqueKeyLoader.add_constructor("tag:yaml.org,2002:str", _construct_scalar)
