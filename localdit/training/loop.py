"""The training loop: one for every architecture and objective.

Each sample's picture, crop, caption, noise and timestep follow from the seed and the sample's position in the
run (`localdit.training.order`): a resumed run goes on as the unbroken one would have, and several processes
take the steps that one would.
"""

import math
from collections.abc import Callable, Iterable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext, suppress
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator, DistributedDataParallelKwargs
from diffusers.optimization import get_scheduler
from diffusers.training_utils import EMAModel
from diffusers.utils import logging
from torch import Tensor, nn
from torch.distributed.tensor import DTensor
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.data import DataLoader, Dataset

from localdit.assets import MINI
from localdit.data.images import BadSample
from localdit.data.samples import Samples
from localdit.files import locked, staged_folder
from localdit.training import text_encoder
from localdit.training.checkpoint import find_checkpoint, load_checkpoint, save_checkpoint
from localdit.training.classes import find_class
from localdit.training.config import Config, LoraConfig, TrainConfig
from localdit.training.journal import Journal, check_trackers
from localdit.training.objectives import build_objective
from localdit.training.optimizers import build_optimizer
from localdit.training.order import Draws, Order, ProcessBatches, Resampled
from localdit.training.sharding import check_engine, gathered, prepare
from localdit.training.state import capture, restore, trained
from localdit.training.stopping import Stopped, stop_request
from localdit.training.throughput import Throughput

logger = logging.get_logger(__name__)


