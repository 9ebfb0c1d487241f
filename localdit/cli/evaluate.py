"""`localdit evaluate`: how good pictures are, by scene accuracy, FID, KID and CLIP score.

Pictures are chosen by one option and measures by others, so that several measures share one set of pictures.
"""

import argparse
import dataclasses
import json
import sys
import tempfile
from contextlib import ExitStack
from datetime import timedelta
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
from localdit.pictures import Settings

if TYPE_CHECKING:
    import torch
    from accelerate import PartialState

    from localdit.data.scenes import Caption, Scene
    from localdit.evaluation.clip_score import Clip
    from localdit.evaluation.distance import Inception

CLIP = "openai/clip-vit-large-patch14"
SCENES, SAMPLES, SEED, BATCH_SIZE = 256, 4, 1, 8
PACKAGES = ("localdit", "torch", "diffusers", "transformers", "pillow", "torchmetrics", "torch-fidelity")
# Options of how pictures are made, which say nothing about pictures that are there.
DRAWING = ("size", "steps", "guidance", "negative", "scheduler", "pipeline")
MAKING = ("model", "count", "num", "seed", "dtype", *DRAWING)


def add(commands: Any) -> Parser:
    parser: Parser = commands.add_parser(
        "evaluate",
        usage="%(prog)s (--scenes | --prompts FILE | --geneval FILE | --images FOLDER) [options]",
        help="measure how good pictures are, and how well they show their prompts",
        description="Make pictures, or take those of a folder, and measure them.\n\n"
        "Picture i has the seed SEED + i and its own generator. Pictures are kept in OUT/images, figures in\n"
        "OUT/results.json, the first 64 pictures in OUT/grid.png. Stopped and started again, it goes on\n"
        "with the pictures that are there; it never mixes them with those of other settings or weights.",
        epilog="examples:\n"
        "  localdit evaluate --scenes --model runs/mini/final --out runs/mini/scenes\n"
        "  localdit evaluate --prompts prompts.txt --reference photos/ --clip-score --out runs/a\n"
        "  localdit evaluate --images made/ --reference photos/\n"
        "  localdit evaluate --geneval evaluation_metadata.jsonl --out runs/geneval\n"
        "  accelerate launch -m localdit.cli evaluate --prompts ... --out runs/a       (several GPUs)\n\n"
        "What the figures mean, and when they mislead: docs/evaluation.md",
    )
    which = parser.add_argument_group("which pictures").add_mutually_exclusive_group(required=True)
    which.add_argument(
        "--scenes",
        action="store_true",
        help="of synthetic scenes held out of training, or of the classes of a model of classes; measures "
        "colours, shapes and places too",
    )
    which.add_argument("--prompts", metavar="FILE", help="of these prompts, one a line")
    which.add_argument(
        "--geneval", metavar="FILE", help="of GenEval's JSON lines, in the folders that its judge expects"
    )
    which.add_argument("--images", metavar="FOLDER", help="those in this folder and below it")

    what = parser.add_argument_group("what is measured")
    what.add_argument("--reference", metavar="FOLDER", help="FID and KID against the real pictures in here")
    what.add_argument(
        "--inception",
        metavar="FILE",
        help="weights of InceptionV3 for them (default: PyTorch's cache, or downloaded)",
    )
    what.add_argument(
        "--clip-score",
        nargs="?",
        const=CLIP,
        metavar="CLIP",
        help=f"likeness to the prompts, by a CLIP's folder or hub name (default: {CLIP})",
    )

    how = parser.add_argument_group("how pictures are made")
    how.add_argument(
        "--count", type=int, metavar="N", help=f"prompts (default: {SCENES} of the scenes, all of a file)"
    )
    how.add_argument(
        "--num", type=int, metavar="N", help=f"pictures of each prompt (default: 1, GenEval {SAMPLES})"
    )
    how.add_argument(
        "--seed", type=int, metavar="SEED", help=f"of the scenes, and of the first picture (default: {SEED})"
    )
    add_drawing_options(how)
    how.add_argument(
        "--negative", metavar="TEXT", help="what no picture should show (default: the pipeline's)"
    )

    where = parser.add_argument_group("where")
    where.add_argument("--device", metavar="DEVICE", help=DEVICE_HELP)
    where.add_argument(
        "--batch-size",
        type=int,
        default=BATCH_SIZE,
        metavar="N",
        help="pictures at a time; changes no figure (default: %(default)s)",
    )
    where.add_argument(
        "--out", metavar="OUT", help="folder for pictures and figures (--scenes and --images can do without)"
    )
    where.add_argument("--json", action="store_true", help="print one line of JSON instead of a table")
    parser.set_defaults(run=run)
    return parser


