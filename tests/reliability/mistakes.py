"""Configurations that are wrong, and weights that do not fit."""

import contextlib
import dataclasses
import math
import random
import resource
import signal
import string
import typing
from collections import Counter
from collections.abc import Callable, Iterator
from multiprocessing.connection import Connection
from pathlib import Path
from types import FrameType
from typing import Any, Literal

import diffusers
import torch
import yaml
from diffusers.training_utils import EMAModel
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file, save_file
from torch import Tensor

from localdit.models.local_dit import LocalDiTTransformer2DModel
from localdit.training.config import Config, TrainConfig, load_config
from localdit.training.state import capture, restore

from . import Outcome, experiment
from .toys import sent, start

TOY = {
    "num_attention_heads": 2,
    "attention_head_dim": 12,
    "num_layers": 2,
    "caption_channels": 8,
    "sample_size": 8,
}

# --- R12: configurations ------------------------------------------------------------------------------------

WORDS = st.text(string.ascii_letters, min_size=1, max_size=12)
NO_NUMBER = st.one_of(WORDS, st.booleans(), st.lists(st.integers(), max_size=2), st.just({}))
NO_TEXT = st.one_of(st.integers(), st.booleans(), st.lists(WORDS, max_size=2))


def wrong(kind: Any, signed: bool) -> st.SearchStrategy[Any]:
    """Values that a field of this type must not have."""
    if kind is int or kind is float:
        values = [NO_NUMBER, st.sampled_from([math.nan, math.inf, -math.inf])]
        if kind is int:
            values.append(st.floats(0, 1e6).filter(lambda value: value != int(value)))
        if not signed:
            values.append(st.integers(max_value=-1))
        return st.one_of(*values)
    if kind is bool:
        return st.one_of(WORDS, st.integers(), st.lists(st.booleans(), max_size=2))
    if kind is str:
        return NO_TEXT
    if typing.get_origin(kind) is Literal:
        return st.one_of(st.integers(), WORDS.filter(lambda word: word not in typing.get_args(kind)))
    if typing.get_origin(kind) is tuple:
        return st.one_of(st.integers(), WORDS, st.just([{}]), st.just({}))
    return st.one_of(st.integers(), WORDS, st.booleans())  # a section


def wrong_fields(kind: Any, prefix: str = "") -> Iterator[tuple[str, st.SearchStrategy[Any]]]:
    """Each key of a configuration, and what it must not hold."""
    for field in dataclasses.fields(kind):
        options = [each for each in typing.get_args(field.type) if each is not type(None)]
        optional = type(None) in typing.get_args(field.type)
        values = wrong(options[0] if optional else field.type, field.metadata.get("signed", False))
        yield prefix + field.name, values if optional else st.one_of(values, st.none())


KEYS = [
    *(pair for pair in wrong_fields(Config) if pair[0] not in ("train", "lora")),
    *wrong_fields(TrainConfig, "train."),
]


@experiment(
    "R12",
    "A wrong value or an unknown key in a run's configuration is a ValueError that names it",
    full=1000,
    small=30,
)
def wrong_run(folder: Path, trials: int) -> Outcome:
    failures: list[str] = []
    path = folder / "run.yaml"

    @settings(max_examples=trials, deadline=None, database=None, suppress_health_check=list(HealthCheck))
    @given(st.one_of([st.tuples(st.just(key), values) for key, values in KEYS] + [unknown_keys()]))
    def attempt(change: tuple[str, Any]) -> None:
        key, value = change
        run: dict[str, Any] = {
            "output_dir": "out",
            "model": {"_class_name": "LocalDiTTransformer2DModel"},
            "objective": {"name": "denoising"},
            "train": {"max_steps": 10, "batch_size": 2},
        }
        section = run
        *above, last = key.split(".")
        for name in above:
            section = section[name]
        section[last] = value
        path.write_text(yaml.safe_dump(run))
        if why := not_refused(lambda: load_config(path), last):
            failures.append(f"{key}: {value!r} {why}")

    attempt()
    return Outcome(trials, max(trials - len(failures), 0), "; ".join(sorted(set(failures))[:3]))


