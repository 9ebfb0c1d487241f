"""The command line: one module for each command, which adds its parser (`add`) and runs (`run`).

What a program wants to read goes to stdout (paths, or JSON lines), what a person wants to read to stderr.
PyTorch and what else is slow to import is left to the command that needs it, once its arguments are checked.
"""

import re
import sys
from collections.abc import Sequence

from localdit import __version__
from localdit.cli import benchmark, convert, data, encode, evaluate, generate, models, plot, train, verify
from localdit.cli.common import Parser
from localdit.training.stopping import EXIT_CODE, Stopped


def main(argv: Sequence[str] | None = None) -> int:
    """Run one command.

    Returns the exit code: 0; 1 where `verify` finds problems; 2 after an error; 130 after Ctrl-C; 143 where a
    command that saves its work when it is told to stop has done so.
    """
    parser = build_parser()
    args, rest = parser.parse_known_args(argv)
    # Of KEY=VALUE ... argparse takes one row, and leaves those that stand behind an option.
    behind = [word for word in rest if "overrides" in args and re.match(r"\w[^=]*=", word)]
    if unknown := [word for word in rest if word not in behind]:
        parser.error(f"unrecognized arguments: {' '.join(unknown)}")
    if behind:
        args.overrides = args.overrides + behind
    if args.command is None:
        parser.print_help()
        return 0
    try:
        return args.run(args) or 0
    except KeyboardInterrupt:
        print("localdit: interrupted", file=sys.stderr)
        return 130
    except Stopped as stopped:
        print(f"localdit: {stopped}", file=sys.stderr)
        return EXIT_CODE
    except Exception as error:
        if args.debug:
            raise
        print(f"localdit: error: {describe(error)}", file=sys.stderr)
        return 2


def describe(error: Exception) -> str:
    """An error in words."""
    if isinstance(error, OSError) and error.filename:
        return f"{error.filename}: {error.strerror}"
    # Where the message was not written for users, the type is half of it.
    return str(error) if isinstance(error, ValueError | OSError) else f"{type(error).__name__}: {error}"


def build_parser() -> Parser:
    """The parser of all commands. Each sets `run`, the function that it calls."""
    parser = Parser(
        prog="localdit",
        description="Text to pictures, with diffusion transformers whose attention is local.",
        epilog='a first picture:\n  localdit generate "a red circle left of a blue square"',
    )
    parser.add_argument("-V", "--version", action="version", version=f"localdit {__version__}")
    commands = parser.add_subparsers(dest="command", metavar="COMMAND", title="commands")
    for module in (generate, convert, data, encode, train, plot, evaluate, verify, benchmark, models):
        command = module.add(commands)
        command.add_argument("--debug", action="store_true", help="show the traceback of an error")
    return parser
