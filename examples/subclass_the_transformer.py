"""Change the transformer: another block, a config field and a condition of your own, in a subclass.

python examples/subclass_the_transformer.py

The new condition is a tint, a colour that each block hears of. All else is inherited, and still works: saving
and loading, LoRA, offloading, compilation, the pipeline.
"""

import argparse
from pathlib import Path
from typing import Any

import torch
from diffusers.configuration_utils import register_to_config
from diffusers.utils import make_image_grid
from PIL import Image, ImageChops
from torch import Tensor, nn

from localdit import MINI, LocalDiTPipeline, LocalDiTTransformer2DModel
from localdit.models.local_dit import LocalDiTBlock


class TintedBlock(LocalDiTBlock):
    """A block that adds a projection of the tint to its tokens."""

    def __init__(self, config: Any, index: int):
        super().__init__(config, index)
        self.tint = nn.Linear(config.tint_channels, config.num_attention_heads * config.attention_head_dim)

    # An argument with a name of its own is filled from the model's `attention_kwargs`.
    def forward(self, hidden_states: Tensor, *args: Any, tint: Tensor | None = None, **kwargs: Any) -> Tensor:
        if tint is not None:  # (B, tint_channels), or (1, tint_channels) for all
            hidden_states = hidden_states + self.tint(tint)[:, None]
        return super().forward(hidden_states, *args, **kwargs)


class TintedLocalDiT(LocalDiTTransformer2DModel):
    block_class = TintedBlock

    # This signature and the parent's make the config.
    @register_to_config
    def __init__(self, tint_channels: int = 3, **kwargs: Any):
        super().__init__(**kwargs)

    def init_weights(self) -> None:
        """The parent draws all linear layers; the new ones start silent, so that nothing changes at first."""
        super().init_weights()
        for block in self.transformer_blocks:
            nn.init.zeros_(block.tint.weight)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("prompt", nargs="?", default="a red circle left of a blue square")
    parser.add_argument("--model", default=MINI, help="pipeline folder or hub name (default: LocalDiT-Mini)")
    parser.add_argument("--steps", type=int, default=20)
    parser.add_argument("--out", type=Path, default=Path("outputs/subclass_the_transformer.png"))
    args = parser.parse_args()

    # 1. A model of the new class, with the weights of a trained one where there are any.
    pipe = LocalDiTPipeline.from_pretrained(args.model, dtype=torch.float32)
    parent = pipe.transformer
    model = TintedLocalDiT.from_config(parent.config, tint_channels=3)
    loaded = model.load_state_dict(parent.state_dict(), strict=False)
    print("not in the parent:", ", ".join(name for name in loaded.missing_keys if ".0." in name), "...")

    # 2. In the pipeline it takes its parent's place, and `attention_kwargs` bring the tint.
    def draw(transformer: LocalDiTTransformer2DModel, **kwargs: Any) -> Image.Image:
        pipe.transformer = transformer.eval()
        generator = torch.Generator("cpu").manual_seed(0)
        return pipe(args.prompt, num_inference_steps=args.steps, generator=generator, **kwargs).images[0]

    orange = {"tint": torch.tensor([[1.0, 0.5, 0.0]])}
    silent = draw(model, attention_kwargs=orange)
    difference = ImageChops.difference(silent, draw(parent))  # rounding may move a value by one
    print("silent layers give the parent's picture:", max(high for _, high in difference.getextrema()) <= 1)

    # 3. Training would teach the new layers what a tint means. Here chance does, for a difference to see.
    for block in model.transformer_blocks:
        nn.init.normal_(block.tint.weight, std=0.1)
    tinted = draw(model, attention_kwargs=orange)

    # 4. Saved and loaded by its own class: the folder names it, and its config holds the new field.
    folder = args.out.with_suffix("")
    model.save_pretrained(folder)
    model = TintedLocalDiT.from_pretrained(folder)
    print("loaded, it gives the same picture:", draw(model, attention_kwargs=orange) == tinted)

    # From left to right: the tint unheard, and heard.
    make_image_grid([silent, tinted], rows=1, cols=2).save(args.out)
    print(args.out)


if __name__ == "__main__":
    main()
