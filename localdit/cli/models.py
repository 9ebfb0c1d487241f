"""`localdit models`: the architectures side by side, counted."""

import argparse
import dataclasses
import json
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from localdit.cli.common import Parser

if TYPE_CHECKING:
    from localdit.evaluation.sizes import Family, Size

ROWS = Sequence[Sequence[str]]  # of a table; the first is its head


def add(commands: Any) -> Parser:
    parser: Parser = commands.add_parser(
        "models",
        help="the architectures side by side: idea, size, cost",
        description="What each architecture is, and parameters, memory and operations of its sizes.\n"
        "Counted, not measured: 2 operations for each multiplication and addition in linear layers,\n"
        "convolutions and attention, of one forward of the transformer for one picture. Takes seconds.",
        epilog="what was published of their pictures, and what was measured here: docs/models/index.md",
    )
    form = parser.add_mutually_exclusive_group()
    form.add_argument("--json", action="store_true", help="print one line of JSON for each size")
    form.add_argument("--markdown", action="store_true", help="print the tables of docs/models/index.md")
    parser.set_defaults(run=run)
    return parser


def run(args: argparse.Namespace) -> None:
    from localdit.evaluation.sizes import FAMILIES, count_sizes

    sizes = list(count_sizes())
    if args.json:
        families = {family.name: family for family in FAMILIES}
        for size in sizes:
            family = families[size.architecture]
            told = ("idea", "objective", "text_encoder", "scheduler")
            print(json.dumps(dataclasses.asdict(size) | {name: getattr(family, name) for name in told}))
        return
    counts, words = size_rows(sizes), family_rows(FAMILIES, links=args.markdown)
    if args.markdown:
        print(markdown(counts), markdown(words), sep="\n\n")
    else:
        print(columns(counts), paragraphs(words), sep="\n\n")


def size_rows(sizes: "Sequence[Size]") -> ROWS:
    """A table of what is counted."""
    sides = list(sizes[0].gflops)
    tokens = f"tokens at {', '.join(map(str, sides))} px"
    head = ["size", "parameters", "in bfloat16", tokens, *(f"GFLOP, {side} px" for side in sides)]
    return [
        head,
        *(
            [
                size.name,
                f"{size.parameters:,}",
                f"{size.bfloat16_bytes / 1e9:.2f} GB",
                ", ".join(map(str, size.tokens.values())),
                *(f"{size.gflops[side]:,.1f}" for side in sides),
            ]
            for size in sizes
        ),
    ]


def family_rows(families: "Sequence[Family]", links: bool = False) -> ROWS:
    """A table of what the architectures are."""
    return [
        ["architecture", "idea", "predicts", "text", "sampler"],
        *(
            [
                f"[{family.name}]({family.page})" if links else family.name,
                family.idea,
                family.objective,
                family.text_encoder or "none: labels of classes",
                family.scheduler,
            ]
            for family in families
        ),
    ]


def columns(rows: ROWS) -> str:
    """A table for a terminal, all but its first column to the right."""
    widths = [max(map(len, column)) for column in zip(*rows)]
    lines = []
    for first, *rest in rows:
        cells = [cell.rjust(width) for cell, width in zip(rest, widths[1:])]
        lines.append("  ".join([first.ljust(widths[0]), *cells]))
    return "\n".join(lines)


def paragraphs(rows: ROWS) -> str:
    """A table whose cells are too wide for a terminal: a paragraph for each row."""
    head, *rest = rows
    width = max(map(len, head))
    return "\n\n".join(
        "\n".join([row[0], *(f"  {name:{width}}  {cell}" for name, cell in zip(head[1:], row[1:]))])
        for row in rest
    )


def markdown(rows: ROWS) -> str:
    """A table of a page."""
    ruler = ["---:" if column[-1][0].isdecimal() else "---" for column in zip(*rows)]
    lines = [rows[0], ruler, *rows[1:]]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)
