"""Work without a network: in a network namespace with nothing in it, and every attempt to connect counted."""

import os
import subprocess
import sys
from pathlib import Path

from . import Outcome, experiment

# Counts what is tried, also where a library swallows the failure.
WATCH = """
import atexit, socket, sys

def refuse(*args, **kwargs):
    attempts.append(args)
    raise OSError("no network")

attempts = []
socket.socket.connect = socket.socket.connect_ex = socket.getaddrinfo = refuse
atexit.register(lambda: print(f"attempts: {len(attempts)}"))
"""
IMPORT = "import localdit, localdit.pipelines, localdit.training.loop, localdit.conversion, localdit.cli"
PIPELINE = """
from localdit import MINI, LocalDiTPipeline
pipe = LocalDiTPipeline.from_pretrained(MINI)
assert pipe("a red circle", num_inference_steps=2).images[0].size == (128, 128)
"""
GENERIC_PIPELINE = """
import localdit.pipelines
from diffusers import DiffusionPipeline
from localdit import MINI
pipe = DiffusionPipeline.from_pretrained(MINI)
assert pipe("a red circle", num_inference_steps=1).images[0].size == (128, 128)
"""
TRAINING = """
from localdit import MINI
from localdit.cli import main
vae = "{block_out_channels: [4, 4], down_block_types: [DownEncoderBlock2D, DownEncoderBlock2D], "
vae += "up_block_types: [UpDecoderBlock2D, UpDecoderBlock2D], layers_per_block: 1, norm_num_groups: 2}"
open("run.yaml", "w").write(f'''
output_dir: run
model: {{_class_name: AutoencoderKL, **}}
objective: {{name: autoencoding, scenes: 4, picture_size: 64, crop_size: 32}}
train: {{max_steps: 2, batch_size: 2, warmup_steps: 1}}
'''.replace(", **}", f", {vae[1:]}"))
assert main(["train", "run.yaml"]) == 0
assert main(["verify", "run"]) == 0
"""
COMMANDS = """
from localdit.cli import main
assert main(["generate", "a green star", "--steps", "1", "--out", "pictures"]) == 0
assert main(["verify", "mini"]) == 0
"""
WORK = {
    "import": IMPORT,
    "the mini pipeline": PIPELINE,
    "the mini by `DiffusionPipeline`": GENERIC_PIPELINE,
    "training and verifying": TRAINING,
    "generating by command": COMMANDS,
}


@experiment(
    "R25",
    "Import, pipeline, training and commands work without a network and do not try to reach one, with "
    "`HF_HUB_OFFLINE=1` and without",
    full=2 * len(WORK),
    small=None,
)
def no_network(folder: Path, trials: int) -> Outcome:
    alone = ["unshare", "--net", "--map-root-user"]
    if subprocess.run([*alone, "true"], capture_output=True).returncode:
        alone = []
    passed, failures = 0, []
    for number in range(trials):
        what, code = list(WORK.items())[number % len(WORK)]
        place = folder / str(number)
        place.mkdir()
        environment = {key: value for key, value in os.environ.items() if not key.startswith("HF_")}
        environment |= {"HF_HOME": str(place / "hub")} | (
            {"HF_HUB_OFFLINE": "1"} if number < len(WORK) else {}
        )
        done = subprocess.run(
            [*alone, sys.executable, "-c", WATCH + code],
            cwd=place,
            env=environment,
            capture_output=True,
            text=True,
        )
        if done.returncode == 0 and done.stdout.splitlines()[-1] == "attempts: 0":
            passed += 1
        else:
            last = (
                (done.stderr.splitlines() or ["?"])[-1] if done.returncode else done.stdout.splitlines()[-1]
            )
            failures.append(f"{what}: {last}")
    where = "in a network namespace of its own" if alone else "with sockets refused"
    return Outcome(trials, passed, "; ".join([where, *failures]))
