"""The command line: `localdit generate | convert | train | evaluate | benchmark`.

What a program wants to read goes to stdout (paths, or JSON lines), what a person wants to read to stderr.
PyTorch and what else is slow to import is left to the command that needs it, once its arguments are checked.
"""

import argparse
import dataclasses
import json
import logging
import os
import re
import secrets
import sys
import time
from collections.abc import Sequence
from importlib import metadata
from pathlib import Path
from typing import TYPE_CHECKING, Any, NoReturn

from localdit import MINI, __version__
from localdit.pictures import DTYPES, FORMATS, SCHEDULERS, Settings, read_picture, read_settings, write_png

if TYPE_CHECKING:
    import torch
    from PIL.Image import Image

    from localdit import LocalDiTPipeline

DTYPE_HELP = f"{', '.join(DTYPES)} (default: float32 on a CPU, bfloat16 elsewhere)"
DEVICE_HELP = "cpu, cuda, cuda:1, mps, ... (default: a GPU if there is one)"
MODEL_HELP = (
    f"pipeline folder, hub name, or 'mini', the small model in the package (default: {Settings.model})"
)


def main(argv: Sequence[str] | None = None) -> int:
    """Run one command. Returns the exit code: 0, 2 after an error, 130 after Ctrl-C."""
    parser = build_parser()
    args = parser.parse_args(argv)
    if args.command is None:
        parser.print_help()
        return 0
    try:
        args.run(args)
    except KeyboardInterrupt:
        print("localdit: interrupted", file=sys.stderr)
        return 130
    except Exception as error:
        if args.debug:
            raise
        print(f"localdit: error: {describe(error)}", file=sys.stderr)
        return 2
    return 0


def describe(error: Exception) -> str:
    """An error in words."""
    if isinstance(error, OSError) and error.filename:
        return f"{error.filename}: {error.strerror}"
    # Where the message was not written for users, the type is half of it.
    return str(error) if isinstance(error, ValueError | OSError) else f"{type(error).__name__}: {error}"


class Parser(argparse.ArgumentParser):
    """One that says what is wrong in one line."""

    def __init__(self, **kwargs: Any):
        super().__init__(formatter_class=argparse.RawDescriptionHelpFormatter, allow_abbrev=False, **kwargs)

    def error(self, message: str) -> NoReturn:
        self.exit(2, f"localdit: error: {message} (see {self.prog} --help)\n")


def build_parser() -> Parser:
    """The parser of all commands. Each sets `run`, the function that it calls."""
    parser = Parser(
        prog="localdit",
        description="Text to pictures, with diffusion transformers whose attention is local.",
        epilog='a first picture:\n  localdit generate "a red circle left of a blue square"',
    )
    parser.add_argument("-V", "--version", action="version", version=f"localdit {__version__}")
    commands = parser.add_subparsers(dest="command", metavar="COMMAND", title="commands")
    for add in (add_generate, add_convert, add_train, add_evaluate, add_benchmark):
        command = add(commands)
        command.add_argument("--debug", action="store_true", help="show the traceback of an error")
    return parser


# --- generate -----------------------------------------------------------------------------------------------


