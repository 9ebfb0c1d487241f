"""Damaged files: single bits, and safetensors files that are cut, flipped or made up."""

import json
import math
import random
import resource
import time
from collections.abc import Callable
from hashlib import sha256
from multiprocessing.connection import Connection
from pathlib import Path

import torch
from diffusers.utils import logging
from safetensors.torch import save

from localdit.cli.verify import examine
from localdit.data.cache import open_cache
from localdit.files import MANIFEST, problems
from localdit.models.local_dit import LocalDiTTransformer2DModel
from localdit.models.single_file import read_state_dict
from localdit.training.checkpoint import load_checkpoint

from . import Outcome, experiment
from .toys import index_cache, save_step, start, write_cache


@experiment(
    "R8",
    "One flipped bit in any file of a checkpoint is found, by a resume and by `localdit verify`, which name "
    "the file",
    full=1000,
    small=10,
)
def flipped_bits(folder: Path, trials: int) -> Outcome:
    path = save_step(folder, 1)
    files = sorted(path.iterdir())
    passed = 0
    for _ in range(trials):
        file = random.choice(files)
        content = bytearray(file.read_bytes())
        bit = random.randrange(8 * len(content))
        content[bit // 8] ^= 1 << bit % 8
        file.write_bytes(content)
        # A changed manifest accuses others, or itself.
        named = "" if file.name == MANIFEST else f"{file.name} "
        found = problems(path), examine(path).problems
        passed += all(any(line.startswith(named) for line in lines) for lines in found)
        content[bit // 8] ^= 1 << bit % 8
        file.write_bytes(content)
    whole = problems(path) == []
    return Outcome(trials, passed if whole else 0, f"in {len(files)} files, the manifest among them")


@experiment(
    "R7",
    "A damaged or made-up safetensors file is refused within a second, by an exception that names the file: "
    "weights, checkpoints, model folders, `localdit verify`",
    full=1500,
    small=15,
)
def damaged_weights(folder: Path, trials: int) -> Outcome:
    return read_in_process(
        folder, trials, ["read_state_dict", "load_checkpoint", "from_pretrained", "verify"]
    )


@experiment("R7", "So is one in the place of a cache's shard", full=1500, small=15)
def damaged_cache(folder: Path, trials: int) -> Outcome:
    return read_in_process(folder, trials, ["cache, text", "cache, images"])


def read_in_process(folder: Path, trials: int, entries: list[str]) -> Outcome:
    """Each trial is a file; every entry has to refuse it, unless it is well-formed after all."""
    numbers = random.sample(range(1500), trials)
    failures: dict[int, str] = {}
    grown, accepted, slowest = 0, 0, 0.0
    while numbers:
        process, connection = start(read_damaged, folder, numbers, entries)
        connection.recv()  # it is ready
        try:
            while numbers:
                if not connection.poll(60):
                    raise EOFError
                match connection.recv():
                    case ("begin", number, entry):
                        running = number, entry
                    case ("end", failure, seconds, fine):
                        slowest, accepted = max(slowest, seconds), accepted + fine
                        if failure:
                            failures[running[0]] = f"{running[1]}: {failure}"
                    case ("next", memory):
                        grown = max(grown, memory)
                        numbers = numbers[1:]
        except EOFError:
            failures[running[0]] = f"{running[1]}: the process died or hung"
            numbers = numbers[1:]
        process.kill()
        process.join()
    note = (
        f"{len(entries)} entries each; {accepted} reads met a file that was well-formed all the same; "
        f"slowest {slowest:.2f} s of the CPU; memory grew by {grown / 2**20:.0f} MiB over all"
    )
    if failures:
        note += "; case {}: {}".format(*next(iter(failures.items())))
    return Outcome(trials, trials - len(failures), note)


def read_damaged(folder: Path, numbers: list[int], names: list[str], connection: Connection) -> None:
    """Read the cases of these numbers through each of these entries."""
    torch.set_num_threads(1)
    logging.set_verbosity_error()  # diffusers tells of keys that it does not know
    _, most = resource.getrlimit(resource.RLIMIT_AS)
    # Room to work, and none for what a made-up header asks for.
    size = int(Path("/proc/self/statm").read_text().split()[0]) * resource.getpagesize()
    entries = [(name, *ENTRIES[name](folder)) for name in names]
    resource.setrlimit(resource.RLIMIT_AS, (size + 2**30, most))
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    connection.send("ready")
    for number in numbers:
        for name, base, file, read in entries:
            connection.send(("begin", number, name))
            data = damage(base, number)
            file.unlink(missing_ok=True)
            file.write_bytes(data)
            fine, failure, started = well_formed(data), "", time.process_time()
            try:
                read()
                if not fine:
                    failure = "it was accepted"
            except (MemoryError, RecursionError) as error:
                failure = repr(error)
            except Exception as error:
                if file.name not in str(error):
                    failure = f"no file named in {error!r}"
            seconds = time.process_time() - started  # other processes may be busy
            if seconds >= 1:
                failure = failure or f"it took {seconds:.1f} s"
            connection.send(("end", failure, seconds, fine))
        connection.send(("next", 1024 * (resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before)))
    connection.recv()  # until it is killed


# --- Entries: what is read, from which file, and by what ----------------------------------------------------

Entry = tuple[bytes, Path, Callable[[], object]]


def single_file(folder: Path) -> Entry:
    file = folder / "published.safetensors"
    return small_file(), file, lambda: read_state_dict(file)


def checkpoint(folder: Path) -> Entry:
    """With a manifest that agrees, as only somebody who wants to harm would write it."""
    path = save_step(folder / "run", 1)
    file = path / "model.safetensors"
    listed = json.loads((path / MANIFEST).read_text())

    def read() -> object:
        data = file.read_bytes()
        listed["files"][file.name] = {"bytes": len(data), "sha256": sha256(data).hexdigest()}
        (path / MANIFEST).write_text(json.dumps(listed))
        return load_checkpoint(path)

    return small_file(), file, read


def transformer(folder: Path) -> Entry:
    path = folder / "transformer"
    sizes = {"num_attention_heads": 2, "attention_head_dim": 12, "num_layers": 1, "caption_channels": 8}
    LocalDiTTransformer2DModel(**sizes, sample_size=8).save_pretrained(path)
    file = path / "diffusion_pytorch_model.safetensors"
    return file.read_bytes(), file, lambda: LocalDiTTransformer2DModel.from_pretrained(path)


def cached_text(folder: Path) -> Entry:
    return cached(folder / "cached text", 1)


def cached_images(folder: Path) -> Entry:
    return cached(folder / "cached images", 0)


def cached(folder: Path, which: int) -> Entry:
    """A shard of a cache whose index agrees with its size."""
    folder.mkdir()
    shards = write_cache(folder)

    def read() -> object:
        index_cache(folder, *shards)
        return open_cache(folder)[0, 0]

    return shards[which].read_bytes(), shards[which], read


def verify(folder: Path) -> Entry:
    """Raises what it reports, so that one rule serves all."""
    file = folder / "verified.safetensors"

    def read() -> None:
        if found := examine(file).problems:
            raise ValueError(found)

    return small_file(), file, read


ENTRIES: dict[str, Callable[[Path], Entry]] = {
    "read_state_dict": single_file,
    "load_checkpoint": checkpoint,
    "from_pretrained": transformer,
    "cache, text": cached_text,
    "cache, images": cached_images,
    "verify": verify,
}

# --- Cases --------------------------------------------------------------------------------------------------


def small_file() -> bytes:
    rng = torch.Generator().manual_seed(0)
    tensors = {f"layer.{i}": torch.randn(3, i + 1, generator=rng) for i in range(3)}
    return save(tensors, metadata={"format": "pt"})


def damage(base: bytes, number: int) -> bytes:
    """Case `number`: the first are cut within the header, then come made-up headers, then random damage."""
    length = int.from_bytes(base[:8], "little")
    header, data = base[8 : 8 + length], base[8 + length :]
    if number < 250:
        return base[:number]
    if number - 250 < len(MADE_UP):
        return with_header(MADE_UP[number - 250](json.loads(header)), data)
    rng = random.Random(number)
    at = rng.randrange(8 + length)
    match rng.randrange(6):
        case 0:
            return base[: rng.randrange(len(base))]
        case 1:
            return base + rng.randbytes(rng.randrange(1, 100))
        case 2:
            return rng.randbytes(8) + base[8:]
        case 3:
            return base[:at] + rng.randbytes(1) + base[at + 1 :]
        case 4:
            return base[:at] + base[at + rng.randrange(1, 20) :]
        case _:
            flipped = bytearray(base)
            flipped[at] ^= 1 << rng.randrange(8)
            return bytes(flipped)


def with_header(header: object, data: bytes) -> bytes:
    text = header if isinstance(header, bytes) else json.dumps(header).encode()
    return len(text).to_bytes(8, "little") + text + data


def changed(key: str, value: object) -> Callable[[dict], object]:
    """A header whose first tensor says something else."""

    def change(header: dict) -> object:
        name = next(name for name in header if name != "__metadata__")
        return {**header, name: {**header[name], key: value}}

    return change


MADE_UP: list[Callable[[dict], object]] = [
    lambda header: b"",
    lambda header: b"null",
    lambda header: b"[]",
    lambda header: b"[" * 100_000,
    lambda header: b'{"a":' * 100_000,
    lambda header: b"\xff" * 100,
    lambda header: {},
    lambda header: {"__metadata__": {"format": "pt"}},
    lambda header: {**header, "__metadata__": {"format": 7}},
    lambda header: {**header, "__metadata__": []},
    lambda header: {**header, "twin": next(v for k, v in header.items() if k != "__metadata__")},
    lambda header: json.dumps(header).encode()[:-1] + b"," + json.dumps(header).encode()[1:],
    changed("dtype", "F99"),
    changed("dtype", "F64"),
    changed("dtype", "BOOL"),
    changed("dtype", None),
    changed("dtype", 32),
    changed("shape", [2**62, 4]),
    changed("shape", [2**32, 2**32]),
    changed("shape", [-3, -1]),
    changed("shape", [10**30]),
    changed("shape", [0]),
    changed("shape", []),
    changed("shape", "3"),
    changed("shape", None),
    changed("shape", [3.0, 1.0]),
    changed("data_offsets", [0, 2**63]),
    changed("data_offsets", [2**63, 2**64 - 1]),
    changed("data_offsets", [2**64, 2**65]),
    changed("data_offsets", [12, 0]),
    changed("data_offsets", [-12, 0]),
    changed("data_offsets", [0]),
    changed("data_offsets", [0, 12, 24]),
    changed("data_offsets", [4, 16]),
    changed("data_offsets", None),
    changed("more", {"nested": [[[[]]]]}),
]
BYTES = {
    "F64": 8,
    "I64": 8,
    "U64": 8,
    "C64": 8,
    "F32": 4,
    "I32": 4,
    "U32": 4,
    "F16": 2,
    "BF16": 2,
    "I16": 2,
} | {
    "U16": 2,
    "I8": 1,
    "U8": 1,
    "BOOL": 1,
    "F8_E4M3": 1,
    "F8_E5M2": 1,
    "F8_E8M0": 1,
}


def well_formed(data: bytes) -> bool:
    """Whether this is a safetensors file, by the format's own description and without its library."""
    try:
        length = int.from_bytes(data[:8], "little")
        if len(data) < 8 or 8 + length > len(data):
            return False
        header = json.loads(data[8 : 8 + length].decode("utf-8"))
        metadata = header.pop("__metadata__", {}) or {}
        if not all(isinstance(text, str) for pair in metadata.items() for text in pair):
            return False
        place = 0
        for entry in sorted(header.values(), key=lambda entry: entry["data_offsets"]):
            begin, end = entry["data_offsets"]
            count = math.prod(entry["shape"])
            if (
                begin != place
                or end - begin != BYTES[entry["dtype"]] * count
                or min(entry["shape"], default=0) < 0
            ):
                return False
            place = end
        return place == len(data) - 8 - length
    except (ValueError, KeyError, TypeError, AttributeError, RecursionError, OverflowError):
        return False
