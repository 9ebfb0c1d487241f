"""Signals that come before the first step: while a cache is filled, while the model is compiled."""

import json
import os
import random
import signal
import sys
import threading
import time
from dataclasses import asdict, replace
from itertools import count
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any, NoReturn
from unittest.mock import patch

import psutil
import yaml
from torch._dynamo.callback import callback_handler

from localdit.cli import main
from localdit.data.cache import INDEX
from localdit.files import STAGED
from localdit.training.checkpoint import find_checkpoint
from localdit.training.config import Config
from localdit.training.encode import EncodeConfig, ImageWorker, TextWorker
from localdit.training.stopping import EXIT_CODE

from . import Outcome, experiment
from .caches import PICTURES, contents, fill, shards, toy_config
from .toys import captioned, denoising_run, save_encoders, sent, start

AT_ONCE = 5  # seconds, of a machine that may have other work


@experiment(
    "R4",
    "SIGTERM while a cache is filled, by `localdit encode` or a training: the shard on its way is the last, "
    "the exit code is 143, and the next run makes the rest to the bytes of an unbroken one; a second signal "
    "ends the process in the middle of a shard, and costs that shard alone",
    full=50,
    small=None,
)
def caching(folder: Path, trials: int) -> Outcome:
    config = replace(toy_config(folder), **save_encoders(folder / "encoders"))
    fill(config)
    wanted, kinds, passed, failed = contents(config), {True: 0, False: 0}, 0, set()
    for trial in range(trials):
        config = replace(config, cache=str(folder / f"{trial}" / "cache"))
        command, twice = random.choice(("encode", "train")), trial % 3 == 2
        worker, method, calls = random.choice(((ImageWorker, "load", PICTURES), (TextWorker, "make", 5)))
        call = random.randint(1, calls)
        process, connection = start(stopped_at, command, config, worker, method, call, twice)
        before = sent(connection)
        process.join()
        after = shards(config)
        held = len(before) == 1 and not Path(config.cache, INDEX).exists()
        if twice:
            held &= process.exitcode == -signal.SIGTERM and len(after) == before[0]
        else:
            half = any(STAGED.fullmatch(path.name) for path in Path(config.cache).iterdir())
            held &= process.exitcode == EXIT_CODE and len(after) == before[0] + 1 and not half
        fill(config)
        held &= contents(config) == wanted and after.items() <= shards(config).items()
        passed += held
        kinds[twice] += 1
        if not held:
            failed.add(f"{command}, {method} {call}, {'two signals' if twice else 'one signal'}")
    note = f"{kinds[False]} with one signal, {kinds[True]} with two"
    return Outcome(trials, passed, "; ".join([note, *sorted(failed)]))


