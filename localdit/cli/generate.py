"""`localdit generate`: pictures from prompts, or from the labels of classes."""

import argparse
import dataclasses
import json
import logging
import os
import re
import secrets
import sys
import time
from collections.abc import Mapping
from importlib import metadata
from pathlib import Path
from typing import TYPE_CHECKING, Any

from localdit import __version__
from localdit.cli.common import (
    DEVICE_HELP,
    Parser,
    add_drawing_options,
    choose_device,
    find_model,
    find_pipeline,
    fit,
    load_pipeline,
)
from localdit.evaluation.prompts import read_prompts
from localdit.pictures import FORMATS, Settings, call_options, read_picture, read_settings, write_png

if TYPE_CHECKING:
    from PIL.Image import Image


def add(commands: Any) -> Parser:
    parser: Parser = commands.add_parser(
        "generate",
        usage="%(prog)s (PROMPT [PROMPT ...] | --label LABEL [--label LABEL ...]) [options]",
        help="make pictures from prompts or labels",
        description="Make pictures from prompts or labels, whichever the model draws, and from a picture.\n\n"
        "Picture i has the seed SEED + i and its own generator, so it comes out the same when made alone.\n"
        "Each PNG carries its settings, paths of files included; --from-png makes it again.",
        epilog="examples:\n"
        '  localdit generate "a red circle left of a blue square"\n'
        '  localdit generate "a green star" "a pink ring" --num 3 --seed 7 --out stars/\n'
        '  localdit generate "a green star" --image scene.png --strength 0.6\n'
        '  localdit generate "a green star" --image scene.png --mask spot.png\n'
        '  localdit generate --label "golden retriever" --label 7 --model my-ledit\n'
        '  localdit generate --prompt-file prompts.txt --out "{index:03d}-{slug}.png" --json\n'
        "  localdit generate --from-png outputs/a-green-star-7.png --steps 50",
    )
    what = parser.add_argument_group("what to draw")
    what.add_argument("prompts", nargs="*", metavar="PROMPT", help="what the picture shows; one or more")
    what.add_argument(
        "--prompt-file", metavar="FILE", help="more prompts, one a line; empty lines do not count"
    )
    what.add_argument(
        "--label",
        action="append",
        default=[],
        dest="labels",
        metavar="LABEL",
        help="name or number of a class, in place of prompts; may be given again for more pictures",
    )
    what.add_argument("--negative", metavar="TEXT", help="what it should not show (default: the pipeline's)")
    what.add_argument(
        "--image",
        metavar="FILE",
        help=f"picture to start from ({', '.join(FORMATS)}); the size defaults to its own",
    )
    what.add_argument(
        "--strength",
        type=float,
        metavar="S",
        help=f"how far to leave --image: 0 keeps it, 1 ignores it (default: {Settings.strength})",
    )
    what.add_argument(
        "--mask",
        metavar="FILE",
        help="picture of the size of --image, white where that is painted anew; the rest of it stays",
    )
    what.add_argument(
        "--from-png", metavar="FILE", help="the settings of this picture; options given here go first"
    )

    how = parser.add_argument_group("how")
    how.add_argument("--num", type=int, default=1, metavar="N", help="pictures of each prompt (default: 1)")
    how.add_argument(
        "--seed", type=int, metavar="SEED", help="of the first picture (default: drawn, and said)"
    )
    add_drawing_options(how)
    how.add_argument("--device", metavar="DEVICE", help=DEVICE_HELP)

    where = parser.add_argument_group("where to")
    where.add_argument(
        "--out",
        default="outputs",
        metavar="OUT",
        help="a folder, a .png, or a pattern with {slug}, {seed}, {index}, as in 'a/{slug}-{seed}.png' "
        "(default: new files in outputs/)",
    )
    where.add_argument("--overwrite", action="store_true", help="replace files that exist")
    where.add_argument(
        "--json", action="store_true", help="print one line of JSON for each picture instead of its path"
    )
    where.add_argument("--quiet", action="store_true", help="no progress bar, no notes")
    parser.set_defaults(run=run)
    return parser


def run(args: argparse.Namespace) -> None:
    """Draw one picture after the other, and write each when it is there."""
    starts, pictures = plan_pictures(args)
    paths = plan_paths(args.out, pictures, args.overwrite)

    device, dtype = choose_device(args.device, pictures[0].dtype)
    kind = find_pipeline(pictures[0].model, pictures[0].pipeline)
    pictures = [dataclasses.replace(fit(settings, *kind), dtype=dtype) for settings in pictures]
    first = pictures[0]
    if args.quiet:
        logging.disable(logging.WARNING)
    else:
        seeds = f"seed {first.seed}" if len(pictures) == 1 else f"seeds {first.seed} to {pictures[-1].seed}"
        print(f"{first.model} on {device} in {dtype}, {first.steps} steps, {seeds}", file=sys.stderr)
    pipe = load_pipeline(first).to(device)
    made_with = {"localdit": __version__, "torch": metadata.version("torch"), "device": device.type}
    made_with["scheduler"] = type(pipe.scheduler).__name__

    for index, (settings, path) in enumerate(zip(pictures, paths)):
        # Disabled by None, the bar is there on a terminal alone.
        pipe.set_progress_bar_config(desc=f"{index + 1}/{len(pictures)}", disable=args.quiet or None)
        started = time.perf_counter()
        picture = draw(pipe, settings, starts)
        seconds = round(time.perf_counter() - started, 3)
        write_png(picture, path, settings, made_with)
        line = {"file": str(path), "seconds": seconds, **dataclasses.asdict(settings), "made_with": made_with}
        print(json.dumps(line) if args.json else path, flush=True)


