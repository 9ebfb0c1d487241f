"""`localdit train`: a run, as a YAML file says."""

import argparse
from typing import Any

from localdit.cli.common import Parser


def add(commands: Any) -> Parser:
    parser: Parser = commands.add_parser(
        "train",
        help="train a model as a YAML file says",
        description="Train a model. The file says all that the run depends on; values can be given anew.\n"
        "Started again, it goes on from its newest checkpoint, as if it had never stopped.",
        epilog="examples:\n"
        "  localdit train configs/local_dit/mini.yaml\n"
        "  localdit train configs/local_dit/mini.yaml train.max_steps=1000 output_dir=runs/short\n"
        "  accelerate launch -m localdit.cli train configs/local_dit/mini.yaml        (several GPUs)",
    )
    parser.add_argument("config", metavar="CONFIG", help="the YAML file of a run")
    parser.add_argument(
        "overrides", nargs="*", default=[], metavar="KEY=VALUE", help="values in place of the file's"
    )
    parser.add_argument(
        "--resume",
        default="auto",
        metavar="auto|never|PATH",
        help="the checkpoint to go on from (default: auto, the newest if there is one)",
    )
    parser.set_defaults(run=run)
    return parser


def run(args: argparse.Namespace) -> None:
    """Train, and print the folder of the finished model."""
    from localdit.training.config import load_config

    config = load_config(args.config, args.overrides)
    from accelerate import PartialState

    from localdit.training import loop

    finished = loop.train(config, args.resume)
    if PartialState().is_main_process:
        print(finished)