@experiment(
    "R4",
    "SIGTERM while the model is compiled for the first time: the step is taken and saved, the exit code "
    "is 143, and the next run goes on; a second signal ends the process at once, and leaves none behind",
    full=4,
    small=None,
)
def first_compile(folder: Path, trials: int) -> Outcome:
    """Each trial compiles anew, in its second step: in the first the operations are counted. In three of four
    a second signal comes, so that they need not wait for the compiler."""
    encoders, source = save_encoders(folder / "encoders"), captioned(folder / "pictures", 4 * [(64, 64)])
    passed, slowest, failed = 0, 0.0, set()
    for trial in range(trials):
        run, twice = folder / f"{trial}" / "run", trial % 4 != 0
        config = denoising_run(run, source, encoders, {}, max_steps=3, batch_size=2, compile=True)
        inductor = folder / f"{trial}" / "inductor"
        process, connection = start(stopped_in_compilation, config, inductor, twice)
        told = sent(connection)
        process.join()
        ended = time.monotonic()
        found = find_checkpoint(run, "auto")
        held = len(told) == 1 and told[0]["compiling"] and gone(told[0]["processes"])
        if held and twice:
            slowest = max(slowest, ended - told[0]["time"])
            held = process.exitcode == -signal.SIGTERM and found is None and slowest < AT_ONCE
        elif held:
            held = process.exitcode == EXIT_CODE and found is not None and found.name == "step-00000002"
            process, connection = start(stopped_in_compilation, config, inductor, None)
            sent(connection)
            process.join()
            found = find_checkpoint(run, "auto")
            held &= process.exitcode == 0 and found is not None and found.name == "step-00000003"
        passed += held
        if not held:
            failed.add(f"trial {trial}: exit code {process.exitcode}, {found and found.name}, {told}")
    one = -(-trials // 4)
    note = (
        f"few, since each compiles: {one} with one signal, {trials - one} with two (at most {slowest:.1f} s)"
    )
    return Outcome(trials, passed, "; ".join([note, *sorted(failed)]))


def stopped_at(
    command: str,
    config: EncodeConfig,
    worker: type,
    method: str,
    call: int,
    twice: bool,
    connection: Connection,
) -> None:
    """Run a command that fills a cache, with a signal at the n-th call of a method of the worker.

    Sends the number of shards that there are then. A second signal follows when the first was heard.
    """
    original, calls = getattr(worker, method), count(1)

    def called(*args: Any) -> Any:
        if next(calls) == call:
            connection.send(len(shards(config)))
            terminate(twice)
        return original(*args)

    folder = Path(config.cache).parent
    run = denoising_run(folder / "run", config.source, asdict(config), {}, max_steps=1, batch_size=2)
    with patch.object(worker, method, called):
        command_of(command, folder, config if command == "encode" else run)


def stopped_in_compilation(
    config: Config, inductor: Path, twice: bool | None, connection: Connection
) -> None:
    """Train, with a signal, or two, within seconds of the beginning of the first compilation; None: without.

    Sends whether it was still going on, when the last signal was sent, and the processes that it had started.
    """
    os.environ["TORCHINDUCTOR_CACHE_DIR"] = str(inductor)
    running = 0

    def interrupt() -> None:
        time.sleep(random.uniform(0, 3))
        compiling = running > 0
        if twice:
            terminate(twice=False)
            wait_until_heard()
        processes = [child.pid for child in psutil.Process().children(recursive=True)]
        connection.send({"compiling": compiling, "processes": processes, "time": time.monotonic()})
        terminate(twice=False)

    def begin(_: object) -> None:
        nonlocal running
        running += 1
        if twice is not None and not began.is_set():
            began.set()
            threading.Thread(target=interrupt, daemon=True).start()

    def end(_: object) -> None:
        nonlocal running
        running -= 1

    began = threading.Event()
    callback_handler.register_start_callback(begin)
    callback_handler.register_end_callback(end)
    command_of("train", Path(config.output_dir).parent, config)


def command_of(command: str, folder: Path, config: Config | EncodeConfig) -> NoReturn:
    """`localdit encode` or `localdit train`, and the end of the process with its exit code."""
    folder.mkdir(exist_ok=True)
    path = folder / f"{command}.yaml"
    path.write_text(yaml.safe_dump(json.loads(json.dumps(asdict(config)))))
    sys.stdout = sys.stderr = open(os.devnull, "w")  # noqa: SIM115 (it ends with the process)
    signal.signal(signal.SIGUSR1, lambda *_: None)  # for `wait_until_heard`
    sys.exit(main([command, str(path)]))


def terminate(twice: bool) -> None:
    os.kill(os.getpid(), signal.SIGTERM)
    if twice:
        wait_until_heard()
        os.kill(os.getpid(), signal.SIGTERM)


def wait_until_heard() -> None:
    """Signals that come at once count as one. A main thread that goes to sleep as a signal comes hears of it
    when it wakes: here it may wait for the very thread that waits for it, so it is woken."""
    while signal.getsignal(signal.SIGTERM) != signal.SIG_DFL:
        os.kill(os.getpid(), signal.SIGUSR1)
        time.sleep(0.001)


def gone(processes: list[int], seconds: float = 60) -> bool:
    """Whether processes end, if they have not yet, within a time."""
    deadline = time.monotonic() + seconds
    while any(map(psutil.pid_exists, processes)) and time.monotonic() < deadline:
        time.sleep(0.1)
    return not any(map(psutil.pid_exists, processes))
