"""The study of docs/studies/extrapolation.md: train at one size, draw at larger ones, and write its tables.

    python docs/studies/extrapolation.py

Finished runs and measurements are kept under runs/studies/extrapolation and not done again.
"""

import json
import math
from importlib import import_module
from pathlib import Path
from typing import Any, ClassVar

import torch
from diffusers import DiffusionPipeline
from diffusers import ModelMixin as ModelMixin  # diffusers, loading a saved model, looks for it in its module
from diffusers.configuration_utils import register_to_config
from diffusers.utils import make_image_grid
from pages import fill, spread
from PIL import Image
from torch import Tensor, nn

from localdit import LEDiTPipeline, LEDiTTransformer2DModel, LocalDiTPipeline
from localdit.data.scenes import COLORS, SHAPES
from localdit.evaluation.generation import draw
from localdit.evaluation.scenes import evaluate_scenes
from localdit.models.layers import rotate, sincos_table
from localdit.models.ledit import LEDiTAttention, LEDiTBlock
from localdit.models.local_dit import rotary_table
from localdit.training.config import load_config
from localdit.training.loop import train

ROOT = Path(__file__).parents[2]
RUNS = Path("runs/studies/extrapolation")
PAGE = Path(__file__).with_suffix(".md")
LEDIT = ROOT / "configs/ledit/study_extrapolation.yaml"
LOCAL = ROOT / "configs/local_dit/study_extrapolation.yaml"
# The network without LEDiT's two sources of position.
PLAIN = ["model.attention_pattern=none", "model.conv_kernel_size=0"]
# Names of the models, their recipe, and what they change in it.
ARMS: dict[str, tuple[Path, list[str]]] = {
    "LEDiT": (LEDIT, []),
    "sine-cosine": (LEDIT, [*PLAIN, "model._class_name=extrapolation.SineDiT"]),
    "RoPE": (LEDIT, [*PLAIN, "model._class_name=extrapolation.RotaryDiT"]),
    "LocalDiT": (LOCAL, ["model.global_context=true"]),
    "LocalDiT, windows alone": (LOCAL, ["model.global_context=false"]),
}
SEEDS = (0, 1, 2)
SIDES = (128, 192, 256)  # pixels; trained at the first
PICTURES = 96  # of each run and side, each class twice
SHOWN = ("red circle", "blue star", "yellow cross")
SAMPLING = {"num_inference_steps": 20, "guidance_scale": 3.0}
SCORES = {"one object": "count", "colour": "color", "colour and shape": "color and shape"}


# --- The twins ----------------------------------------------------------------------------------------------


class PlacedPatches(nn.Conv2d):
    """Patches, each with the sine-cosine embedding of its row and column, in tokens (DiT)."""

    def forward(self, x: Tensor) -> Tensor:
        """x: (B, C, H, W). Returns (B, D, h, w)."""
        x = super().forward(x)
        rows, columns = (torch.arange(side, device=x.device, dtype=torch.float64) for side in x.shape[2:])
        table = sincos_table(rows, columns, x.shape[1])  # (N, D)
        return x + table.T.unflatten(1, x.shape[2:]).to(x.dtype)


class SineDiT(LEDiTTransformer2DModel):
    """LEDiT's network, told of positions as DiT is. `positions=False` leaves them out."""

    @register_to_config
    def __init__(self, positions: bool = True, **kwargs: Any):
        super().__init__(**kwargs)
        if positions:
            own = self.patch_embed
            self.patch_embed = PlacedPatches(
                own.in_channels, own.out_channels, own.kernel_size, stride=own.stride
            )
            self.init_weights()