def add_generate(commands: Any) -> Parser:
    parser: Parser = commands.add_parser(
        "generate",
        usage="%(prog)s PROMPT [PROMPT ...] [options]",
        help="make pictures from prompts",
        description="Make pictures from prompts, or from prompts and a picture.\n\n"
        "Picture i has the seed SEED + i and its own generator, so it comes out the same when made alone.\n"
        "Each PNG carries its settings, paths of files included; --from-png makes it again.",
        epilog="examples:\n"
        '  localdit generate "a red circle left of a blue square"\n'
        '  localdit generate "a green star" "a pink ring" --num 3 --seed 7 --out stars/\n'
        '  localdit generate "a green star" --image scene.png --strength 0.6\n'
        '  localdit generate --prompt-file prompts.txt --out "{index:03d}-{slug}.png" --json\n'
        "  localdit generate --from-png outputs/a-green-star-7.png --steps 50",
    )
    what = parser.add_argument_group("what to draw")
    what.add_argument("prompts", nargs="*", metavar="PROMPT", help="what the picture shows; one or more")
    what.add_argument(
        "--prompt-file", metavar="FILE", help="more prompts, one a line; empty lines do not count"
    )
    what.add_argument("--negative", metavar="TEXT", help="what it should not show")
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
        "--from-png", metavar="FILE", help="the settings of this picture; options given here go first"
    )

    how = parser.add_argument_group("how")
    how.add_argument("--num", type=int, default=1, metavar="N", help="pictures of each prompt (default: 1)")
    how.add_argument(
        "--seed", type=int, metavar="SEED", help="of the first picture (default: drawn, and said)"
    )
    how.add_argument(
        "--size", type=parse_size, metavar="WxH", help="in pixels, or one number (default: the model's)"
    )
    how.add_argument("--steps", type=int, metavar="N", help=f"denoising steps (default: {Settings.steps})")
    how.add_argument(
        "--guidance",
        type=float,
        metavar="G",
        help=f"weight of the prompt; 1 is none (default: {Settings.guidance})",
    )
    how.add_argument(
        "--scheduler",
        choices=sorted(SCHEDULERS),
        metavar="NAME",
        help=f"{', '.join(sorted(SCHEDULERS))} (default: the model's)",
    )
    how.add_argument("--model", metavar="MODEL", help=MODEL_HELP)
    how.add_argument("--dtype", choices=DTYPES, metavar="DTYPE", help=DTYPE_HELP)
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
    parser.set_defaults(run=generate)
    return parser


def generate(args: argparse.Namespace) -> None:
    """Draw one picture after the other, and write each when it is there."""
    start, pictures = plan_pictures(args)
    paths = plan_paths(args.out, pictures, args.overwrite)

    device, dtype = choose_device(args.device, pictures[0].dtype)
    pictures = [dataclasses.replace(settings, dtype=dtype) for settings in pictures]
    first = pictures[0]
    if args.quiet:
        logging.disable(logging.WARNING)
    else:
        seeds = f"seed {first.seed}" if len(pictures) == 1 else f"seeds {first.seed} to {pictures[-1].seed}"
        print(f"{first.model} on {device} in {dtype}, {first.steps} steps, {seeds}", file=sys.stderr)
    pipe = load_pipeline(first.model, dtype, first.scheduler).to(device)
    made_with = {"localdit": __version__, "torch": metadata.version("torch"), "device": device.type}
    made_with["scheduler"] = type(pipe.scheduler).__name__

    for index, (settings, path) in enumerate(zip(pictures, paths)):
        # Disabled by None, the bar is there on a terminal alone.
        pipe.set_progress_bar_config(desc=f"{index + 1}/{len(pictures)}", disable=args.quiet or None)
        started = time.perf_counter()
        picture = draw(pipe, settings, start)
        seconds = round(time.perf_counter() - started, 3)
        path.parent.mkdir(parents=True, exist_ok=True)
        write_png(picture, path, settings, made_with)
        line = {"file": str(path), "seconds": seconds, **dataclasses.asdict(settings), "made_with": made_with}
        print(json.dumps(line) if args.json else path, flush=True)


def plan_pictures(args: argparse.Namespace) -> tuple["Image | None", list[Settings]]:
    """The picture to start from, if any, and the settings of each picture to draw.

    What the command line says goes before what `--from-png` says, and that before the defaults.
    """
    settings = dict(vars(read_settings(args.from_png))) if args.from_png else {}
    for field in dataclasses.fields(Settings):
        if (value := getattr(args, field.name, None)) is not None:
            settings[field.name] = value

    prompts = list(args.prompts)
    if args.prompt_file:
        lines = Path(args.prompt_file).read_text(encoding="utf-8-sig").splitlines()
        prompts += [line.strip() for line in lines if line.strip()]
    prompts = prompts or ([settings["prompt"]] if args.from_png else [])
    if not prompts:
        raise ValueError("there is no prompt: give one, or --prompt-file, or --from-png")
    if args.num < 1:
        raise ValueError(f"--num must be at least 1, got {args.num}")

    start = None
    if settings.get("image") is not None:
        start, digest = read_picture(settings["image"])
        if args.image is None and digest != settings["image_sha256"]:
            raise ValueError(f"{settings['image']} is not what {args.from_png} was made from: give --image")
        settings |= {"image": os.path.abspath(settings["image"]), "image_sha256": digest}
    elif args.strength is not None:
        raise ValueError("--strength says how far to leave --image, which is not given")
    settings["model"] = find_model(settings.get("model", Settings.model))

    seed = settings.pop("seed", None)
    seed = secrets.randbelow(2**32) if seed is None else seed
    settings.pop("prompt", None)
    repeated = [prompt for prompt in prompts for _ in range(args.num)]
    pictures = [Settings(**settings, prompt=prompt, seed=seed + i) for i, prompt in enumerate(repeated)]
    return start, pictures


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
            path = folder / pattern.format(slug=slug(settings.prompt), seed=settings.seed, index=index)
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


