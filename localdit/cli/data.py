"""`localdit data check`: what is in a source of captioned pictures."""

import argparse
import json
from pathlib import Path
from typing import Any

from localdit.cli.common import Parser
from localdit.plots import check_plots


def add(commands: Any) -> Parser:
    data: Parser = commands.add_parser("data", help="look at pictures and captions before training")
    actions = data.add_subparsers(dest="action", metavar="ACTION", required=True)
    parser: Parser = actions.add_parser(
        "check",
        help="count pictures, sizes, captions and what is bad",
        description="Look at every picture and caption of a source, and say what a training would make of\n"
        "them. Writes check.png (histograms and some pictures), check.json, and bad.jsonl, which\n"
        "lists what cannot be used, and why. No file of the source is changed.",
        epilog="examples:\n"
        "  localdit data check pictures/\n"
        "  localdit data check 'shards/train-{0000..0099}.tar' --resolution 1024 --decode\n"
        "  localdit data check hf:OWNER/NAME --tokenizer my-pipeline/tokenizer\n"
        '  localdit data check \'{"kind": "hf", "path": "OWNER/NAME", "caption_columns": "alt"}\'\n'
        "docs/data.md describes every kind of source.",
    )
    parser.add_argument(
        "source",
        metavar="SOURCE",
        help="folder, tar shards, hf:OWNER/NAME, scenes:COUNT, or a JSON object with the fields of a source",
    )
    parser.add_argument(
        "--resolution", type=int, default=512, metavar="PX", help="of the training (default: %(default)s)"
    )
    parser.add_argument("--decode", action="store_true", help="decode every picture too: slow, finds more")
    parser.add_argument(
        "--tokenizer", metavar="MODEL", help="folder or hub name; count the captions' tokens by it"
    )
    parser.add_argument(
        "--max-length",
        type=int,
        default=120,
        metavar="N",
        help="tokens that training takes (default: %(default)s)",
    )
    parser.add_argument(
        "--index", metavar="FOLDER", help="where the source's index is kept (default: a cache)"
    )
    parser.add_argument(
        "--out", default="data-check", metavar="FOLDER", help="where to write (default: %(default)s)"
    )
    parser.add_argument("--json", action="store_true", help="print one line of JSON instead of a table")
    parser.set_defaults(run=run)
    return parser


def run(args: argparse.Namespace) -> None:
    """Print the table, and write the list and the picture."""
    check_plots()
    if args.max_length < 1:
        raise ValueError(f"--max-length must be at least 1, got {args.max_length}")
    spec = args.source
    if spec.startswith("{"):
        try:
            spec = json.loads(spec)
        except ValueError as error:
            raise ValueError(f"SOURCE must be a JSON object if it begins with a brace: {error}") from None

    from localdit.data import buckets
    from localdit.data.check import check, draw, table
    from localdit.data.sources import open_source

    buckets.bucket_sizes(args.resolution)  # or an error, before anything is read
    count_tokens = None
    if args.tokenizer:
        from transformers import AutoTokenizer

        tokenizer = AutoTokenizer.from_pretrained(args.tokenizer)

        def count_tokens(texts: list[str]) -> list[int]:
            return [len(ids) for ids in tokenizer(texts, verbose=False).input_ids]

    index = Path(args.index) if args.index else None
    source = open_source(spec, index=index, max_bad_fraction=1, progress=True)
    report = check(
        source,
        args.resolution,
        decode=args.decode,
        count_tokens=count_tokens,
        max_length=args.max_length,
        progress=True,
    )
    facts = {"source": spec, **report.facts()}
    out = Path(args.out)
    out.mkdir(parents=True, exist_ok=True)
    (out / "check.json").write_text(json.dumps(facts, indent=1) + "\n", encoding="utf-8")
    with open(out / "bad.jsonl", "w", encoding="utf-8") as file:
        for bad in report.bad:
            file.write(json.dumps({"name": bad.name, "reason": bad.reason}) + "\n")
    draw(report, source, args.source, out / "check.png")
    if args.json:
        print(json.dumps(facts))
        return
    print(table(facts))
    print(f"\n{out / 'check.png'}\n{out / 'check.json'}\n{out / 'bad.jsonl'}")
