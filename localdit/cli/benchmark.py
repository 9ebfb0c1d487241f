"""`localdit benchmark`: how fast the transformer is, and what dropped tokens save."""

import argparse
import dataclasses
import json
from typing import TYPE_CHECKING, Any

from localdit.cli.common import Parser
from localdit.pictures import DTYPES

if TYPE_CHECKING:
    from localdit.evaluation import masking, speed


def add(commands: Any) -> Parser:
    parser: Parser = commands.add_parser(
        "benchmark",
        help="compare the transformer's speed with PixArt's",
        description="Time a forward of the published LocalDiT, without and with global context, against one\n"
        "of diffusers' PixArt-XL/2, in turns, with random weights. On a CPU slices of 3 blocks\n"
        "stand for the models.\n\n"
        "With --masking: time a training step, forward and backward, of SparseDiT with 75 % of the\n"
        "tokens dropped against one with none, Tiny on a CPU and XL on a GPU, and count the operations.",
    )
    parser.add_argument("--masking", action="store_true", help="what dropping tokens saves in training")
    parser.add_argument(
        "--size", type=int, help="side of the picture in pixels (default: 1024, with --masking 256)"
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
    from localdit.evaluation import masking, speed

    size = args.size if args.size is not None else 256 if args.masking else 1024
    options = (size, args.pairs, args.batch, args.dtype, args.threads, args.device)
    results: Any = masking.benchmark(*options) if args.masking else speed.benchmark(*options)
    if args.json:
        for result in results:
            print(json.dumps(dataclasses.asdict(result)))
        return
    print(f"{size} px, batch {args.batch}, {args.dtype}, {args.pairs} rounds, {results[0].threads} threads")
    if args.masking:
        print_masking(results)
    else:
        print_speed(results)


def print_speed(results: list["speed.Result"]) -> None:
    print(f"{'device':8}{'global context':16}{'LocalDiT':>10}{'PixArt':>10}{'ratio':>8}   quartiles")
    for result in results:
        context = "with" if result.global_context else "without"
        times = f"{result.seconds:9.3f}s{result.pixart_seconds:9.3f}s"
        spread = f"{result.ratio_low:.2f} to {result.ratio_high:.2f}"
        print(f"{result.device:8}{context:16}{times}{result.ratio:8.2f}   {spread}")


def print_masking(results: list["masking.Result"]) -> None:
    print(f"{'device':8}{'model':8}{'dropped':>10}{'whole':>10}{'ratio':>8}   {'quartiles':14}{'counted':>8}")
    for result in results:
        times = f"{result.masked_seconds:9.3f}s{result.unmasked_seconds:9.3f}s"
        spread = f"{result.ratio_low:.2f} to {result.ratio_high:.2f}"
        print(
            f"{result.device:8}{result.model:8}{times}{result.ratio:8.2f}   {spread:14}{result.counted:8.2f}"
        )
    result = results[0]
    print(f"counted for XL: {result.counted_xl_256:.2f} at 256 px, {result.counted_xl_512:.2f} at 512 px")