def unknown_keys() -> st.SearchStrategy[tuple[str, Any]]:
    known = {key for key, _ in KEYS} | {"train", "lora"}
    keys = st.builds("{}{}".format, st.sampled_from(["", "train."]), WORDS)
    return st.tuples(keys.filter(lambda key: key not in known), st.integers())


SIZES = (
    "num_attention_heads",
    "attention_head_dim",
    "in_channels",
    "out_channels",
    "num_layers",
    "caption_channels",
    "sample_size",
    "patch_size",
    "window_size",
)
NO_SIZE = st.one_of(
    st.integers(max_value=0), st.floats(), WORDS, st.booleans(), st.lists(st.integers(), max_size=2)
)
SWITCHES = ("attention_residual", "global_context", "rope", "use_additional_conditions")
FIELDS: dict[str, st.SearchStrategy[Any]] = {
    **dict.fromkeys(SIZES, st.one_of(NO_SIZE, st.integers(10**10, 10**15))),
    "sample_size": NO_SIZE,  # nothing is as large as it: a huge one costs nothing
    **{name: st.one_of(WORDS, st.floats(), st.lists(st.booleans(), max_size=1)) for name in SWITCHES},
    "norm_eps": st.one_of(WORDS, st.none(), st.just(math.nan), st.floats(max_value=-1e-9)),
    "qk_norm_eps": st.one_of(WORDS, st.none(), st.just(math.nan), st.floats(max_value=-1e-9)),
    "dropout": st.one_of(
        WORDS, st.none(), st.just(math.nan), st.floats(max_value=-0.1), st.floats(min_value=1.1)
    ),
    "interpolation_scale": st.one_of(WORDS, st.just(math.nan), st.floats(max_value=0)),
    "full_attention_layers": st.one_of(
        WORDS, st.integers(), st.lists(st.integers(2), min_size=1, max_size=3)
    ),
    "relative_position_bias": st.one_of(WORDS, st.floats(), st.lists(st.booleans(), max_size=1)),
}


@experiment(
    "R12",
    "So is one in a transformer's config, before anything is allocated: sizes of 10^10 too",
    full=1000,
    small=20,
)
def wrong_transformer(folder: Path, trials: int) -> Outcome:
    process, connection = start(build_wrong, trials)
    examples: dict[str, str] = {}
    count, passed, grown = 0, 0, 0
    for key, value, why, memory in sent(connection):
        count, passed, grown = count + 1, passed + (not why), max(grown, memory)
        if why:
            examples[key] = f"{value} {why}"
    process.join()
    note = f"memory grew by {grown / 2**20:.0f} MiB"
    if examples:
        key, example = next(iter(examples.items()))
        note += f"; not so for {', '.join(sorted(examples))}: `{key}`, say, of {example}"
    return Outcome(count, passed, note)


def build_wrong(trials: int, connection: Connection) -> None:
    """Build transformers of wrong configs, each in at most a second and two gigabytes."""
    diffusers.utils.logging.set_verbosity_error()
    size = int(Path("/proc/self/statm").read_text().split()[0]) * resource.getpagesize()
    resource.setrlimit(resource.RLIMIT_AS, (size + 2**31, resource.RLIM_INFINITY))
    LocalDiTTransformer2DModel(**TOY)
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    strategies = [st.tuples(st.just(key), values) for key, values in FIELDS.items()]

    @settings(max_examples=trials, deadline=None, database=None, suppress_health_check=list(HealthCheck))
    @given(st.one_of(strategies))
    def attempt(change: tuple[str, Any]) -> None:
        key, value = change
        with alarm(1):
            why = not_refused(lambda: LocalDiTTransformer2DModel(**TOY | {key: value}), key)
        memory = 1024 * (resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before)
        connection.send((key, repr(value)[:40], why, memory))

    attempt()


def not_refused(build: Callable[[], object], key: str) -> str:
    """Why this is no refusal by a ValueError that names the key; nothing if it is."""
    try:
        build()
    except ValueError as error:
        return "" if key in str(error) else f"is refused by {first_line(error)!r}"
    except (Exception, Overdue) as error:
        return f"ends in {type(error).__name__}"
    return "is accepted"


class Overdue(BaseException):
    """Not an Exception, so that nobody catches it on the way."""