def train(config: Config, resume: str = "auto") -> Path:
    """Train a model, and export its averaged weights.

    Args:
        config: The run.
        resume: "auto" goes on from the newest checkpoint in `output_dir` where there is one, "never" starts
            anew, a path goes on from that checkpoint.

    Returns:
        The folder of the finished model, `output_dir/final`.

    Raises:
        Stopped: SIGTERM or Ctrl-C came; the work up to the step just taken is in a checkpoint.
        FloatingPointError: The gradients of too many steps in a row were not finite.
        ValueError: Too many samples are unusable, or a value of the configuration is wrong.
        ImportError: A tracker or the optimizer is not installed.
        BlockingIOError: Another process trains in this folder.
    """
    options, run = config.train, Path(config.output_dir)
    if options.num_threads:
        torch.set_num_threads(options.num_threads)
    check_trackers(options.log_with)
    data_parallel = DistributedDataParallelKwargs()
    accelerator = Accelerator(
        mixed_precision=options.mixed_precision,
        log_with=list(options.log_with) or None,
        project_dir=run,
        kwargs_handlers=[data_parallel],
    )
    check_engine(accelerator, options.optimizer)
    rank, world = accelerator.process_index, accelerator.num_processes
    torch.manual_seed(options.seed)
    objective = build_objective(config.objective)
    bare_model = starting_model(config)
    run.mkdir(parents=True, exist_ok=True)

    with stop_request() as stop, locked(run) if accelerator.is_main_process else nullcontext():
        checkpoint = find_checkpoint(run, resume)
        data = objective.prepare(bare_model, run, accelerator, stop)
        bare_model.to(accelerator.device)
        optimizer = build_optimizer(bare_model, options)
        # Without being told, processes wait for the gradients of parameters that nothing reads.
        data_parallel.find_unused_parameters = getattr(bare_model, "has_unread_parameters", False)
        model, optimizer = prepare(accelerator, bare_model, optimizer)
        bare_model = accelerator.unwrap_model(model)
        parameters = trained(bare_model)
        ema = EMAModel(
            parameters.values(),
            decay=options.ema_decay,
            update_after_step=options.ema_start,
            # An average that begins late has no first weights to forget.
            min_decay=options.ema_decay if options.ema_start else 0.0,
            use_ema_warmup=True,
            power=0.75,
        )
        start = 0
        if checkpoint:
            tensors, state = load_checkpoint(checkpoint)
            restore(bare_model, ema, optimizer, tensors, state)
            start = state["step"]
            logger.info(f"goes on from {checkpoint}")

        batch_size = options.batch_size * world * options.gradient_accumulation
        kind: type[Order | Resampled] = Resampled if options.resample else Order
        order = kind(data.groups, len(data), batch_size, options.seed, data.shards, options.shard_window)
        steps = range(start, options.max_steps)
        batches: Any = DataLoader(
            Items(data),
            batch_sampler=ProcessBatches(order, steps, options.batch_size, rank, world),
            collate_fn=list,
            num_workers=options.num_workers,
        )
        batches = iter(batches)
        journal = Journal(config, accelerator, start)
        throughput = Throughput(accelerator.device, options.peak_tflops)
        rate = learning_rate(options)
        set_mode(optimizer, "train")
        model.train()
        skipped_in_a_row = 0

        def look(done: int) -> None:
            """Validate and preview, where that is due after so many steps. A run that is stopped before or in
            this does it when it goes on."""
            if options.validate_every and done % options.validate_every == 0:
                with averaged(accelerator, bare_model, ema, optimizer):
                    journal.validation(done, objective.validate(bare_model, accelerator, stop))
            if options.preview_every and done % options.preview_every == 0:
                with averaged(accelerator, bare_model, ema, optimizer):
                    journal.preview(done, objective.preview(bare_model, stop))

        if checkpoint:
            look(start)
            if stop.anywhere(accelerator):
                raise Stopped(f"stopped after step {start}; the same command goes on from there")
        for step in journal.progress(steps):
            for group in optimizer.param_groups:
                group["lr"] = rate(step) * group["learning_rate_scale"]
            for accumulated in range(1, options.gradient_accumulation + 1):
                batch, positions = usable(next(batches), data, journal)
                # With nothing to learn from it goes along: others wait for it, under FSDP2 at every block.
                weight = 1.0 if positions else 0.0
                if not positions:
                    batch, positions = stand_in(data)
                draws = Draws(options.seed, positions, accelerator.device, step)
                seed_dropout(options.seed, step, accumulated, rank)
                last = accumulated == options.gradient_accumulation
                with (
                    nullcontext() if last else accelerator.no_sync(model),
                    attention_kernels(accelerator),
                    throughput.count(shapes_of(batch), len(positions)),
                ):
                    loss = weight * objective.loss(model, draws, **to_device(batch, accelerator.device))
                    accelerator.backward(loss / options.gradient_accumulation)
                journal.losses.append(loss.detach())

            norm = gradient_norm(accelerator, parameters.values(), options.max_grad_norm)
            # In float16 the scaler itself leaves out such a step, and lowers its scale.
            if finite := math.isfinite(norm) or accelerator.scaler is not None:
                optimizer.step()
            optimizer.zero_grad()
            if finite and not optimizer.step_was_skipped:
                ema.step(parameters.values())
                skipped_in_a_row = 0
            else:
                journal.skipped += 1
                skipped_in_a_row += 1
            done = step + 1

            if done % options.log_every == 0 or done == options.max_steps:
                figures = {**throughput.report(world), **objective.report(bare_model)}
                journal.steps(done, norm, rate(step), figures)
            failing = skipped_in_a_row > options.max_skipped_steps
            if not failing:
                look(done)
            stopping = stop.anywhere(accelerator)
            if done % options.save_every == 0 or done == options.max_steps or stopping:
                tensors, values = capture(bare_model, ema, optimizer, keep=accelerator.is_main_process)
                if accelerator.is_main_process and not failing:
                    values |= {"samples": done * batch_size, "learning_rate": rate(step)}
                    values["config"] = asdict(config)
                    save_checkpoint(run, done, tensors, values, options.keep_checkpoints)
                del tensors
                accelerator.wait_for_everyone()
            if failing:
                raise FloatingPointError(
                    f"the gradients of {skipped_in_a_row} steps in a row, up to step {done}, were not "
                    f"finite; the last good checkpoint is in {run}"
                )
            if stopping:
                raise Stopped(f"stopped after step {done}; the same command goes on from there")

        with averaged(accelerator, bare_model, ema, optimizer):
            if accelerator.is_main_process:
                export(config, objective, trained(bare_model), accelerator.device)
            accelerator.wait_for_everyone()
    return run / "final"


