"""The training loop: one for every architecture and objective.

Each batch draws all its random numbers from (seed, batch, process), and its samples from (seed, epoch,
position): a resumed run goes on as the unbroken one would have.
"""

import json
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from dataclasses import asdict
from functools import lru_cache, partial
from pathlib import Path
from typing import Any, cast

import diffusers
import torch
import yaml
from accelerate import Accelerator
from diffusers.optimization import get_scheduler
from diffusers.training_utils import EMAModel
from diffusers.utils import logging
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.data import DataLoader, Dataset, Sampler
from tqdm import tqdm

import localdit
from localdit.training import text_encoder
from localdit.training.checkpoint import checkpoints, load_checkpoint, save_checkpoint
from localdit.training.config import Config, TrainConfig
from localdit.training.objectives import build_objective
from localdit.training.optimizers import build_optimizer

logger = logging.get_logger(__name__)


def train(config: Config, resume: str = "auto") -> Path:
    """Train a model, and export its averaged weights.

    Args:
        config: The run.
        resume: "auto" goes on from the newest checkpoint in `output_dir` where there is one, "never" starts
            anew, a path goes on from that checkpoint.

    Returns:
        The folder of the finished model, `output_dir/final`.
    """
    options, run = config.train, Path(config.output_dir)
    if options.num_threads:
        torch.set_num_threads(options.num_threads)
    accelerator = Accelerator(
        mixed_precision=options.mixed_precision, gradient_accumulation_steps=options.gradient_accumulation
    )
    torch.manual_seed(options.seed)
    objective = build_objective(config.objective)
    bare_model = build_model(config.model)
    if config.init_from:
        start_from(bare_model, config.init_from)
    if options.gradient_checkpointing:
        bare_model.enable_gradient_checkpointing()
    with accelerator.main_process_first():
        run.mkdir(parents=True, exist_ok=True)
        data = objective.prepare(bare_model, run, accelerator.device)
    if accelerator.is_main_process:
        (run / "config.yaml").write_text(
            yaml.safe_dump(json.loads(json.dumps(asdict(config))), sort_keys=False)
        )

    bare_model.to(accelerator.device)
    optimizer = build_optimizer(bare_model, options)
    ema = EMAModel(bare_model.parameters(), decay=options.ema_decay, use_ema_warmup=True, power=0.75)
    step = 0
    if checkpoint := find_checkpoint(run, resume):
        step = load_checkpoint(checkpoint, bare_model, ema, optimizer)
        logger.info(f"resumed from {checkpoint}")
    rate = learning_rate(options)
    if options.compile:
        bare_model.compile()
    model, optimizer = accelerator.prepare(bare_model, optimizer)

    rank, world = accelerator.process_index, accelerator.num_processes
    order = Order(len(data), options, step, rank, world)
    batches: Any = DataLoader(
        cast("Dataset[dict[str, Tensor]]", data), batch_sampler=order, num_workers=options.num_workers
    )
    progress = tqdm(
        total=options.max_steps,
        initial=step,
        unit="step",
        disable=not accelerator.is_main_process,
        dynamic_ncols=True,
    )
    # On a CPU in bfloat16 the flash kernel's backward pass takes ten times that of plain matrix products.
    plain = accelerator.device.type == "cpu" and options.mixed_precision != "no"
    attention = partial(sdpa_kernel, SDPBackend.MATH) if plain else nullcontext
    losses: list[Tensor] = []
    started = time.monotonic()
    model.train()

    for index, batch in zip(order.batches, batches):
        seed_batch(options.seed, index, rank)
        for group in optimizer.param_groups:
            group["lr"] = rate(step)
        with accelerator.accumulate(model), attention():
            loss = objective.loss(
                model, **{key: value.to(accelerator.device) for key, value in batch.items()}
            )
            accelerator.backward(loss)
            if accelerator.sync_gradients:
                norm = accelerator.clip_grad_norm_(model.parameters(), options.max_grad_norm)
            optimizer.step()
            optimizer.zero_grad()
        losses.append(loss.detach())
        if not accelerator.sync_gradients:
            continue  # still accumulating

        step += 1
        ema.step(bare_model.parameters())
        progress.update()
        if step % options.log_every == 0 or step == options.max_steps:
            mean_loss = accelerator.reduce(torch.stack(losses).mean(), "mean").item()
            if not torch.isfinite(torch.tensor(mean_loss)):
                raise FloatingPointError(
                    f"the loss is {mean_loss} at step {step}; the last checkpoint is in {run}"
                )
            speed = len(losses) * options.batch_size * world / (time.monotonic() - started)
            losses, started = [], time.monotonic()
            progress.set_postfix(loss=f"{mean_loss:.4f}")
            if accelerator.is_main_process:
                line = {
                    "step": step,
                    "loss": mean_loss,
                    "gradient_norm": float(norm),
                    "learning_rate": rate(step - 1),
                    "samples_per_second": speed,
                }
                with open(run / "log.jsonl", "a") as log:
                    log.write(json.dumps(line) + "\n")
        if accelerator.is_main_process and (step % options.save_every == 0 or step == options.max_steps):
            save_checkpoint(run, step, bare_model, ema, optimizer, options.keep_checkpoints)
        if accelerator.is_main_process and options.preview_every and step % options.preview_every == 0:
            with averaged(bare_model, ema):
                if (picture := objective.preview(bare_model)) is not None:
                    picture.save(run / f"preview-{step:08d}.png")

    progress.close()
    accelerator.wait_for_everyone()
    if accelerator.is_main_process:
        with averaged(bare_model, ema):
            objective.export(bare_model, run / "final")
    return run / "final"


