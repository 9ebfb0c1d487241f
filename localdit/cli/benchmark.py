"""`localdit benchmark`: how fast the transformer is, and what dropped tokens save."""

import argparse
import dataclasses
import json
from collections.abc import Sequence
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

from localdit.cli.common import Parser
from localdit.cli.models import columns, markdown
from localdit.files import staged_file
from localdit.pictures import DTYPES
from localdit.plots import check_plots

if TYPE_CHECKING:
    from localdit.evaluation import masking, speed, streaming
    from localdit.evaluation.timing import Setup


def add(commands: Any) -> Parser:
    parser: Parser = commands.add_parser(
        "benchmark",
        help="compare the transformer's speed with its peers'",
        description="Time a forward of LocalDiT, in its published size, and of its peers, in turns, with\n"
        "random weights. Each runs as its pipeline runs it: ours has the text's keys and values and\n"
        "the timestep's modulations; diffusers' pipelines make them in every forward, and have each\n"
        "picture twice with guidance. On a CPU slices of 3 blocks stand for the models, and the\n"
        "default is LocalDiT without and with global context against PixArt-alpha XL. On CUDA whole\n"
        "models run, by default all of them.\n\n"
        "models:  local, global: LocalDiT, without and with global context; pixart-alpha, pixart-sigma: 120\n"
        "         and 300 text tokens; sana-0.6b, sana-1.6b; published, published-global: with --reference\n"
        "options: MODEL:OPTION+OPTION of torch, triton (ours without Triton kernels, or not without them),\n"
        "         compiled (block by block), cudnn (attention), graph (CUDA graph)\n\n"
        "With --masking: time a training step, forward and backward, of SparseDiT with 75 % of the\n"
        "tokens dropped against one with none, Tiny on a CPU and XL on a GPU, and count the operations.\n\n"
        "With --streaming: memory and time of a forward of LocalDiT in bands of rows, against the size.",
        epilog="examples:\n"
        "  localdit benchmark\n"
        "  localdit benchmark --models local local:compiled sana-0.6b --size 512 1024 --out speed\n"
        "  localdit benchmark --device cuda --dtype bfloat16 --size 512 1024 2048 --guidance on --out speed",
    )
    parser.add_argument("--masking", action="store_true", help="what dropping tokens saves in training")
    parser.add_argument("--streaming", action="store_true", help="memory and time in bands, against the size")
    parser.add_argument("--models", nargs="+", metavar="MODEL", help="what competes (default: see above)")
    parser.add_argument(
        "--size",
        type=int,
        nargs="+",
        metavar="PIXELS",
        help="sides of the picture in pixels (default: 1024, with --masking 256, --streaming 512 to 8192)",
    )
    parser.add_argument("--pairs", type=int, default=8, help="rounds to measure (default: %(default)s)")
    parser.add_argument(
        "--batch",
        type=int,
        nargs="+",
        default=[1],
        metavar="N",
        help="pictures in a forward (default: 1)",
    )
    parser.add_argument(
        "--guidance",
        nargs="+",
        choices=("off", "on"),
        default=["off"],
        help="whether each picture is predicted with and without its prompt (default: off)",
    )
    parser.add_argument("--dtype", choices=DTYPES, default="float32", help="(default: %(default)s)")
    parser.add_argument("--threads", type=int, help="of PyTorch on the CPU (default: PyTorch's choice)")
    parser.add_argument(
        "--device",
        choices=("cpu", "cuda"),
        help="default: the CPU, and a GPU too where there is one; with\n--streaming the CPU",
    )
    parser.add_argument(
        "--cpu-time",
        action="store_true",
        help="on a CPU that others use too: the time that its cores worked for this",
    )
    parser.add_argument(
        "--limit",
        type=float,
        metavar="SECONDS",
        help="for the rounds of one size and batch; three are measured in any case (default: none)",
    )
    parser.add_argument(
        "--reference",
        type=Path,
        metavar="FOLDER",
        help="checkout of the published LocalDiT, for the models published and published-global, which join\n"
        "the default ones: its attention is loaded and run, so let it be one that you trust",
    )
    parser.add_argument(
        "--out",
        type=Path,
        metavar="FOLDER",
        help="for speed.json, speed.md and speed.png; with --streaming streaming.json and so on",
    )
    parser.add_argument("--json", action="store_true", help="print one line of JSON for each result")
    parser.set_defaults(run=partial(run, parser))
    return parser


# What says nothing to a mode.
_UNUSED = {
    "masking": ("streaming", "models", "guidance", "limit", "reference", "out"),
    "streaming": ("masking", "pairs", "batch", "guidance", "cpu_time", "limit", "reference"),
}