def starting_model(config: Config) -> Any:
    """The model that a run begins with: fresh or given weights, with a LoRA if one is trained."""
    model = build_model(config.model)
    if config.init_from:
        start_from(model, config.init_from, config.model)
    if config.lora:
        add_lora(model, config.lora)
    if config.train.gradient_checkpointing:
        model.enable_gradient_checkpointing()
    if config.train.compile:
        if getattr(model, "_repeated_blocks", None):
            model.compile_repeated_blocks()
        else:
            model.compile()
    return model


def build_model(values: dict[str, Any]) -> Any:
    """The model that `_class_name` says (see `find_class`), with the other values as its config, strictly.

    Raises:
        ValueError: An unknown class or an unknown config field.
    """
    name = values.get("_class_name", "")
    model_class = find_class("model._class_name", name, text_encoder)
    fields = {key: value for key, value in values.items() if key != "_class_name"}
    known = model_class._get_init_keys(model_class) - {"self"}
    if unknown := sorted(set(fields) - known):
        raise ValueError(f"unknown key model.{unknown[0]}; {name} knows {', '.join(sorted(known))}")
    return model_class.from_config({**fields, "_class_name": model_class.__name__})


def start_from(model: Any, source: str, values: dict[str, Any]) -> None:
    """Take the weights of a saved model of the same class and shapes, of the pipeline's part that is one,
    "mini" for that of the package, or of a published checkpoint.

    Tables that depend on the size of the picture are computed and not loaded: a model of another
    `sample_size` or `interpolation_scale` takes the weights and keeps its own grid.

    Raises:
        ValueError: There is no model there, or its parameters have other names or shapes.
    """
    if Path(source).is_file():
        fields = {key: value for key, value in values.items() if key != "_class_name"}
        found = type(model).from_single_file(source, **fields)
    else:
        place = MINI if source == "mini" else source
        places = (Path(place, "transformer"), Path(place))
        folder = next((place for place in places if (place / "config.json").is_file()), None)
        if folder is None:
            raise ValueError(
                "init_from must be the folder of a saved model or pipeline, 'mini', or a published "
                f"checkpoint, got {source!r}"
            )
        found = type(model).from_pretrained(folder)
    try:
        model.load_state_dict(found.state_dict())
    except RuntimeError as error:
        raise ValueError(f"init_from {source!r} does not fit the model: {error}") from None


def add_lora(model: Any, lora: LoraConfig) -> None:
    """Freeze the model and put a LoRA beside the layers that `lora` names."""
    try:
        import peft
    except ImportError as error:
        raise ImportError("a LoRA needs peft, of the extra 'lora': pip install 'localdit[lora]'") from error
    model.requires_grad_(False)
    model.add_adapter(
        peft.LoraConfig(
            r=lora.rank,
            lora_alpha=lora.alpha,
            lora_dropout=lora.dropout,
            target_modules=list(lora.target_modules),
            init_lora_weights="gaussian",
        )
    )


def export(config: Config, objective: Any, weights: dict[str, nn.Parameter], device: torch.device) -> None:
    """Write the finished model, rebuilt whole from its weights, with a manifest."""
    model = starting_model(config)
    own = trained(model)
    with torch.no_grad():
        for name, parameter in own.items():
            parameter.copy_(weights[name])
    with staged_folder(Path(config.output_dir) / "final", replace=True) as staged:
        objective.export(model.to(device).eval(), staged)


class Items(Dataset[tuple[int, Any]]):
    """What the data loader reads: (position, sample), or in the sample's place its name and what is wrong."""

    def __init__(self, data: Samples):
        self.data = data

    def __getitem__(self, key: tuple[int, int]) -> tuple[int, Any]:
        index, position = key
        try:
            return position, self.data[index, position]
        except BadSample as error:
            return position, (self.data.name(index), str(error))


