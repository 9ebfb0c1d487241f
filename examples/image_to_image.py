"""Image to image: start from a picture, at several strengths. The same pipeline does it.

python examples/image_to_image.py
python examples/image_to_image.py "a purple diamond" --image drawing.png --strengths 0.5 0.7
"""

import argparse
from pathlib import Path

import torch
from diffusers.utils import make_image_grid
from PIL import Image

from localdit import MINI, LocalDiTPipeline
from localdit.data.scenes import Scene, SceneObject, render

# What the mini knows is such scenes, so a scene is what it can start from: two shapes on white.
START = Scene(
    "white",
    (
        SceneObject("red", "circle", "large", x=0.27, y=0.55, radius=0.175),
        SceneObject("blue", "square", "large", x=0.73, y=0.45, radius=0.175),
    ),
)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("prompt", nargs="?", default="a green star left of a blue square")
    parser.add_argument("--image", type=Path, help="picture to start from (default: a drawn scene)")
    parser.add_argument("--strengths", type=float, nargs="+", default=[0.4, 0.6, 0.8, 1.0])
    parser.add_argument("--model", default=MINI, help="pipeline folder or hub name (default: LocalDiT-Mini)")
    parser.add_argument("--steps", type=int, default=20, help="of the whole way from noise to picture")
    parser.add_argument("--guidance", type=float, default=3.0, help="weight of the prompt; 3 suits the mini")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--out", type=Path, default=Path("outputs/image_to_image.png"))
    args = parser.parse_args()

    device = "cuda" if torch.cuda.is_available() else "cpu"
    pipe = LocalDiTPipeline.from_pretrained(args.model, dtype=torch.float32).to(device)
    start = Image.open(args.image) if args.image else render(START, size=128)

    # The picture is encoded, noised as if it had come from part of the way, and denoised from there.
    # Strength is the part: at 0.4 the last 8 of 20 steps run, and the layout stays; at 1.0 all of them run
    # from pure noise, and nothing of the picture is left but its size.
    images = [start]
    for strength in args.strengths:
        generator = torch.Generator("cpu").manual_seed(args.seed)  # equal noise: strength alone differs
        images += pipe(
            args.prompt,
            image=start,
            strength=strength,
            num_inference_steps=args.steps,
            guidance_scale=args.guidance,
            generator=generator,
        ).images

    # From left to right: the start, then one picture for each strength. An odd-sized start was rounded down
    # to whole tokens, so the row is laid out at the size of what came back.
    row = [image.convert("RGB").resize(images[-1].size) for image in images]
    args.out.parent.mkdir(parents=True, exist_ok=True)
    make_image_grid(row, rows=1, cols=len(row)).save(args.out)
    print(args.out)


if __name__ == "__main__":
    main()