def build_model(values: dict[str, Any]) -> Any:
    """The model that `_class_name` says, ours or diffusers', with the other values as its config, strictly.

    Raises:
        ValueError: An unknown class or an unknown config field.
    """
    name = values.get("_class_name", "")
    for home in (localdit, text_encoder, diffusers):
        if name and (model_class := getattr(home, name, None)) is not None:
            break
    else:
        raise ValueError(f"model._class_name must name a model of localdit or diffusers, got {name!r}")
    fields = {key: value for key, value in values.items() if key != "_class_name"}
    known = model_class._get_init_keys(model_class) - {"self"}
    if unknown := sorted(set(fields) - known):
        raise ValueError(f"unknown key model.{unknown[0]}; {name} knows {', '.join(sorted(known))}")
    return model_class.from_config({**fields, "_class_name": name})


def start_from(model: Any, folder: str) -> None:
    """Take the weights of a saved model of the same class and sizes, or of the pipeline's part that is one.

    Raises:
        ValueError: There is no model there, or its parameters have other names or shapes.
    """
    place = next(
        (p for p in (Path(folder, "transformer"), Path(folder)) if (p / "config.json").is_file()), None
    )
    if place is None:
        raise ValueError(f"init_from must be the folder of a saved model or pipeline, got {folder!r}")
    model.load_state_dict(type(model).from_pretrained(place).state_dict())


def find_checkpoint(run: Path, resume: str) -> Path | None:
    """The checkpoint that `resume` ("auto", "never" or a path) means, if any."""
    if resume == "never":
        return None
    if resume == "auto":
        found = checkpoints(run)
        return found[-1] if found else None
    if not (Path(resume) / "state.json").is_file():
        raise ValueError(f"resume must be auto, never or the path of a checkpoint, got {resume!r}")
    return Path(resume)


def learning_rate(options: TrainConfig) -> Callable[[int], float]:
    """The learning rate after a number of steps: warm-up, then diffusers' schedule of that name."""
    name = "constant_with_warmup" if options.schedule == "constant" else options.schedule
    optimizer = torch.optim.SGD(
        [torch.zeros(())], lr=options.learning_rate
    )  # a schedule cannot be had without one
    schedule = get_scheduler(
        name, optimizer, num_warmup_steps=options.warmup_steps, num_training_steps=options.max_steps
    )
    (multiplier,) = schedule.lr_lambdas
    return lambda step: options.learning_rate * multiplier(step)


def seed_batch(seed: int, index: int, rank: int) -> None:
    """Seed all that this process draws for its batch number `index`."""
    torch.manual_seed(hash((seed, index, rank)) % 2**63)


@contextmanager
def averaged(model: nn.Module, ema: EMAModel) -> Iterator[None]:
    """The model with its averaged weights, in evaluation mode."""
    training = model.training
    ema.store(model.parameters())
    ema.copy_to(model.parameters())
    model.eval()
    try:
        yield
    finally:
        ema.restore(model.parameters())
        model.train(training)


class Order(Sampler[list[int]]):
    """Which samples make each batch of this process, from (seed, epoch, position) alone."""

    def __init__(self, count: int, options: TrainConfig, step: int, rank: int, world: int):
        self.count, self.options, self.rank, self.world = count, options, rank, world
        self.batches = range(
            step * options.gradient_accumulation, options.max_steps * options.gradient_accumulation
        )

    def __len__(self) -> int:
        return len(self.batches)

    def __iter__(self) -> Iterator[list[int]]:
        size = self.options.batch_size
        for batch in self.batches:
            start = (batch * self.world + self.rank) * size
            yield [self.sample(position) for position in range(start, start + size)]

    def sample(self, position: int) -> int:
        epoch, place = divmod(position, self.count)
        return int(_permutation(self.options.seed, epoch, self.count)[place])


@lru_cache(maxsize=2)
def _permutation(seed: int, epoch: int, count: int) -> torch.Tensor:
    return torch.randperm(count, generator=torch.Generator().manual_seed(seed * 1_000_003 + epoch))
