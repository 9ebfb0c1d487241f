"""Text to image: a picture of each prompt, side by side.

python examples/text_to_image.py
python examples/text_to_image.py "a green star" "a small pink cross on a navy background" --seed 3
"""

import argparse
from pathlib import Path

import torch
from diffusers.utils import make_image_grid

from localdit import MINI, LocalDiTPipeline

PROMPTS = ["a red circle left of a blue square", "a large yellow star on a navy background"]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("prompts", nargs="*", default=PROMPTS, help="one picture for each")
    parser.add_argument("--negative", default="", help="what no picture should show")
    parser.add_argument("--model", default=MINI, help="pipeline folder or hub name (default: LocalDiT-Mini)")
    parser.add_argument("--steps", type=int, default=20, help="more are slower and a little better")
    parser.add_argument(
        "--guidance", type=float, help="weight of the prompt; 1 is none (default: the model's)"
    )
    parser.add_argument("--seed", type=int, default=0, help="of the first picture, the next has the next")
    parser.add_argument("--out", type=Path, default=Path("outputs/text_to_image.png"))
    args = parser.parse_args()

    # A pipeline is a folder: tokenizer, text encoder, transformer, VAE and scheduler, each in its own.
    device = "cuda" if torch.cuda.is_available() else "cpu"
    pipe = LocalDiTPipeline.from_pretrained(args.model, dtype=torch.float32).to(device)

    # One generator for each picture, on the CPU: the same seed gives the same noise on every machine, and a
    # picture in a batch is the picture made alone.
    generators = [torch.Generator("cpu").manual_seed(args.seed + i) for i in range(len(args.prompts))]

    # Guidance asks the transformer twice at each step, with the prompt and with the negative one, and goes
    # further along the difference. Both questions are one batch.
    images = pipe(
        args.prompts,
        args.negative,
        num_inference_steps=args.steps,
        guidance_scale=args.guidance,
        generator=generators,
    ).images  # a list of PIL images

    args.out.parent.mkdir(parents=True, exist_ok=True)
    make_image_grid(images, rows=1, cols=len(images)).save(args.out)
    print(args.out)


if __name__ == "__main__":
    main()
