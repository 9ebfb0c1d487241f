"""Run the experiments at full size, and write their figures between the markers of a document."""

import argparse
import os
import platform
import re
import time
from concurrent.futures import ProcessPoolExecutor, as_completed
from importlib.metadata import version
from multiprocessing import get_context
from pathlib import Path

from . import Experiment, Outcome, all_experiments, measure

BEGIN, END = "<!-- figures: begin -->", "<!-- figures: end -->"
HEADER = "| | What holds | Trials passed | Note |\n| --- | --- | --- | --- |"


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m tests.reliability", description=__doc__)
    parser.add_argument("--only", help="numbers of experiments, as R1,R8")
    parser.add_argument("--out", type=Path, help="the document; its other rows stay")
    parser.add_argument(
        "--jobs", type=int, default=os.cpu_count(), help="experiments at a time (default: one for each core)"
    )
    args = parser.parse_args()
    chosen = [one for one in all_experiments() if not args.only or one.id in args.only.split(",")]
    if not chosen:
        parser.error(f"there is no experiment {args.only}")
    # Inherited by every process: those that run at a time share the cores.
    os.environ.setdefault("OMP_NUM_THREADS", str(max(1, (os.cpu_count() or 1) // args.jobs)))
    began = time.monotonic()
    # A process for each, so that no experiment's memory stands in another's account.
    with ProcessPoolExecutor(args.jobs, mp_context=get_context("spawn"), max_tasks_per_child=1) as pool:
        for done in as_completed([pool.submit(measure, one) for one in chosen]):
            one, outcome, seconds = done.result()
            print(f"{row(one, outcome)}  {seconds:.0f} s", flush=True)
            if not one.holds and outcome.passed == outcome.trials:
                print(f"{one.id} holds by now: take holds=False off {one.run.__name__}", flush=True)
            if args.out:
                document = with_row(args.out.read_text(encoding="utf-8"), one, outcome)
                args.out.write_text(document, encoding="utf-8")
    print(f"{len(chosen)} experiments in {(time.monotonic() - began) / 60:.0f} minutes")


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
    places = [n for n, line in enumerate(rows) if line.startswith(f"| {one.id} | {one.claim} |")] or [
        len(rows)
    ]
    rows[places[0] : places[0] + 1] = [row(one, outcome)]
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
