"""What a run tells: a line of JSON every few steps, trackers, a progress bar, previews, unusable samples."""

import json
from collections.abc import Iterator, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
import yaml
from accelerate import Accelerator
from accelerate.tracking import get_available_trackers
from accelerate.utils import LoggerType
from diffusers.utils import logging
from PIL import Image
from torch import Tensor
from tqdm import tqdm

from localdit.files import staged_file
from localdit.training.config import Config

logger = logging.get_logger(__name__)


def check_trackers(names: Sequence[str]) -> None:
    """Raise ImportError for a tracker that is not installed, which accelerate would go on without."""
    there = {str(tracker) for tracker in (*get_available_trackers(), LoggerType.ALL)}
    for name in names:
        if name in map(str, LoggerType) and name not in there:
            raise ImportError(f"train.log_with names {name}, which is not installed: pip install {name}")


class Journal:
    """The files of a run, in its folder:

    - config.yaml: all that the run depends on.
    - log.jsonl: loss, gradient norm, learning rate and speed every `train.log_every` steps, and validation
      losses. A run that goes on from a checkpoint forgets the lines of what it does again.
    - preview-<step>.png.
    - unusable-<process>.jsonl: name and reason of each sample that was passed over.
    """

    def __init__(self, config: Config, accelerator: Accelerator, start: int):
        self.options, self.folder, self.accelerator = config.train, Path(config.output_dir), accelerator
        self.losses: list[Tensor] = []
        self.skipped = self.seen = self.unusable = 0
        self.bar: Any = None
        if accelerator.is_main_process:
            plain = json.loads(json.dumps(asdict(config)))
            (self.folder / "config.yaml").write_text(yaml.safe_dump(plain, sort_keys=False))
            path = self.folder / "log.jsonl"
            lines = path.read_text().splitlines(keepends=True) if path.exists() else []
            taken = [json.loads(line) for line in lines]
            # What was validated after the last of these steps is validated again.
            kept = [one["step"] < start or (one["step"] == start and "loss" in one) for one in taken]
            path.write_text("".join(line for line, keep in zip(lines, kept) if keep))
        if self.options.log_with:
            accelerator.init_trackers("localdit", {"config": json.dumps(asdict(config))})

    def progress(self, steps: range) -> Iterator[int]:
        """Go through the steps with a progress bar."""
        with tqdm(
            total=steps.stop,
            initial=steps.start,
            unit="step",
            disable=not self.accelerator.is_main_process,
            dynamic_ncols=True,
        ) as self.bar:
            try:
                for step in steps:
                    yield step
                    self.bar.update()
            finally:  # also of a run that is stopped: trackers write what they still hold
                if self.options.log_with:
                    self.accelerator.end_training()

    def pass_over(self, name: str, reason: str) -> None:
        """Note a sample that cannot be used.

        Raises:
            ValueError: They are more than `train.max_bad_fraction` of what this process has seen.
        """
        self.unusable += 1
        logger.warning(f"passed over {name}: {reason}")
        path = self.folder / f"unusable-{self.accelerator.process_index}.jsonl"
        with open(path, "a") as file:
            file.write(json.dumps({"name": name, "reason": reason}) + "\n")
        # The first hundred samples count as a hundred, so that one early bad one is no 100 %.
        if self.unusable > self.options.max_bad_fraction * max(self.seen, 100):
            raise ValueError(
                f"{self.unusable} of {self.seen} samples are unusable, more than train.max_bad_fraction "
                f"({self.options.max_bad_fraction}): see {path}"
            )

    def steps(self, step: int, norm: float, rate: float, figures: dict[str, float]) -> None:
        """Write the line of the steps up to this one, with more figures."""
        loss = self.accelerator.reduce(torch.stack(self.losses).mean(), "mean").item()
        self.losses.clear()
        self.bar.set_postfix(loss=f"{loss:.4f}")
        line = {"loss": loss, "gradient_norm": norm, "learning_rate": rate, "skipped_steps": self.skipped}
        self._write(step, {**line, **figures})

    def validation(self, step: int, losses: dict[str, float]) -> None:
        """Write a line of validation losses."""
        if losses:
            self._write(step, losses)

    def preview(self, step: int, picture: Image.Image | None) -> None:
        """Write a preview, if there is one."""
        if picture is not None and self.accelerator.is_main_process:
            with staged_file(self.folder / f"preview-{step:08d}.png") as staged:
                picture.save(staged, format="PNG")

    def _write(self, step: int, line: dict[str, Any]) -> None:
        if self.accelerator.is_main_process:
            with open(self.folder / "log.jsonl", "a") as log:
                log.write(json.dumps({"step": step, **line}) + "\n")
        if self.options.log_with:
            self.accelerator.log(line, step=step)