@dataclasses.dataclass
class Plan:
    """What is to be measured, and what has to be made for it."""

    prompts: dict[Path, str | None]  # of every picture; None where it plays no part
    settings: dict[Path, Settings] = dataclasses.field(default_factory=dict)  # of those that are made
    texts: dict[Path, str] = dataclasses.field(default_factory=dict)  # files that stand among them
    scenes: "list[tuple[Scene, Caption]]" = dataclasses.field(default_factory=list)


@dataclasses.dataclass
class Found:
    """What came out."""

    pictures: dict[Path, dict[str, Any]]  # what of each
    figures: dict[str, Any] = dataclasses.field(default_factory=dict)
    computed_with: dict[str, Any] = dataclasses.field(default_factory=dict)
    warnings: list[str] = dataclasses.field(default_factory=list)
    bad: dict[Path, str] = dataclasses.field(default_factory=dict)  # what cannot be read, and why


@dataclasses.dataclass
class Judges:
    """What measures the pictures. Loaded before any is made, so that what is missing is said at once."""

    reference: list[Path] = dataclasses.field(default_factory=list)
    inception: "Inception | None" = None
    clip: "Clip | None" = None


def run(args: argparse.Namespace) -> None:
    """Make the pictures, each process its share; measure them in the first process."""
    check(args)
    from accelerate import PartialState
    from accelerate.utils import parse_flag_from_env

    from localdit.files import locked

    # The others wait while the first process looks through what is there, and for the slowest to be done.
    # Unlike Accelerator, PartialState has to be told of the variable by which processes meet on a CPU.
    state = PartialState(cpu=parse_flag_from_env("ACCELERATE_USE_CPU"), timeout=timedelta(days=7))
    device_name = args.device
    if state.num_processes > 1:
        if args.device or not args.out:
            raise ValueError(
                "several processes need --out, where all of them write, and have devices of their own"
            )
        device_name = str(state.device)
    device, dtype = choose_device(device_name, args.dtype)
    with ExitStack() as stack:
        out = Path(args.out or stack.enter_context(tempfile.TemporaryDirectory()))
        plan = plan_found(args) if args.images else plan_made(args, out / "images", dtype)
        if state.is_main_process:
            stack.enter_context(locked(out))
            judges = load_judges(args)
        made_with = make(args, plan, out, state, device) if plan.settings else None
        if state.is_main_process:
            report(args, plan, made_with, measure(args, plan, judges, device), out)
    state.destroy_process_group()


def check(args: argparse.Namespace) -> None:
    """Refuse what does not go together.

    Raises:
        ValueError: says what.
    """
    if args.images:
        for name in MAKING:
            if getattr(args, name) is not None:
                raise ValueError(
                    f"--{name} says how pictures are made, and those of --images are there already"
                )
    if (args.images or args.prompts) and not (args.reference or args.clip_score):
        raise ValueError("there is nothing to measure: add --reference FOLDER (FID and KID) or --clip-score")
    if (args.prompts or args.geneval) and not args.out:
        raise ValueError("--out must name the folder for the pictures")
    if args.inception and not args.reference:
        raise ValueError("--inception is for FID and KID, whose --reference is not given")
    if args.scenes and args.num is not None:
        raise ValueError("--num is for --prompts and --geneval; the scenes have --count")
    for name in ("count", "num", "batch_size"):
        if (value := getattr(args, name)) is not None and value < 1:
            raise ValueError(f"--{name.replace('_', '-')} must be at least 1, got {value}")


