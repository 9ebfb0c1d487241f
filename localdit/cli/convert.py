"""`localdit convert`: published checkpoints to pipelines, and back."""

import argparse
import json
import sys
from typing import Any

from localdit.cli.common import Parser
from localdit.pictures import DTYPES

ARCHITECTURES = ("local_dit", "sparse_dit", "ledit", "pixeldit", "pixeldit_text")  # of localdit.conversion


def add(commands: Any) -> Parser:
    parser: Parser = commands.add_parser(
        "convert",
        help="published checkpoints to diffusers folders, and back",
        description="Turn a published checkpoint (.safetensors or .pt) into a diffusers folder of the\n"
        "transformer, or such a folder into a checkpoint. With --pipeline, put a pipeline folder together.",
        epilog="examples:\n"
        "  localdit convert model.safetensors transformer/\n"
        "  localdit convert pixeldit.ckpt transformer/ --architecture pixeldit\n"
        "  localdit convert transformer/ model.safetensors\n"
        "  localdit convert model.safetensors pipeline/ --pipeline --dtype bfloat16\n"
        "  localdit convert transformer/ pipeline/ --pipeline --vae vae/ --text-encoder owner/t5\n"
        "  localdit convert dit.pt pipeline/ --pipeline --architecture sparse_dit \\\n"
        "      --text-encoder open_clip_model.safetensors",
    )
    parser.add_argument(
        "source", metavar="IN", help="a checkpoint file, or the folder of a transformer or pipeline"
    )
    parser.add_argument("target", metavar="OUT", help="the folder or .safetensors file to write")
    parser.add_argument(
        "--architecture",
        choices=ARCHITECTURES,
        metavar="NAME",
        help=f"{', '.join(ARCHITECTURES)} (default: a folder's own; of a file, {ARCHITECTURES[0]})",
    )
    parser.add_argument(
        "--dtype", choices=DTYPES, metavar="DTYPE", help=f"{', '.join(DTYPES)} (default: the source's)"
    )
    parser.add_argument("--overwrite", action="store_true", help="replace OUT if it is there")

    file = parser.add_argument_group("what a checkpoint file leaves open")
    file.add_argument(
        "--global-context",
        choices=("auto", "fold", "random", "none"),
        metavar="CHOICE",
        help="of LocalDiT; auto: with it if the file has its tensors, else fold; fold: without it, its mean "
        "put in the weights; random: with it, drawn from --seed; none: without it (default: auto)",
    )
    file.add_argument("--seed", type=int, metavar="SEED", help="of --global-context random")
    file.add_argument("--window-size", type=int, metavar="N", help="of LocalDiT: side of a window in tokens")
    file.add_argument(
        "--sample-size", type=int, metavar="N", help="side of the latents, or pixels, of training"
    )
    file.add_argument(
        "--config",
        nargs="+",
        type=parse_field,
        default=[],
        metavar="KEY=VALUE",
        help="other fields of its config",
    )

    parts = parser.add_argument_group(
        "a whole pipeline", "Each part is a folder, or a hub name OWNER/NAME[/FOLDER]."
    )
    parts.add_argument("--pipeline", action="store_true", help="write a pipeline; IN is its transformer")
    parts.add_argument("--vae", metavar="NAME", help="default: that of the published model")
    parts.add_argument(
        "--text-encoder",
        metavar="NAME",
        help="or a .safetensors of an open_clip, whose text tower is taken (default: the published one)",
    )
    parts.add_argument("--tokenizer", metavar="NAME", help="default: the text encoder's")
    parts.add_argument("--scheduler", metavar="NAME", help="default: that of the published model")
    parser.set_defaults(run=run)
    return parser


def run(args: argparse.Namespace) -> None:
    """Convert, and say what was found, dropped and decided."""

    def given(*names: str) -> dict[str, Any]:
        return {name: value for name in names if (value := getattr(args, name)) is not None}

    parts = given("vae", "text_encoder", "tokenizer", "scheduler")
    if parts and not args.pipeline:
        raise ValueError(f"--{next(iter(parts)).replace('_', '-')} is a part of a pipeline: add --pipeline")

    import torch

    from localdit import conversion

    choices = {
        **given("architecture", "global_context", "seed", "window_size", "sample_size", "overwrite"),
        **dict(args.config),
        "dtype": args.dtype and getattr(torch, args.dtype),
    }
    if args.pipeline:
        report = conversion.assemble_pipeline(args.target, transformer=args.source, **parts, **choices)
    else:
        report = conversion.convert(args.source, args.target, **choices)
    print(f"found: {report.found}, {report.parameters:,} parameters", file=sys.stderr)
    for reason, names in report.dropped.items():
        print(f"dropped: {len(names)} tensors, {reason}", file=sys.stderr)
    for sentence in report.chosen:
        print(f"chosen: {sentence}", file=sys.stderr)
    print(report.target)


def parse_field(text: str) -> tuple[str, Any]:
    """Name and value of "rope=false"; the value is JSON."""
    name, equals, value = text.partition("=")
    try:
        if name and equals:
            return name, json.loads(value)
    except json.JSONDecodeError:
        pass
    raise argparse.ArgumentTypeError(f"must be KEY=VALUE with a JSON value, as rope=false, got {text!r}")
