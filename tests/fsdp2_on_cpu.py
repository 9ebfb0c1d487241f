"""Run a module as accelerate would on GPUs, with FSDP2, but on a CPU.

    accelerate launch --config_file configs/accelerate/fsdp2.yaml --num_processes 2 \\
        tests/fsdp2_on_cpu.py MODULE [ARGUMENT ...]

PyTorch's FSDP2 works over gloo. accelerate keeps it for accelerators and takes DDP on a CPU, without a word,
so it is told that gloo connects GPUs. All else is accelerate as it is.
"""

import os
import runpy
import sys
from pathlib import Path
from unittest.mock import patch

# Read when the libraries are imported.
os.environ |= {"ACCELERATE_TORCH_DEVICE": "cpu", "CUDA_VISIBLE_DEVICES": "", "OMP_NUM_THREADS": "1"}
os.environ.pop("ACCELERATE_USE_CPU", None)

from accelerate.state import PartialState
from accelerate.utils import DistributedType

if __name__ == "__main__":
    tests = Path(__file__).parent
    sys.path[:0] = [str(tests.parent), str(tests / "pipelines")]
    del sys.argv[0]
    with patch.object(PartialState, "_prepare_backend", lambda *args: ("gloo", DistributedType.MULTI_GPU)):
        runpy.run_module(sys.argv[0], run_name="__main__", alter_sys=True)
