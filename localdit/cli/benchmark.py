"""`localdit benchmark`: how fast the transformer is."""

import argparse
import dataclasses
import json
from typing import Any

from localdit.cli.common import Parser
from localdit.pictures import DTYPES


def add(commands: Any) -> Parser:
    parser: Parser = commands.add_parser(
        "benchmark",
        help="compare the transformer's speed with PixArt's",
        description="Time a forward of the published LocalDiT, without and with global context, against one\n"
        "of diffusers' PixArt-XL/2, in turns, with random weights. On a CPU slices of 3 blocks\n"
        "stand for the models.",
    )
    parser.add_argument(
        "--size", type=int, default=1024, help="side of the picture in pixels (default: %(default)s)"
    )
    parser.add_argument("--pairs", type=int, default=8, help="rounds to measure (default: %(default)s)")
    parser.add_argument("--batch", type=int, default=1, help="pictures in a forward (default: %(default)s)")
    parser.add_argument("--dtype", choices=DTYPES, default="float32", help="(default: %(default)s)")
    parser.add_argument("--threads", type=int, help="of PyTorch on the CPU (default: PyTorch's choice)")
    parser.add_argument(
        "--device", choices=("cpu", "cuda"), help="default: the CPU, and a GPU too where there is one"
    )
    parser.add_argument("--json", action="store_true", help="print one line of JSON for each comparison")
    parser.set_defaults(run=run)
    return parser


def run(args: argparse.Namespace) -> None:
    from localdit.evaluation import speed

    results = speed.benchmark(args.size, args.pairs, args.batch, args.dtype, args.threads, args.device)
    if args.json:
        for result in results:
            print(json.dumps(dataclasses.asdict(result)))
        return
    print(
        f"{args.size} px, batch {args.batch}, {args.dtype}, {args.pairs} rounds, {results[0].threads} threads"
    )
    print(f"{'device':8}{'global context':16}{'LocalDiT':>10}{'PixArt':>10}{'ratio':>8}   quartiles")
    for result in results:
        context = "with" if result.global_context else "without"
        times = f"{result.seconds:9.3f}s{result.pixart_seconds:9.3f}s"
        spread = f"{result.ratio_low:.2f} to {result.ratio_high:.2f}"
        print(f"{result.device:8}{context:16}{times}{result.ratio:8.2f}   {spread}")