def plan_made(args: argparse.Namespace, folder: Path, dtype: str) -> Plan:
    """The file of every picture to make, and its settings."""
    from localdit.evaluation.prompts import read_geneval, read_prompts
    from localdit.evaluation.scenes import prompts_for
    from localdit.pipelines.common import label_names

    plan = Plan({})
    seed = SEED if args.seed is None else args.seed
    num = args.num or (SAMPLES if args.geneval else 1)
    model = find_model(args.model or Settings.model)
    pipeline, config = find_pipeline(model, args.pipeline)
    names = None  # of labels, where that is what the scenes are of
    if args.scenes:
        if hasattr(pipeline, "labels"):
            names = label_names(config.get("id2label"))
        plan.scenes = list(prompts_for(names, args.count or SCENES, seed))
        prompts = [caption.text for _, caption in plan.scenes]
    elif args.geneval:
        asked = read_geneval(Path(args.geneval))[: args.count]
        prompts = [prompt for prompt, _ in asked]
        plan.texts = {folder / f"{i:05}" / "metadata.jsonl": line for i, (_, line) in enumerate(asked)}
    else:
        prompts = read_prompts(Path(args.prompts))[: args.count]

    given = {name: getattr(args, name) for name in DRAWING}
    for index, prompt in enumerate(prompt for prompt in prompts for _ in range(num)):
        sample = f"{index // num:05}/samples/{index % num:04}.png"
        path = folder / (sample if args.geneval else f"{index:05}.png")
        shown: dict[str, Any] = {"prompt": prompt} if names is None else {"prompt": "", "label": prompt}
        settings = Settings(**shown, seed=seed + index, model=model, dtype=dtype, **given)
        plan.settings[path] = fit(settings, pipeline, config)
        plan.prompts[path] = prompt
    return plan


def plan_found(args: argparse.Namespace) -> Plan:
    """The pictures of a folder, with their prompts where these are measured."""
    from localdit.evaluation.folders import find_pictures
    from localdit.evaluation.prompts import prompt_of

    paths = find_pictures(Path(args.images))
    return Plan({path: prompt_of(path) if args.clip_score else None for path in paths})


def load_judges(args: argparse.Namespace) -> Judges:
    """Find and load all that measures."""
    judges = Judges()
    if args.reference:
        from localdit.evaluation.distance import load_inception
        from localdit.evaluation.folders import find_pictures

        judges.reference = find_pictures(Path(args.reference))
        judges.inception = load_inception(Path(args.inception) if args.inception else None)
    if args.clip_score:
        from localdit.evaluation.clip_score import load_clip

        judges.clip = load_clip(args.clip_score)
    return judges


def make(
    args: argparse.Namespace, plan: Plan, out: Path, state: "PartialState", device: "torch.device"
) -> dict[str, str]:
    """Make what is not there yet, once what is there was found to be of the same settings and weights.

    Returns:
        What the pictures depend on besides their settings.
    """
    from localdit.evaluation.generation import check_kept, fingerprint, generate

    first = next(iter(plan.settings.values()))
    pipe = load_pipeline(first)
    made_with = {
        "localdit": __version__,
        "torch": metadata.version("torch"),
        "device": device.type,
        "scheduler": type(pipe.scheduler).__name__,
        "weights": fingerprint(pipe),
    }
    if state.is_main_process:
        kept = check_kept(out / "images", plan.settings, made_with["weights"])
        there = f", {kept:,} of them there already" if kept else ""
        what = f"{first.model} on {device} in {first.dtype}, {first.steps} steps"
        print(f"{what}: {len(plan.settings):,} pictures{there}", file=sys.stderr)
        for path, text in plan.texts.items():
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_text(text + "\n", encoding="utf-8")
    state.wait_for_everyone()
    generate(
        pipe.to(device),
        plan.settings,
        made_with,
        batch_size=args.batch_size,
        rank=state.process_index,
        world=state.num_processes,
    )
    state.wait_for_everyone()
    return made_with


def measure(args: argparse.Namespace, plan: Plan, judges: Judges, device: "torch.device") -> Found:
    """Measure the pictures in every way that is asked for.

    Raises:
        ValueError: A picture that was made here cannot be read, or too few of the others can.
    """
    found = Found({path: {} for path in plan.prompts})
    options: dict[str, Any] = {"batch_size": args.batch_size, "device": device}
    if plan.scenes:
        measure_scenes(plan, found)
    if judges.inception is not None:
        from localdit.evaluation.distance import compare

        figures, how, warnings = compare(
            judges.reference, list(plan.prompts), judges.inception, found.bad, **options
        )
        found.figures |= figures
        found.computed_with["fid_kid"] = {"reference": args.reference, **how}
        found.warnings += warnings
    if judges.clip is not None:
        from localdit.evaluation.clip_score import measure_prompts

        prompts = {path: prompt for path, prompt in plan.prompts.items() if prompt is not None}
        scores, how, warnings = measure_prompts(judges.clip, prompts, found.bad, **options)
        found.figures["clip_score"] = sum(scores.values()) / len(scores)
        found.computed_with["clip_score"] = how
        found.warnings += warnings
        for path, score in scores.items():
            found.pictures[path]["clip_score"] = score
    for path, reason in sorted(found.bad.items()):
        if path in plan.settings:
            raise ValueError(f"{path} {reason}: take it away, and it is made again")
    return found


