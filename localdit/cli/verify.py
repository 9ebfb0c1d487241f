"""`localdit verify`: whether what is on the disk is whole, and what is wrong with it."""

import argparse
import json
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from localdit import MINI
from localdit.cli.common import Parser
from localdit.files import MANIFEST, STAGED, files_in, problems

PICKLES = (".pt", ".pth", ".bin", ".ckpt", ".pkl", ".pickle")


def add(commands: Any) -> Parser:
    parser: Parser = commands.add_parser(
        "verify",
        help="check that files are whole",
        description="Check a checkpoint or a whole run, a pipeline or model folder, a cache of localdit\n"
        "encode, or one .safetensors file: against the manifest where there is one, every safetensors\n"
        "file for damage and for values that are not finite, every JSON file, and what they say of each\n"
        "other. Nothing is changed, and no pickle is opened.\n\n"
        "The exit code is 0 when all is well, 1 when it is not, 2 when PATH is nothing of the kind.",
        epilog="examples:\n"
        "  localdit verify runs/mini          (each checkpoint, and which one a resume would take)\n"
        "  localdit verify runs/mini/final --json",
    )
    parser.add_argument("path", metavar="PATH", help="a folder, a file, or 'mini', the model in the package")
    parser.add_argument("--json", action="store_true", help="print one line of JSON")
    parser.set_defaults(run=run)
    return parser


def run(args: argparse.Namespace) -> int:
    """Print what was found. Returns the exit code."""
    path = Path(args.path)
    report = examine(Path(MINI) if args.path == "mini" and not path.exists() else path)
    print(json.dumps(report.as_json()) if args.json else "\n".join(report.lines()))
    return 0 if report.good else 1


@dataclass
class Report:
    """What was found in one place."""

    path: Path
    kind: str
    files: int = 0
    bytes: int = 0
    problems: list[str] = field(default_factory=list)  # what is about one file begins with its name
    notes: list[str] = field(default_factory=list)  # no problems, but worth knowing
    parts: list["Report"] = field(default_factory=list)  # of a run: its checkpoints and its result

    @property
    def good(self) -> bool:
        return not self.problems and all(part.good for part in self.parts)

    def as_json(self) -> dict[str, Any]:
        return {**vars(self), "path": str(self.path), "good": self.good} | {
            "parts": [part.as_json() for part in self.parts]
        }

    def lines(self) -> Iterator[str]:
        """As a person reads it."""
        yield f"{self.path}: {self._what()}"
        width = max((len(part.path.name) for part in self.parts), default=0)
        for part in self.parts:
            yield f"  {'ok ' if part.good else 'BAD'}  {part.path.name:{width}}  {part._what()}"
            yield from (f"         {sentence}" for sentence in part.problems + part.notes)
        yield from (f"  BAD  {problem}" for problem in self.problems)
        yield from (f"  {note}" for note in self.notes)
        count = len(self.problems) + sum(len(part.problems) for part in self.parts)
        yield f"{count} problem{'s' * (count != 1)}" if count else "all is well"

    def _what(self) -> str:
        size = f"{self.bytes / 1e6:,.1f} MB" if self.bytes >= 1e5 else f"{self.bytes:,} bytes"
        count = f", {self.files} file{'s' * (self.files != 1)}" if self.kind != "a file" else ""
        return f"{self.kind}{count}, {size}"


def examine(path: Path) -> Report:
    """Check whatever is there.

    Raises:
        ValueError: There is nothing, or nothing of a kind that can be checked.
    """
    if path.is_file():
        return examine_file(path)
    if not path.is_dir():
        raise ValueError(f"there is no {path}")

    from localdit.data import cache
    from localdit.training.checkpoint import STATE, checkpoints

    if checkpoints(path):
        return examine_run(path)
    if (path / cache.INDEX).is_file() or any(cache.SHARD.fullmatch(file.name) for file in path.iterdir()):
        return examine_cache(path)
    if (path / STATE).is_file() or path.name.startswith("step-"):
        return examine_folder(path, "a checkpoint")
    if (path / "model_index.json").is_file():
        return examine_folder(path, "a pipeline")
    if (path / "config.json").is_file():
        return examine_folder(path, "a model")
    if (path / MANIFEST).is_file() or any(path.glob("*.safetensors")) or any(path.glob("*/config.json")):
        return examine_folder(path, "a folder")
    raise ValueError(f"{path} holds no checkpoint, run, pipeline, model, cache or other safetensors files")


def examine_run(folder: Path) -> Report:
    """The folder of a training run: each checkpoint, and the finished model."""
    from localdit.training.checkpoint import checkpoints

    report = Report(folder, "a run")
    resume = None
    for path in checkpoints(folder):
        damage = problems(path)
        report.parts.append(examine_folder(path, "a checkpoint", damage))
        resume = resume if damage else path
    final = folder / "final"
    if final.is_dir():
        report.parts.append(examine_folder(final, "the finished model"))
    report.files = sum(part.files for part in report.parts)
    report.bytes = sum(part.bytes for part in report.parts)

    report.notes.append(
        f"a resume goes on from {resume.name}" if resume else "no checkpoint can be resumed from"
    )
    for path in sorted(folder.iterdir()):
        if STAGED.fullmatch(path.name):
            report.notes.append(
                f"{path.name} is being written, or was left by a killed run and goes at its next start"
            )
        elif ".replaced-" in path.name:
            report.notes.append(f"{path.name} was about to be replaced when its run was killed")
        elif ".old-" in path.name:
            report.notes.append(f"{path.name} was left behind when the run went back to an earlier step")
    return report


