"""`localdit evaluate`: how good the pictures are."""

import argparse
import json
from pathlib import Path
from typing import Any

from localdit.cli.common import (
    DEVICE_HELP,
    DTYPE_HELP,
    MODEL_HELP,
    Parser,
    choose_device,
    find_model,
    load_pipeline,
)
from localdit.pictures import DTYPES, Settings


def add(commands: Any) -> Parser:
    parser: Parser = commands.add_parser(
        "evaluate",
        help="measure how well pictures show their prompts",
        description="Measure a model of the synthetic scenes: draw prompts whose combinations were held\n"
        "out of training, read colours, shapes and places back, and count what is right.",
        epilog="example:\n  localdit evaluate --scenes --model runs/mini/final --out runs/mini/scenes",
    )
    parser.add_argument(
        "--scenes", action="store_true", required=True, help="the evaluation (there is one so far)"
    )
    parser.add_argument("--model", default=Settings.model, metavar="MODEL", help=MODEL_HELP)
    parser.add_argument("--count", type=int, default=256, metavar="N", help="prompts (default: %(default)s)")
    parser.add_argument(
        "--seed",
        type=int,
        default=1,
        metavar="SEED",
        help="of the prompts, and of the first picture (default: %(default)s)",
    )
    parser.add_argument("--steps", type=int, metavar="N", help=f"denoising steps (default: {Settings.steps})")
    parser.add_argument(
        "--guidance", type=float, metavar="G", help=f"weight of the prompt (default: {Settings.guidance})"
    )
    parser.add_argument("--dtype", choices=DTYPES, metavar="DTYPE", help=DTYPE_HELP)
    parser.add_argument("--device", metavar="DEVICE", help=DEVICE_HELP)
    parser.add_argument(
        "--out", metavar="FOLDER", help="write each prompt's result, and a grid of pictures, here"
    )
    parser.add_argument("--json", action="store_true", help="print one line of JSON instead of a table")
    parser.set_defaults(run=run)
    return parser


def run(args: argparse.Namespace) -> None:
    """Print the share of pictures that are right in each respect."""
    if args.count < 1:
        raise ValueError(f"--count must be at least 1, got {args.count}")
    model = find_model(args.model)
    device, dtype = choose_device(args.device, args.dtype)
    pipe = load_pipeline(model, dtype).to(device)

    from localdit.evaluation.scenes import evaluate_scenes

    result = evaluate_scenes(
        pipe,
        count=args.count,
        seed=args.seed,
        num_inference_steps=args.steps,
        guidance_scale=args.guidance,
        out=Path(args.out) if args.out else None,
    )
    if args.json:
        print(json.dumps(result))
        return
    print(f"{'right, in %':18}{'one object':>12}{'two objects':>13}")
    for respect in result["one_object"]:
        shares = (result[kind][respect] for kind in ("one_object", "two_objects"))
        one, two = ("-" if share is None else f"{100 * share:.1f}" for share in shares)
        print(f"{respect:18}{one:>12}{two:>13}")
