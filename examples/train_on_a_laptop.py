"""Train a small LocalDiT from nothing, with the package's own loop, and draw with it.

python examples/train_on_a_laptop.py
python examples/train_on_a_laptop.py --steps 2000 --scenes 4000

LocalDiT-Mini lends its autoencoder and its text encoder, which stay as they are: the transformer alone is
trained, on scenes drawn for it. With the defaults this takes minutes on a laptop's processor and gives
coloured blobs, no more: it shows the machinery. Stopped and started again, it goes on where it was; an
--out of its own starts another run. `localdit train configs/local_dit/mini.yaml` is the real thing.
"""

import argparse
from pathlib import Path

import torch
from diffusers.utils import make_image_grid

from localdit import MINI, LocalDiTPipeline
from localdit.training.config import load_config
from localdit.training.loop import train

CONFIG = Path(__file__).resolve().parents[1] / "configs" / "local_dit" / "mini.yaml"
PROMPTS = ["a red circle left of a blue square", "a green star", "a large pink cross on a black background"]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("--steps", type=int, default=300, help="optimizer steps")
    parser.add_argument("--scenes", type=int, default=500, help="pictures in the training set")
    parser.add_argument("--model", default=MINI, help="pipeline folder with the frozen parts")
    parser.add_argument("--sampling-steps", type=int, default=20)
    parser.add_argument("--out", type=Path, default=Path("outputs/train_on_a_laptop"), help="folder")
    args = parser.parse_args()

    # A run is a YAML file. Single values are given anew as on the command line of `localdit train`.
    config = load_config(
        CONFIG,
        [
            f"output_dir={args.out}",
            "model.num_layers=4",  # windows of 4 tokens: every shift, 0 to 3, once
            "model.full_attention_layers=[2]",  # in the other three blocks a token sees its window alone
            f"objective.data.source.count={args.scenes}",
            f"objective.data.cache={args.out}/encoded",
            f"objective.data.vae={args.model}",  # of a pipeline's folder the part that is one
            f"objective.data.text_encoder={args.model}",
            f"objective.data.tokenizer={args.model}",
            "objective.validation_samples=0",
            f"train.max_steps={args.steps}",
            "train.batch_size=16",
            f"train.warmup_steps={args.steps // 10}",
            f"train.log_every={max(args.steps // 10, 1)}",
            "train.save_every=100",
            "train.preview_every=null",
            "train.validate_every=null",
        ],
    )

    # Scenes are drawn and encoded once, then the transformer learns to take noise out of them. The weights
    # that are kept are a running average over the steps; what comes back is the folder of a whole pipeline.
    finished = train(config)

    pipe = LocalDiTPipeline.from_pretrained(finished, dtype=torch.float32)
    generators = [torch.Generator("cpu").manual_seed(i) for i in range(len(PROMPTS))]
    images = pipe(PROMPTS, num_inference_steps=args.sampling_steps, generator=generators).images
    picture = args.out / "picture.png"
    make_image_grid(images, rows=1, cols=len(images)).save(picture)
    print(picture)


if __name__ == "__main__":
    main()
