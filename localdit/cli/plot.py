"""`localdit plot`: the curves of runs."""

import argparse
from pathlib import Path
from typing import Any

from localdit.cli.common import Parser


def add(commands: Any) -> Parser:
    parser: Parser = commands.add_parser(
        "plot",
        help="draw the loss curves of runs",
        description="Draw losses, gradient norms and learning rates of one or more runs into one picture.",
        epilog="examples:\n"
        "  localdit plot runs/local_dit/mini\n"
        "  localdit plot runs/a runs/b --out comparison.svg",
    )
    parser.add_argument("runs", nargs="+", metavar="RUN", help="folder of a run, or its log.jsonl")
    parser.add_argument("--out", metavar="FILE", help="(default: curves.png in the folder of the first run)")
    parser.add_argument(
        "--smoothing",
        type=int,
        default=10,
        metavar="N",
        help="logged values in a running mean (default: %(default)s)",
    )
    parser.set_defaults(run=run)
    return parser


def run(args: argparse.Namespace) -> None:
    from localdit.training.plot import plot_runs

    runs = [Path(name) for name in args.runs]
    out = Path(args.out) if args.out else (runs[0] if runs[0].is_dir() else runs[0].parent) / "curves.png"
    plot_runs(runs, out, smoothing=args.smoothing)
    print(out)
