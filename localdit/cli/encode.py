"""`localdit encode`: latents and text features, made once ahead of training."""

import argparse
import sys
from typing import Any

from localdit.cli.common import Parser


def add(commands: Any) -> Parser:
    parser: Parser = commands.add_parser(
        "encode",
        help="make the latents and text features of a source, ahead of training",
        description="Encode pictures and captions as a YAML file says, into a cache that training reads.\n"
        "Started again, it makes what is not there: after a stop the rest, after a change what it concerns.",
        epilog="examples:\n"
        "  localdit encode configs/local_dit/encode_scenes.yaml\n"
        "  localdit encode configs/local_dit/encode.yaml source=pictures/ cache=cache/pictures\n"
        "  accelerate launch -m localdit.cli encode configs/local_dit/encode.yaml        (several GPUs)\n"
        "  localdit encode configs/local_dit/encode.yaml --engine ray            (several machines)",
    )
    parser.add_argument("config", metavar="CONFIG", help="the YAML file")
    parser.add_argument(
        "overrides", nargs="*", default=[], metavar="KEY=VALUE", help="values in place of the file's"
    )
    parser.add_argument(
        "--engine",
        choices=("accelerate", "ray"),
        default="accelerate",
        metavar="ENGINE",
        help="accelerate: this process, or those of accelerate launch (default); ray: a Ray cluster",
    )
    parser.set_defaults(run=run)
    return parser


def run(args: argparse.Namespace) -> None:
    """Print the folder of the cache."""
    from localdit.training.config import load_config
    from localdit.training.encode import EncodeConfig, encode

    config = load_config(args.config, args.overrides, EncodeConfig)

    from datetime import timedelta

    import diffusers
    import transformers
    from accelerate import Accelerator
    from accelerate.utils import InitProcessGroupKwargs

    from localdit.training.stopping import stop_request

    # The bar of the encoding is enough.
    diffusers.utils.logging.disable_progress_bar()
    transformers.utils.logging.disable_progress_bar()
    # Shares are of unequal length, and whoever is done first waits for the others.
    patient = InitProcessGroupKwargs(timeout=timedelta(days=30))
    accelerator = Accelerator(kwargs_handlers=[patient])
    with stop_request() as stop:
        summary = encode(config, accelerator, stop, args.engine)
    if accelerator.is_main_process:
        print(summary, file=sys.stderr)
        print(config.cache)