def usable(items: list[tuple[int, Any]], data: Samples, journal: Journal) -> tuple[dict[str, Any], list[int]]:
    """The samples that can be used, as a batch, and their positions."""
    journal.seen += len(items)
    good = [(position, sample) for position, sample in items if isinstance(sample, dict)]
    for _, sample in items:
        if not isinstance(sample, dict):
            journal.pass_over(*sample)
    return (data.collate([sample for _, sample in good]) if good else {}), [position for position, _ in good]


def stand_in(data: Samples) -> tuple[dict[str, Any], list[int]]:
    """The first sample that can be read, as a batch, and its position.

    Raises:
        ValueError: There is none.
    """
    for index in range(len(data)):
        with suppress(BadSample):
            return data.collate([data[index, 0]]), [0]
    raise ValueError("none of the samples is usable")


def to_device(batch: dict[str, Any], device: torch.device) -> dict[str, Any]:
    return {
        key: value.to(device, non_blocking=True) if isinstance(value, Tensor) else value
        for key, value in batch.items()
    }


def shapes_of(batch: dict[str, Any]) -> tuple[Any, ...]:
    return tuple(value.shape if isinstance(value, Tensor) else None for value in batch.values())


def attention_kernels(accelerator: Accelerator) -> AbstractContextManager[Any]:
    """On a CPU in 16 bits the flash kernel's backward pass takes ten times that of plain matrix products."""
    plain = accelerator.device.type == "cpu" and accelerator.mixed_precision != "no"
    return sdpa_kernel(SDPBackend.MATH) if plain else nullcontext()


def gradient_norm(accelerator: Accelerator, parameters: Iterable[nn.Parameter], maximum: float) -> float:
    """Scale the gradients down to a norm of at most `maximum`. Returns what it was before."""
    norm = accelerator.clip_grad_norm_(parameters, maximum)
    return float(norm.full_tensor() if isinstance(norm, DTensor) else norm)


def learning_rate(options: TrainConfig) -> Callable[[int], float]:
    """The learning rate after a number of steps: warm-up, then diffusers' schedule of that name, raised in
    proportion so that it ends at the floor."""
    name = "constant_with_warmup" if options.schedule == "constant" else options.schedule
    # A schedule cannot be had without an optimizer.
    optimizer = torch.optim.SGD([torch.zeros(())], lr=options.learning_rate)
    schedule = get_scheduler(
        name, optimizer, num_warmup_steps=options.warmup_steps, num_training_steps=options.max_steps
    )
    (multiplier,) = schedule.lr_lambdas

    def rate(step: int) -> float:
        floor = options.learning_rate_floor if step >= options.warmup_steps else 0.0
        return options.learning_rate * (floor + (1 - floor) * multiplier(step))

    return rate


def seed_dropout(*words: int) -> None:
    """Seed what the model draws by itself, dropout, for one micro-batch of one process."""
    torch.manual_seed(Draws.seed(*words))


def set_mode(optimizer: Any, mode: str) -> None:
    """Schedule-free optimizers keep other weights for training ("train") than for use ("eval")."""
    if hasattr(optimizer.optimizer, mode):
        getattr(optimizer.optimizer, mode)()


@contextmanager
def averaged(accelerator: Accelerator, model: nn.Module, ema: EMAModel, optimizer: Any) -> Iterator[None]:
    """The model, whole, with its averaged weights, the EMA's or a schedule-free optimizer's, to evaluate."""
    parameters, own = list(trained(model).values()), hasattr(optimizer.optimizer, "eval")
    if own:
        set_mode(optimizer, "eval")
    else:
        ema.store(parameters)
        ema.copy_to(parameters)
    model.eval()
    try:
        with gathered(accelerator, model):
            yield
    finally:
        if own:
            set_mode(optimizer, "train")
        else:
            ema.restore(parameters)
        model.train()