def run(parser: Parser, args: argparse.Namespace) -> None:
    from localdit.evaluation.timing import Setup

    setup = Setup(args.pairs, args.dtype, args.threads, args.device, args.cpu_time)
    for mode, unused in _UNUSED.items():
        for name in unused:
            if getattr(args, mode) and getattr(args, name) != parser.get_default(name):
                raise ValueError(f"--{name.replace('_', '-')} has no meaning with --{mode}; leave it away")
    if args.out is not None:
        check_plots()
    if args.masking:
        _run_masking(args, setup)
    elif args.streaming:
        _run_streaming(args, setup)
    else:
        _run_speed(args, setup)


def _run_speed(args: argparse.Namespace, setup: "Setup") -> None:
    from localdit.evaluation import speed

    results: list[speed.Result] = []
    guidance = [choice == "on" for choice in args.guidance]
    options = (args.size or [1024], args.batch, guidance, args.models, args.reference, args.limit)
    for found in speed.benchmark(setup, *options):
        results += found
        if args.json:
            for result in found:
                print(json.dumps(dataclasses.asdict(result)), flush=True)
        else:
            print(_tables(found, columns), flush=True)
        if args.out is not None:
            _write(args.out, results)  # what there is, should the next take too long


def _tables(found: "list[speed.Result]", table: Any) -> str:
    """One comparison: what it was measured on, times, ratios."""
    from localdit.evaluation.speed_report import heading, ratio_rows, time_rows

    ratios = ratio_rows(found)
    return "\n\n".join([heading(found), table(time_rows(found)), *([table(ratios)] if ratios else []), ""])


def _write(folder: Path, results: "list[speed.Result]") -> None:
    from localdit.evaluation.speed_report import comparisons, draw

    text = "\n".join(_tables(found, markdown) for found in comparisons(results))
    _write_files(folder / "speed", results, text, draw)


def _write_files(
    stem: Path, results: "Sequence[speed.Result | streaming.Result]", text: str, draw: Any
) -> None:
    """The results as JSON, a text in Markdown, and a plot."""
    stem.parent.mkdir(parents=True, exist_ok=True)
    with staged_file(stem.with_suffix(".json")) as path:
        path.write_text(
            json.dumps([dataclasses.asdict(found) for found in results], indent=1), encoding="utf-8"
        )
    with staged_file(stem.with_suffix(".md")) as path:
        path.write_text(text, encoding="utf-8")
    with staged_file(stem.with_suffix(".png")) as path:
        draw(results, path)


def _run_streaming(args: argparse.Namespace, setup: "Setup") -> None:
    from localdit.evaluation import streaming

    names = args.models or ["global"]
    if unknown := set(names) - {"local", "global"}:
        raise ValueError(
            f"--models must be local or global with --streaming, got {', '.join(sorted(unknown))}"
        )
    with setup.devices() as (device, *_):  # the CPU, if none is named
        about = {"dtype": args.dtype, "device": device.type, "threads": args.threads}
    cases = [
        streaming.Case(size, global_context=name == "global", **about)
        for name in names
        for size in args.size or streaming.SIZES
    ]
    if not args.json:
        print(streaming.HEAD, flush=True)
    results = []
    for result in streaming.benchmark(cases):
        results.append(result)
        print(json.dumps(dataclasses.asdict(result)) if args.json else streaming.row(result), flush=True)
        if args.out is not None:  # what there is, should the next take too long
            text = "\n".join((streaming.HEAD, *map(streaming.row, results), ""))
            _write_files(args.out / "streaming", results, text, streaming.draw)


def _run_masking(args: argparse.Namespace, setup: "Setup") -> None:
    from localdit.evaluation import masking

    sizes = args.size or [256]
    results = [
        result for size in sizes for batch in args.batch for result in masking.benchmark(setup, size, batch)
    ]
    if args.json:
        for result in results:
            print(json.dumps(dataclasses.asdict(result)))
        return
    print(f"{args.dtype}, {args.pairs} rounds, {results[0].threads} threads")
    print(columns(masking_rows(results)))
    result = results[0]
    print(f"counted for XL: {result.counted_xl_256:.2f} at 256 px, {result.counted_xl_512:.2f} at 512 px")


def masking_rows(results: list["masking.Result"]) -> list[list[str]]:
    """A table of what dropped tokens save; the first row is its head."""
    head = ["device", "model", "px", "batch", "dropped", "whole", "ratio", "quartiles", "counted"]
    return [
        head,
        *(
            [
                result.device,
                result.model,
                f"{result.size}",
                f"{result.batch}",
                f"{result.masked_seconds:.3f}s",
                f"{result.unmasked_seconds:.3f}s",
                f"{result.ratio.median:.2f}",
                f"{result.ratio.low:.2f} to {result.ratio.high:.2f}",
                f"{result.counted:.2f}",
            ]
            for result in results
        ),
    ]