def measure_scenes(plan: Plan, found: Found) -> None:
    """Judge every picture by the scene that its prompt describes."""
    from localdit.evaluation.folders import read_batches
    from localdit.evaluation.scenes import judge, scene_accuracy

    described = dict(zip(plan.prompts, plan.scenes))
    verdicts = []
    for paths, pictures in read_batches(list(described), BATCH_SIZE, lambda picture: picture, found.bad):
        for path, picture in zip(paths, pictures):
            verdicts.append(judge(*described[path], picture))
            found.pictures[path] |= {**dataclasses.asdict(verdicts[-1]), "wrong": verdicts[-1].wrong}
    found.figures |= scene_accuracy(plan.scenes, verdicts)


def report(
    args: argparse.Namespace, plan: Plan, made_with: dict[str, str] | None, found: Found, out: Path
) -> None:
    """Write the results and the grid, and print the figures."""
    from localdit.evaluation.report import Shown, write_report

    results: dict[str, Any] = {"count": len(plan.prompts) - sum(path in found.bad for path in plan.prompts)}
    settings: dict[str, Any] = {"images": args.images}
    if plan.settings:
        settings = dataclasses.asdict(next(iter(plan.settings.values())))
        results["seed"] = settings.pop("seed")
        for name in ("prompt", "label", "image", "image_sha256", "mask", "mask_sha256", "strength"):
            del settings[name]
        settings["prompts"] = args.prompts or args.geneval or "scenes"
    results |= found.figures
    results["warnings"] = found.warnings
    results["settings"] = settings
    results["made_with"] = made_with
    results["computed_with"] = found.computed_with
    results["versions"] = {name: version(name) for name in PACKAGES}
    results["unreadable"] = {str(path): reason for path, reason in sorted(found.bad.items())}

    lines, shown = [], []
    for path, prompt in plan.prompts.items():
        if path in found.bad:
            continue
        made = plan.settings.get(path)
        file = path.relative_to(out) if made else path
        lines.append(
            {"file": str(file), "prompt": prompt, "seed": made and made.seed, **found.pictures[path]}
        )
        shown.append(Shown(path, prompt or "", remark(found.pictures[path])))
    write_report(out, {**results, "pictures": lines}, shown)

    for path, reason in list(results["unreadable"].items())[:10]:
        print(f"{path} {reason}: left out", file=sys.stderr)
    if len(found.bad) > 10:
        print(f"... and {len(found.bad) - 10:,} more; results.json lists them", file=sys.stderr)
    for warning in found.warnings:
        print(f"localdit: warning: {warning}", file=sys.stderr)
    if args.json:
        print(json.dumps(results))
    else:
        print("\n".join(table(results) or [f"{results['count']:,} pictures in {out / 'images'}"]))


def version(package: str) -> str | None:
    """Of an installed package; None where it is not."""
    try:
        return metadata.version(package)
    except metadata.PackageNotFoundError:
        return None


def remark(finding: dict[str, Any]) -> str:
    """What was found of one picture, in few words."""
    words = []
    if "wrong" in finding:
        words.append(f"wrong: {', '.join(finding['wrong'])}" if finding["wrong"] else "all right")
    if "clip_score" in finding:
        words.append(f"CLIP {finding['clip_score']:.1f}")
    return ", ".join(words)


def table(results: dict[str, Any]) -> list[str]:
    """The figures for people."""
    lines = []
    if "one_object" in results:
        lines.append(f"{'right, in %':18}{'one object':>12}{'two objects':>13}")
        for respect in results["one_object"]:
            shares = (results[kind][respect] for kind in ("one_object", "two_objects"))
            one, two = ("-" if share is None else f"{100 * share:.1f}" for share in shares)
            lines.append(f"{respect:18}{one:>12}{two:>13}")
    if "fid" in results:
        how = results["computed_with"]["fid_kid"]
        against = f"{how['pictures']:,} pictures against {how['reference_pictures']:,} of {how['reference']}"
        deviation = "" if results["kid_std"] is None else f"± {results['kid_std']:.5f} over the subsets of "
        size = f"{how['kid_subset_size']:,}"
        lines.append(f"{'FID':18}{results['fid']:12.3f}   {against}")
        lines.append(f"{'KID':18}{results['kid']:12.5f}   {deviation or 'subsets of '}{size}")
    if "clip_score" in results:
        how = results["computed_with"]["clip_score"]
        lines.append(
            f"{'CLIP score':18}{results['clip_score']:12.2f}   {how['pictures']:,} pictures, {how['clip']}"
        )
    return lines
