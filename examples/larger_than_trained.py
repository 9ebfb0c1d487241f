"""Pictures larger than the ones the model was trained on, in two ways.

python examples/larger_than_trained.py
python examples/larger_than_trained.py --width 256 --height 128

The model takes any size whose sides are multiples of 16 pixels. That it runs is not that it is good: the
mini saw 128 x 128 alone.
"""

import argparse
from pathlib import Path

import torch
from PIL import Image

from localdit import MINI, LocalDiTPipeline


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("prompt", nargs="?", default="a red circle left of a blue square")
    parser.add_argument("--width", type=int, default=192, help="in pixels, a multiple of 16")
    parser.add_argument("--height", type=int, default=192, help="likewise")
    parser.add_argument("--strength", type=float, default=0.5, help="of the second way, 0 to 1")
    parser.add_argument("--model", default=MINI, help="pipeline folder or hub name (default: LocalDiT-Mini)")
    parser.add_argument("--steps", type=int, default=20)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--out", type=Path, default=Path("outputs/larger_than_trained.png"))
    args = parser.parse_args()

    device = "cuda" if torch.cuda.is_available() else "cpu"
    pipe = LocalDiTPipeline.from_pretrained(args.model, dtype=torch.float32).to(device)
    size = {"width": args.width, "height": args.height}

    def draw(**kwargs: object) -> Image.Image:
        generator = torch.Generator("cpu").manual_seed(args.seed)
        return pipe(args.prompt, num_inference_steps=args.steps, generator=generator, **kwargs).images[0]

    as_trained = draw()

    # 1. Ask for the size. The position embedding is stretched over the picture, so a layout learned at the
    # trained size fills it: shapes grow with the picture, and wide in a wide one. Colours and places mostly
    # hold. Outlines and proportions were learned at one size, and hold less the further from it you go.
    direct = draw(**size)

    # 2. Draw at the trained size, where the layout is right, stretch that, and let the last steps draw its
    # details anew at the larger size: image to image, with strength below 1.
    enlarged = draw(image=as_trained, strength=args.strength, **size)

    # From left to right: as trained, asked for, enlarged.
    row = (as_trained, direct, enlarged)
    canvas = Image.new("RGB", (sum(x.width for x in row) + 16, max(x.height for x in row)), "white")
    left = 0
    for picture in row:
        canvas.paste(picture, (left, 0))
        left += picture.width + 8
    args.out.parent.mkdir(parents=True, exist_ok=True)
    canvas.save(args.out)
    print(args.out)


if __name__ == "__main__":
    main()