def examine_folder(folder: Path, kind: str, damage: list[str] | None = None) -> Report:
    """Any folder. damage: what `localdit.files.problems` says of it, where that is known."""
    files = files_in(folder)
    report = Report(folder, kind, len(files), sum(path.stat().st_size for path in files.values()))
    if damage is None and (kind == "a checkpoint" or (folder / MANIFEST).is_file()):
        damage = problems(folder)
    if damage is None:
        report.notes.append("no manifest: a change that leaves a file readable would not show")
    report.problems += damage or []

    tensors: dict[str, set[str]] = {}  # names of the tensors in each safetensors file
    values: dict[str, Any] = {}  # of each JSON file
    for name, path in files.items():
        if path.suffix == ".safetensors":
            tensors[name] = _read_tensors(name, path, report)
        elif path.suffix == ".json":
            try:
                values[name] = json.loads(path.read_bytes())
            except (ValueError, RecursionError) as error:
                report.problems.append(f"{name} is not valid JSON: {error}")
        elif path.suffix in PICKLES:
            report.problems.append(_about_pickle(name))
    for name, value in values.items():
        if name.endswith(".safetensors.index.json"):
            report.problems += _check_shards(name, value, tensors)
    if "model_index.json" in values:
        report.problems += _check_components(values["model_index.json"], folder, tensors)
    return report


def examine_file(path: Path) -> Report:
    """One safetensors file. A pickle is a problem, and is not opened.

    Raises:
        ValueError: It is something else.
    """
    report = Report(path, "a file", 1, path.stat().st_size)
    if path.suffix in PICKLES:
        report.problems.append(_about_pickle(path.name))
    elif path.suffix == ".safetensors":
        _read_tensors(path.name, path, report)
    else:
        raise ValueError(f"a file must be .safetensors to be checked, got {path}")
    return report


def examine_cache(folder: Path) -> Report:
    """What `localdit encode` wrote."""
    from localdit.data import cache

    shards = [path for path in folder.iterdir() if cache.SHARD.fullmatch(path.name)]
    report = Report(folder, "a cache", len(shards), sum(path.stat().st_size for path in shards))
    try:
        report.problems += cache.verify(folder)
    except ValueError as error:
        report.problems.append(str(error))
    return report


def _read_tensors(name: str, path: Path, report: Report) -> set[str]:
    """Look at every tensor of a file. Returns their names."""
    from safetensors import SafetensorError, safe_open

    unfit = []
    try:
        with safe_open(path, "pt") as file:
            names = set(file.keys())
            for key in sorted(names):
                tensor = file.get_tensor(key)
                if tensor.itemsize == 1 and tensor.is_floating_point():
                    tensor = tensor.float()  # of float8, PyTorch cannot tell
                if not tensor.isfinite().all():
                    unfit.append(key)
    except (SafetensorError, OSError) as error:
        report.problems.append(f"{name} cannot be read: {error}")
        return set()
    if unfit:
        report.problems.append(f"{name} holds infinities or NaN, in {_first(unfit)}")
    return names


def _check_shards(name: str, index: Any, tensors: dict[str, set[str]]) -> Iterator[str]:
    """Whether the shards of an index are there and hold what it says."""
    folder = name.rpartition("/")[0]
    try:
        places = {str(key): str(shard) for key, shard in index["weight_map"].items()}
    except (KeyError, TypeError, AttributeError):
        yield f"{name} has no weight_map"
        return
    for shard in sorted(set(places.values())):
        path = f"{folder}/{shard}".removeprefix("/")
        wanted = {key for key, place in places.items() if place == shard}
        if "/" in shard or "\\" in shard:
            yield f"{name} points to {shard}, which is not beside it"
        elif path not in tensors:
            yield f"{path} is missing, a shard of {name}"
        elif wanted != tensors[path]:
            yield f"{path} and {name} differ, in {_first(sorted(wanted ^ tensors[path]))}"


def _check_components(index: Any, folder: Path, tensors: dict[str, set[str]]) -> Iterator[str]:
    """Whether the parts that a pipeline lists are there: models with weights, others with their config."""
    if not isinstance(index, dict):
        yield "model_index.json must be an object"
        return
    for part, value in index.items():
        if not isinstance(value, list) or value == [None, None]:
            continue  # a setting of the pipeline, or a part that it goes without
        if not any((folder / part).glob("*config.json")):
            yield f"{part} is missing: model_index.json lists it, and there is no config in such a folder"
        elif (folder / part / "config.json").is_file() and not any(f.startswith(f"{part}/") for f in tensors):
            yield f"{part} has no safetensors file"


def _first(names: list[str]) -> str:
    return names[0] + (f" and {len(names) - 1} more" if len(names) > 1 else "")


def _about_pickle(name: str) -> str:
    return f"{name} is a pickle, which can run code: localdit convert makes safetensors of published weights"