def slug(prompt: str) -> str:
    """A prompt as part of a file name."""
    return re.sub(r"[\W_]+", "-", prompt.lower())[:40].strip("-") or "picture"


def parse_size(text: str) -> tuple[int, int]:
    """Width and height of "640x480", or of "512" for a square."""
    match = re.fullmatch(r"(\d+)(?:x(\d+))?", text)
    if not match:
        raise argparse.ArgumentTypeError(f"must be WIDTHxHEIGHT or one number, got {text!r}")
    return int(match[1]), int(match[2] or match[1])


def find_model(name: str) -> str:
    """A pipeline folder as an absolute path; "mini" and hub names stand for themselves.

    Raises:
        ValueError: when it can be none of these.
    """
    if name == "mini":
        return name
    if os.path.isdir(name):
        if not os.path.isfile(os.path.join(name, "model_index.json")):
            raise ValueError(f"{name} is no pipeline folder: it holds no model_index.json")
        return os.path.abspath(name)
    if not re.fullmatch(r"\w[\w.-]*/[\w.-]+", name):
        raise ValueError(f"there is no folder {name}, and it is no hub name, which reads OWNER/NAME")
    return name


def choose_device(name: str | None, dtype: str | None) -> tuple["torch.device", str]:
    """The named device, or the machine's GPU, or its CPU; and the given dtype, or the one that suits it.

    Raises:
        ValueError: when PyTorch finds no such device here.
    """
    import torch

    accelerator = torch.accelerator.current_accelerator(check_available=True)
    try:
        device = torch.device(name or accelerator or "cpu")
    except RuntimeError:
        raise ValueError(f"PyTorch knows no device {name}") from None
    if device.type not in ("cpu", accelerator and accelerator.type):
        raise ValueError(f"PyTorch finds no device {name} here")
    return device, dtype or ("float32" if device.type == "cpu" else "bfloat16")


def load_pipeline(model: str, dtype: str, scheduler: str | None = None) -> "LocalDiTPipeline":
    """Load what `find_model` found, with another scheduler where one is named."""
    import diffusers
    import torch
    import transformers

    from localdit import LocalDiTPipeline

    # The bar of the denoising is enough.
    diffusers.utils.logging.disable_progress_bar()
    transformers.utils.logging.disable_progress_bar()
    folder = MINI if model == "mini" else model
    pipe = LocalDiTPipeline.from_pretrained(folder, dtype=getattr(torch, dtype))
    if scheduler:
        pipe.scheduler = getattr(diffusers, SCHEDULERS[scheduler]).from_config(pipe.scheduler.config)
    return pipe


def draw(pipe: "LocalDiTPipeline", settings: Settings, start: "Image | None") -> "Image":
    """One picture."""
    import torch

    width, height = settings.size or (None, None)
    pictures = pipe(
        settings.prompt,
        settings.negative,
        image=start,
        strength=settings.strength,
        width=width,
        height=height,
        num_inference_steps=settings.steps,
        guidance_scale=settings.guidance,
        generator=torch.Generator("cpu").manual_seed(settings.seed),
        return_dict=False,
    )[0]
    return pictures[0]


# --- convert ------------------------------------------------------------------------------------------------


