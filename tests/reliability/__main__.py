"""Run the experiments at full size, and write their figures between the markers of a document."""

import argparse
import platform
import re
import tempfile
import time
from importlib.metadata import version
from pathlib import Path

from . import Experiment, Outcome, all_experiments

BEGIN, END = "<!-- figures: begin -->", "<!-- figures: end -->"
HEADER = "| | What holds | Trials passed | Note |\n| --- | --- | --- | --- |"


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m tests.reliability", description=__doc__)
    parser.add_argument("--only", help="numbers of experiments, as R1,R8")
    parser.add_argument("--out", type=Path, help="the document; its other rows stay")
    args = parser.parse_args()
    chosen = [one for one in all_experiments() if not args.only or one.id in args.only.split(",")]
    if not chosen:
        parser.error(f"there is no experiment {args.only}")
    for one in chosen:
        started = time.monotonic()
        with tempfile.TemporaryDirectory() as folder:
            outcome = one.run(Path(folder), one.full)
        print(f"{row(one, outcome)}  {time.monotonic() - started:.0f} s", flush=True)
        if not one.holds and outcome.passed == outcome.trials:
            print(f"{one.id} holds by now: take holds=False off {one.run.__name__}", flush=True)
        if args.out:
            args.out.write_text(
                with_row(args.out.read_text(encoding="utf-8"), one, outcome), encoding="utf-8"
            )


def row(one: Experiment, outcome: Outcome) -> str:
    """A line of the table. What does not hold says so."""
    figure = f"{outcome.passed} of {outcome.trials}"
    if outcome.passed < outcome.trials:
        figure = f"**does not hold**: {figure}"
    note = " ".join(outcome.note.split()).replace("|", "\\|")
    return f"| {one.id} | {one.claim} | {figure} | {note} |"


def with_row(document: str, one: Experiment, outcome: Outcome) -> str:
    """The document with the experiment's line put in, in place of the one it had; ordered by number."""
    before, _, rest = document.partition(BEGIN)
    table, _, after = rest.partition(END)
    rows = [line for line in table.splitlines() if re.match(r"\| R\d+ ", line)]
    rows = [line for line in rows if not line.startswith(f"| {one.id} | {one.claim} |")]
    rows.append(row(one, outcome))
    rows.sort(key=lambda line: int(line.split()[1][1:]))
    return "\n".join([before + BEGIN, "", HEADER, *rows, "", measured_on(), END + after])


def measured_on() -> str:
    libraries = ", ".join(f"{name} {version(name)}" for name in ("torch", "safetensors", "diffusers"))
    return (
        f"Measured last with Python {platform.python_version()}, {libraries} on {platform.system()} "
        f"{platform.machine()}."
    )


if __name__ == "__main__":
    main()