@contextlib.contextmanager
def alarm(seconds: int) -> Iterator[None]:
    def ring(number: int, frame: FrameType | None) -> None:
        raise Overdue

    signal.signal(signal.SIGALRM, ring)
    signal.alarm(seconds)
    try:
        yield
    finally:
        signal.alarm(0)


def first_line(error: Exception) -> str:
    return str(error).splitlines()[0][:80]


# --- R13: weights that do not fit ---------------------------------------------------------------------------

Weights = dict[str, Tensor]


def missing(weights: Weights, name: str) -> Weights:
    return {key: value for key, value in weights.items() if key != name}


def surplus(weights: Weights, name: str) -> Weights:
    return weights | {f"{name}.more": torch.zeros(3)}


def misshapen(weights: Weights, name: str) -> Weights:
    return weights | {name: torch.zeros(*weights[name].shape, 2)}


def renamed(weights: Weights, name: str) -> Weights:
    return missing(weights, name) | {f"module.{name}": weights[name]}


def without_fused(weights: Weights, name: str) -> Weights:
    """The stale copies of a published file in place of what its network computes with."""
    block = random.choice(
        [key for key in weights if key.endswith(("attn1.to_qkv.weight", "attn1.to_q.weight"))]
    )
    fused = "to_qkv" in block
    other = block.replace("to_qkv", "to_q") if fused else block.replace("to_q", "to_qkv")
    return missing(weights, block) | {
        other: weights[block].chunk(3)[0] if fused else weights[block].repeat(3, 1)
    }


def processor_keys(weights: Weights, name: str) -> Weights:
    return weights | {"transformer_blocks.0.attn1.processor.unknown.weight": torch.zeros(3)}


CHANGES = (missing, surplus, misshapen, renamed, without_fused, processor_keys)


@experiment(
    "R13",
    "Weights that do not fit are refused with the name of what is missing, surplus or misshapen: "
    "`from_single_file` and a resume",
    full=300,
    small=6,
)
def weights_that_do_not_fit(folder: Path, trials: int) -> Outcome:
    model = LocalDiTTransformer2DModel(**TOY)
    file = folder / "weights.safetensors"
    model.save_single_file(file)
    published = load_file(file)
    ema = EMAModel(model.parameters())
    tensors, state = capture(model, ema, torch.optim.SGD(model.parameters()))
    optimizer = torch.optim.SGD(model.parameters())

    def read(weights: Weights) -> None:
        save_file({key: value.contiguous() for key, value in weights.items()}, file)
        LocalDiTTransformer2DModel.from_single_file(file, window_size=4)

    def resume(weights: Weights) -> None:
        restore(model, ema, optimizer, tensors | {"model": weights}, state)

    return change_weights(trials, [(published, read), (tensors["model"], resume)])


@experiment(
    "R13",
    "So they are by `from_pretrained` of a folder",
    full=300,
    small=6,
)
def folder_that_does_not_fit(folder: Path, trials: int) -> Outcome:
    diffusers.utils.logging.set_verbosity_error()
    LocalDiTTransformer2DModel(**TOY).save_pretrained(folder)
    file = folder / "diffusion_pytorch_model.safetensors"
    whole = load_file(file)

    def read(weights: Weights) -> None:
        save_file({key: value.contiguous() for key, value in weights.items()}, file)
        LocalDiTTransformer2DModel.from_pretrained(folder)

    return change_weights(trials, [(whole, read)])


def change_weights(trials: int, entries: list[tuple[Weights, Callable[[Weights], None]]]) -> Outcome:
    passed, failures = 0, Counter[str]()
    for number in range(trials):
        whole, read = entries[number % len(entries)]
        change = CHANGES[number // len(entries) % len(CHANGES)]
        weights = change(whole, random.choice(list(whole)))
        differing = [
            key
            for key in whole.keys() | weights.keys()
            if key not in whole or key not in weights or whole[key].shape != weights[key].shape
        ]
        try:
            read(weights)
            message = ""
        except (ValueError, RuntimeError) as error:
            message = str(error)
        named = any(key.removeprefix("module.").split(".", 2)[-1] in message for key in differing)
        passed += bool(message) and named
        if not (message and named):
            failures[f"{change.__name__.replace('_', ' ')}: {'not named' if message else 'accepted'}"] += 1
    return Outcome(trials, passed, "; ".join(f"{what} ({count})" for what, count in failures.items()))