def add_convert(commands: Any) -> Parser:
    parser: Parser = commands.add_parser(
        "convert",
        help="published checkpoints to diffusers folders, and back",
        description="Turn a published checkpoint (.safetensors or .pt) into a diffusers folder of the\n"
        "transformer, or such a folder into a checkpoint. With --pipeline, put a pipeline folder together.",
        epilog="examples:\n"
        "  localdit convert model.safetensors transformer/\n"
        "  localdit convert transformer/ model.safetensors\n"
        "  localdit convert model.safetensors pipeline/ --pipeline --dtype bfloat16\n"
        "  localdit convert transformer/ pipeline/ --pipeline --vae vae/ --text-encoder owner/t5",
    )
    parser.add_argument(
        "source", metavar="IN", help="a checkpoint file, or the folder of a transformer or pipeline"
    )
    parser.add_argument("target", metavar="OUT", help="the folder or .safetensors file to write")
    parser.add_argument(
        "--dtype", choices=DTYPES, metavar="DTYPE", help=f"{', '.join(DTYPES)} (default: the source's)"
    )
    parser.add_argument("--overwrite", action="store_true", help="replace OUT if it is there")

    file = parser.add_argument_group("what a checkpoint file leaves open")
    file.add_argument(
        "--global-context",
        choices=("auto", "fold", "random", "none"),
        default="auto",
        metavar="CHOICE",
        help="auto: with it if the file has its tensors, else fold; fold: without it, its mean put in the "
        "weights; random: with it, drawn from --seed; none: without it (default: auto)",
    )
    file.add_argument("--seed", type=int, metavar="SEED", help="of --global-context random")
    file.add_argument("--window-size", type=int, metavar="N", help="side of an attention window in tokens")
    file.add_argument("--sample-size", type=int, metavar="N", help="side of the latents it was trained on")
    file.add_argument(
        "--config",
        nargs="+",
        type=parse_field,
        default=[],
        metavar="KEY=VALUE",
        help="other fields of its config",
    )

    parts = parser.add_argument_group(
        "a whole pipeline", "Each part is a folder, or a hub name OWNER/NAME[/FOLDER]."
    )
    parts.add_argument("--pipeline", action="store_true", help="write a pipeline; IN is its transformer")
    parts.add_argument("--vae", metavar="NAME", help="default: stabilityai/sdxl-vae")
    parts.add_argument("--text-encoder", metavar="NAME", help="default: google/flan-t5-xxl")
    parts.add_argument("--tokenizer", metavar="NAME", help="default: the text encoder's")
    parts.add_argument("--scheduler", metavar="NAME", help="default: that of the published model")
    parser.set_defaults(run=convert)
    return parser


def convert(args: argparse.Namespace) -> None:
    """Convert, and say what was found, dropped and decided."""

    def given(*names: str) -> dict[str, Any]:
        return {name: value for name in names if (value := getattr(args, name)) is not None}

    parts = given("vae", "text_encoder", "tokenizer", "scheduler")
    if parts and not args.pipeline:
        raise ValueError(f"--{next(iter(parts)).replace('_', '-')} is a part of a pipeline: add --pipeline")

    import torch

    from localdit import conversion

    choices = {
        **given("global_context", "seed", "window_size", "sample_size", "overwrite"),
        **dict(args.config),
        "dtype": args.dtype and getattr(torch, args.dtype),
    }
    if args.pipeline:
        report = conversion.assemble_pipeline(args.target, transformer=args.source, **parts, **choices)
    else:
        report = conversion.convert(args.source, args.target, **choices)
    print(f"found: {report.found}, {report.parameters:,} parameters", file=sys.stderr)
    for reason, names in report.dropped.items():
        print(f"dropped: {len(names)} tensors, {reason}", file=sys.stderr)
    for sentence in report.chosen:
        print(f"chosen: {sentence}", file=sys.stderr)
    print(report.target)


def parse_field(text: str) -> tuple[str, Any]:
    """Name and value of "rope=false"; the value is JSON."""
    name, equals, value = text.partition("=")
    try:
        if name and equals:
            return name, json.loads(value)
    except json.JSONDecodeError:
        pass
    raise argparse.ArgumentTypeError(f"must be KEY=VALUE with a JSON value, as rope=false, got {text!r}")


# --- train --------------------------------------------------------------------------------------------------