class RotaryAttention(LEDiTAttention):
    """Attention whose queries and keys are rotated by row and column, in tokens, of a square picture."""

    def project(self, x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        q, k, v = super().project(x)
        side = math.isqrt(x.shape[1])
        rotary = rotary_table(side, side, q.shape[-1], x.device)  # (N, d/2, 2)
        return rotate(q, rotary), rotate(k, rotary), v


class RotaryBlock(LEDiTBlock):
    def __init__(self, config: Any, index: int):
        super().__init__(config, index)
        if config.positions:
            self.attn1 = RotaryAttention(
                config.num_attention_heads * config.attention_head_dim, config.num_attention_heads
            )


class RotaryDiT(LEDiTTransformer2DModel):
    """LEDiT's network with rotary positions. `positions=False` leaves them out."""

    block_class = RotaryBlock

    @register_to_config
    def __init__(self, positions: bool = True, **kwargs: Any):
        super().__init__(**kwargs)


class LocalDiTOfClasses(LocalDiTPipeline):
    """A LocalDiT that is asked for classes by their names, which are its prompts."""

    labels: ClassVar = {name: label for label, name in enumerate(f"{c} {s}" for c in COLORS for s in SHAPES)}


# --- Runs ---------------------------------------------------------------------------------------------------


def folder(arm: str, seed: int) -> Path:
    return RUNS / f"{arm.replace(', ', '-').replace(' ', '-')}-{seed}"


def train_run(arm: str, seed: int) -> None:
    recipe, changes = ARMS[arm]
    run = folder(arm, seed)
    if not (run / "final").exists():
        train(load_config(recipe, [*changes, f"output_dir={run}", f"train.seed={seed}"]))


def load(arm: str, seed: int) -> DiffusionPipeline:
    # The saved twins are classes of this file by its name, which a run that trains nothing has not imported.
    import_module("extrapolation")
    kind = LocalDiTOfClasses if ARMS[arm][0] == LOCAL else LEDiTPipeline
    pipeline = kind.from_pretrained(folder(arm, seed) / "final")
    pipeline.set_progress_bar_config(disable=True)
    return pipeline


def evaluate(arm: str, seed: int) -> dict[str, dict[str, float]]:
    """For each side in pixels, the share of right pictures in each respect."""
    kept = folder(arm, seed) / "study.json"
    if not kept.exists():
        pipeline = load(arm, seed)
        found = {
            str(side): evaluate_scenes(pipeline, count=PICTURES, seed=1, height=side, width=side, **SAMPLING)[
                "one_object"
            ]
            for side in SIDES
        }
        kept.write_text(json.dumps(found), encoding="utf-8")
    return json.loads(kept.read_text(encoding="utf-8"))


# --- Results ------------------------------------------------------------------------------------------------


def accuracy_table(results: dict[str, list[dict[str, dict[str, float]]]]) -> str:
    lines = ["| | | " + " | ".join(results) + " |", "| --- | --- |" + " ---: |" * len(results)]
    for side in SIDES:
        for title, respect in SCORES.items():
            cells = [spread([100 * one[str(side)][respect] for one in of]) for of in results.values()]
            lines.append(f"| {side}x{side} | {title} | " + " | ".join(cells) + " |")
    return "\n".join(lines)


def size_table() -> str:
    """Parameters of each model, which differ in what tells them of positions."""
    counts = {arm: load(arm, SEEDS[0]).transformer.num_parameters() for arm in ARMS}
    rows = [f"| {arm} | {count:,} |" for arm, count in counts.items()]
    return "\n".join(["| | parameters |", "| --- | ---: |", *rows])


def picture_grid() -> Image.Image:
    """A row for each model, of the same classes and seeds at each side, all brought to the smallest."""
    cells = []
    for arm in ARMS:
        pipeline = load(arm, SEEDS[0])
        for side in SIDES:
            drawn = draw(pipeline, SHOWN, range(len(SHOWN)), height=side, width=side, **SAMPLING)
            cells += [picture.resize(SIDES[:1] * 2, Image.Resampling.LANCZOS) for picture in drawn]
    return make_image_grid(cells, rows=len(ARMS), cols=len(SIDES) * len(SHOWN))


def main() -> None:
    for seed in SEEDS:
        for arm in ARMS:
            train_run(arm, seed)
    results = {arm: [evaluate(arm, seed) for seed in SEEDS] for arm in ARMS}
    picture_grid().save(PAGE.with_suffix(".png"), optimize=True)
    fill(PAGE, {"accuracy": accuracy_table(results), "sizes": size_table()})


if __name__ == "__main__":
    main()