def plan_pictures(args: argparse.Namespace) -> tuple[dict[str, "Image"], list[Settings]]:
    """The picture to start from and its mask, if any, and the settings of each picture to draw.

    What the command line says goes before what `--from-png` says, and that before the defaults.
    """
    settings = dict(vars(read_settings(args.from_png))) if args.from_png else {}
    for field in dataclasses.fields(Settings):
        if (value := getattr(args, field.name, None)) is not None:
            settings[field.name] = value

    shown = plan_shown(args, settings)
    if args.num < 1:
        raise ValueError(f"--num must be at least 1, got {args.num}")

    starts = {}
    for name in ("image", "mask"):
        if (path := settings.get(name)) is None:
            continue
        starts[name], digest = read_picture(path)
        if getattr(args, name) is None and digest != settings[f"{name}_sha256"]:
            raise ValueError(f"{path} is not what {args.from_png} was made from: give --{name}")
        settings |= {name: os.path.abspath(path), f"{name}_sha256": digest}
    if "image" not in starts:
        if args.strength is not None:
            raise ValueError("--strength says how far to leave --image, which is not given")
        if "mask" in starts:
            raise ValueError("--mask says what of --image to paint anew, which is not given")
    settings["model"] = find_model(settings.get("model", Settings.model))
    if (named := settings.get("pipeline")) is not None and args.pipeline is None:
        # A picture may come from a stranger, who has no say in what is imported.
        raise ValueError(f"{args.from_png} was made by {named}: give --pipeline {named} if you trust it")

    seed = settings.get("seed")
    seed = secrets.randbelow(2**32) if seed is None else seed
    repeated = [each for each in shown for _ in range(args.num)]
    pictures = [Settings(**(settings | each | {"seed": seed + i})) for i, each in enumerate(repeated)]
    return starts, pictures


def plan_shown(args: argparse.Namespace, settings: dict[str, Any]) -> list[dict[str, Any]]:
    """Prompt and label of what to show, one or the other.

    Args:
        settings: Of `--from-png`, which hold where the command line says nothing.
    """
    prompts = list(args.prompts)
    if args.prompt_file:
        prompts += read_prompts(Path(args.prompt_file))
    if prompts and args.labels:
        raise ValueError("a picture shows a prompt or a label, got both")
    shown = [{"prompt": prompt, "label": None} for prompt in prompts]
    shown += [{"prompt": "", "label": label} for label in args.labels]
    if not shown and args.from_png:
        shown = [{name: settings[name] for name in ("prompt", "label")}]
    if not shown:
        raise ValueError("there is no prompt: give one, or --prompt-file, or --label, or --from-png")
    return shown


def plan_paths(out: str, pictures: list[Settings], overwrite: bool) -> list[Path]:
    """A file for each picture: new ones in a folder, or what a file name or pattern says."""
    target = Path(out)
    named = target.suffix.lower() == ".png" and not target.is_dir()
    if not named and target.suffix.lower() in (".jpg", ".jpeg", ".webp"):
        raise ValueError(f"--out {out}: pictures are written as .png, which holds their settings")
    folder, pattern = (target.parent, target.name) if named else (target, "{slug}-{seed}.png")

    paths: list[Path] = []
    for index, settings in enumerate(pictures):
        try:
            path = folder / pattern.format(
                slug=slug(settings.label or settings.prompt), seed=settings.seed, index=index
            )
        except (KeyError, IndexError, ValueError, AttributeError):
            raise ValueError(f"--out may hold {{slug}}, {{seed}} and {{index}}, got {out}") from None
        if named and path in paths:
            raise ValueError(
                f"--out {out} names one file for {len(pictures)} pictures: add {{index}} or {{seed}}"
            )
        if named and path.exists() and not overwrite:
            raise ValueError(f"{path} exists: choose another --out, or --overwrite it")
        stem, number = path.stem, 2
        while not named and not overwrite and path.exists():
            path, number = path.with_name(f"{stem}-{number}.png"), number + 1
        paths.append(path)
    return paths


def slug(text: str) -> str:
    """A prompt or label as part of a file name."""
    return re.sub(r"[\W_]+", "-", text.lower())[:40].strip("-") or "picture"


def draw(pipe: Any, settings: Settings, starts: Mapping[str, "Image"]) -> "Image":
    """One picture."""
    import torch

    what: str | int = settings.prompt
    if settings.label is not None:
        what = pipe.labels[settings.label] if settings.label in pipe.labels else int(settings.label)
    beginning = {**starts, "strength": settings.strength} if starts else {}
    generator = torch.Generator("cpu").manual_seed(settings.seed)
    pictures = pipe(what, generator=generator, return_dict=False, **beginning, **call_options(settings))[0]
    return pictures[0]