def add_train(commands: Any) -> Parser:
    parser: Parser = commands.add_parser(
        "train",
        help="train a model as a YAML file says",
        description="Train a model. The file says all that the run depends on; values can be given anew.\n"
        "Started again, it goes on from its newest checkpoint, as if it had never stopped.",
        epilog="examples:\n"
        "  localdit train configs/local_dit/mini.yaml\n"
        "  localdit train configs/local_dit/mini.yaml train.max_steps=1000 output_dir=runs/short\n"
        "  accelerate launch -m localdit.cli train configs/local_dit/mini.yaml        (several GPUs)",
    )
    parser.add_argument("config", metavar="CONFIG", help="the YAML file of a run")
    parser.add_argument("overrides", nargs="*", metavar="KEY=VALUE", help="values in place of the file's")
    parser.add_argument(
        "--resume",
        default="auto",
        metavar="auto|never|PATH",
        help="the checkpoint to go on from (default: auto, the newest if there is one)",
    )
    parser.set_defaults(run=train)
    return parser


def train(args: argparse.Namespace) -> None:
    from localdit.training.config import load_config

    config = load_config(args.config, args.overrides)
    from localdit.training import loop

    print(loop.train(config, args.resume))


# --- evaluate -----------------------------------------------------------------------------------------------


def add_evaluate(commands: Any) -> Parser:
    parser: Parser = commands.add_parser(
        "evaluate",
        help="measure how well pictures show their prompts",
        description="Measure a model of the synthetic scenes: draw prompts whose combinations were held\n"
        "out of training, read colours, shapes and places back, and count what is right.",
        epilog="example:\n  localdit evaluate --scenes --model runs/mini/final --out runs/mini/scenes",
    )
    parser.add_argument(
        "--scenes", action="store_true", required=True, help="the evaluation (there is one so far)"
    )
    parser.add_argument("--model", default=Settings.model, metavar="MODEL", help=MODEL_HELP)
    parser.add_argument("--count", type=int, default=256, metavar="N", help="prompts (default: %(default)s)")
    parser.add_argument(
        "--seed",
        type=int,
        default=1,
        metavar="SEED",
        help="of the prompts, and of the first picture (default: %(default)s)",
    )
    parser.add_argument("--steps", type=int, metavar="N", help=f"denoising steps (default: {Settings.steps})")
    parser.add_argument(
        "--guidance", type=float, metavar="G", help=f"weight of the prompt (default: {Settings.guidance})"
    )
    parser.add_argument("--dtype", choices=DTYPES, metavar="DTYPE", help=DTYPE_HELP)
    parser.add_argument("--device", metavar="DEVICE", help=DEVICE_HELP)
    parser.add_argument(
        "--out", metavar="FOLDER", help="write each prompt's result, and a grid of pictures, here"
    )
    parser.add_argument("--json", action="store_true", help="print one line of JSON instead of a table")
    parser.set_defaults(run=evaluate)
    return parser


def evaluate(args: argparse.Namespace) -> None:
    """Print the share of pictures that are right in each respect."""
    if args.count < 1:
        raise ValueError(f"--count must be at least 1, got {args.count}")
    model = find_model(args.model)
    device, dtype = choose_device(args.device, args.dtype)
    pipe = load_pipeline(model, dtype).to(device)

    from localdit.evaluation.scenes import evaluate_scenes

    result = evaluate_scenes(
        pipe,
        count=args.count,
        seed=args.seed,
        num_inference_steps=args.steps,
        guidance_scale=args.guidance,
        out=Path(args.out) if args.out else None,
    )
    if args.json:
        print(json.dumps(result))
        return
    print(f"{'right, in %':18}{'one object':>12}{'two objects':>13}")
    for respect in result["one_object"]:
        shares = (result[kind][respect] for kind in ("one_object", "two_objects"))
        one, two = ("-" if share is None else f"{100 * share:.1f}" for share in shares)
        print(f"{respect:18}{one:>12}{two:>13}")


# --- benchmark ----------------------------------------------------------------------------------------------


def add_benchmark(commands: Any) -> Parser:
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
    parser.set_defaults(run=benchmark)
    return parser


def benchmark(args: argparse.Namespace) -> None:
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


if __name__ == "__main__":
    sys.exit(main())
