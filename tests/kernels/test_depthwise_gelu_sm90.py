"""What the depthwise convolution's kernels become on an H100 or H200: registers, spills, accesses.

At the published width of 1152 channels, with Triton 3.6. A thread has four channels of a token: 8 bytes of
16-bit types at a time, 16 of float32, and a warp moves whole sectors either way. With eight to a thread
the kernels would be hardly shorter for each result, and take 145 to 162 registers.

| kernel | registers | instructions | of them in the loop, for 4 results |
| --- | --- | --- | --- |
| forward, bfloat16 | 94 | 537 | 178 |
| forward, float32 | 95 | 435 | 161 |
| gradient at the convolution, bfloat16 | 96 | 483 | 188 |
| gradient at the input, bfloat16 | 80 | 388 | 104 |
| gradient of the taps, bfloat16 | 80 | 669 | 121 |
"""

import json
import os
import subprocess
import sys
from typing import Any

import pytest

from localdit.kernels import depthwise_gelu_triton as twin

TYPES = {"bfloat16": "*bf16", "float16": "*fp16", "float32": "*fp32"}
# The most instructions that each may take: a few above what was counted.
KERNELS = {"forward": 550, "gradient": 500, "input": 400, "weight": 690}
NAMES = [f"{kernel} {dtype}" for kernel in KERNELS for dtype in ("bfloat16", "float32")]


def measure(name: str) -> dict[str, Any]:
    """Compile the variant of that name. In a process whose kernels are not interpreted."""
    from sm90 import figures

    what, dtype = name.split()
    kernel = twin.weight_kernel if what == "weight" else twin.convolve_kernel
    types: dict[str, str | None] = {name: TYPES[dtype] for name in kernel.arg_names if name.endswith("_ptr")}
    types |= {"rows_ptr": "*i32", "columns_ptr": "*i32", "sums_ptr": "*fp32", "grad_sums_ptr": "*fp32"}
    types |= {"height": "i32", "across": "i32", "tokens": "i32"}
    if what == "weight":
        types["parts_ptr"] = "*fp32"
    else:
        absent = {
            "forward": ("grad", "grad_sums"),
            "gradient": ("sums",),
            "input": ("sums", "grad", "grad_sums"),
        }
        types |= {f"{name}_ptr": None for name in absent[what]}
    return figures(kernel, types, twin.constants(kernel, 1152, 64))


@pytest.fixture(scope="module")
def compiled(tmp_path_factory: pytest.TempPathFactory) -> dict[str, dict[str, Any]]:
    env = {key: value for key, value in os.environ.items() if key != "TRITON_INTERPRET"}
    run = subprocess.run(
        [sys.executable, __file__, *NAMES],
        env=env | {"TRITON_CACHE_DIR": str(tmp_path_factory.mktemp("triton"))},
        check=True,
        capture_output=True,
        text=True,
    )
    return json.loads(run.stdout)


@pytest.mark.parametrize("name", NAMES)
def test_a_kernel_stays_in_128_registers_and_spills_nothing(compiled, name):
    assert compiled[name]["registers"] <= 128
    assert compiled[name]["spilled"] == 0


@pytest.mark.parametrize("name", NAMES)
def test_the_instructions_stay_what_they_were_counted_to_be(compiled, name):
    assert compiled[name]["instructions"] <= KERNELS[name.split()[0]]


@pytest.mark.parametrize("name", NAMES)
def test_maps_move_four_channels_at_a_time(compiled, name):
    """Only the tables of lines are read, and only sums are written, one word of 32 bits at a time."""
    what, dtype = name.split()
    vector = "128" if dtype == "float32" else "64"
    loads, stores = compiled[name]["loads"], compiled[name]["stores"]
    if what == "gradient":  # which also reads the gradients at the sums
        loads[vector] -= loads.pop("128", 0) if dtype == "bfloat16" else 0
    assert set(loads) == {"32", vector}
    assert loads["32"] <= 6  # three columns; two rows ahead of the loop, one in it
    assert stores.pop(vector, 0) == (what != "weight")
    assert sum(stores.values()) == {"forward": 1, "weight": 9}.get(what, 0)


if __name__ == "__main__":
    print(json.dumps({name: measure(name) for name in sys.argv[1:]}))
