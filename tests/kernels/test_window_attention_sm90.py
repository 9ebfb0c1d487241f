"""What the window attention's kernels become on an H100 or H200: registers, spills, instructions, accesses.

In bfloat16, heads of 72 and windows of 4 x 4, the published model's, with Triton 3.6 and 3.7 (2 more in one):

| kernel | registers | instructions | products |
| --- | --- | --- | --- |
| forward | 64 | 545 | 20 |
| forward, bias | 64 | 577 | 20 |
| forward of two attentions | 110 | 863 | 40 |
| forward of two attentions, bias | 110 | 918 | 40 |
| backward | 94 | 869 | 50 |
| backward, bias | 90 | 958 | 50 |
"""

import json
import os
import subprocess
import sys
from typing import Any

import pytest
import torch

from localdit.kernels import window_attention_triton as twin

HEAD_DIM = 72
TYPES = {torch.bfloat16: "*bf16", torch.float16: "*fp16", torch.float32: "*fp32"}
CORE = ["forward", "forward bias", "forward dual", "forward dual bias", "backward", "backward bias"]
VARIANTS = ("float16", "float32", "window=2", "window=8", "head_dim=32", "head_dim=128")
OTHERS = [f"{kernel} {variant}" for kernel in ("forward dual bias", "backward bias") for variant in VARIANTS]


def measure(name: str) -> dict[str, Any]:
    """Compile the variant of that name. In a process whose kernels are not interpreted."""
    from sm90 import figures

    words = name.split()
    sizes = {"window": 4, "head_dim": HEAD_DIM}
    sizes |= {key: int(value) for key, found, value in (word.partition("=") for word in words) if found}
    dtype = next((getattr(torch, word) for word in words if word.startswith("float")), torch.bfloat16)
    kernel = twin.forward_kernel if words[0] == "forward" else twin.backward_kernel
    types: dict[str, str | None] = {
        name: TYPES[dtype] if "dual" in words or "2" not in name else None
        for name in kernel.arg_names
        if name.endswith("_ptr")
    }
    types |= {"slots_ptr": "*i32", "dbias_ptr": "*fp32", "weight": "fp32", "count": "i32"}
    if "bias" not in words:
        types |= {"bias_ptr": None, "bias2_ptr": None, "dbias_ptr": None}
    return figures(kernel, types, twin.constants(16, sizes["head_dim"], sizes["window"] ** 2, dtype))


def measured(names: list[str], cache: str) -> dict[str, dict[str, Any]]:
    env = {key: value for key, value in os.environ.items() if key != "TRITON_INTERPRET"}
    run = subprocess.run(
        [sys.executable, __file__, *names],
        env=env | {"TRITON_CACHE_DIR": cache},
        check=True,
        capture_output=True,
        text=True,
    )
    return json.loads(run.stdout)


@pytest.fixture(scope="module")
def core(tmp_path_factory: pytest.TempPathFactory) -> dict[str, dict[str, Any]]:
    return measured(CORE, str(tmp_path_factory.mktemp("triton")))


@pytest.mark.parametrize("name", CORE)
def test_a_kernel_of_the_published_size_stays_in_128_registers_and_spills_nothing(core, name):
    assert core[name]["registers"] <= 128
    assert core[name]["spilled"] == 0


MOST = {"forward bias": 600, "forward dual bias": 950, "backward bias": 1000}


@pytest.mark.parametrize(("name", "most"), MOST.items())
def test_the_instructions_stay_what_they_were_counted_to_be(core, name, most):
    assert core[name]["instructions"] <= most


@pytest.mark.parametrize("name", CORE)
def test_queries_keys_values_and_outputs_move_in_words_of_16_bytes(core, name):
    """Wide accesses alone move all of their bytes. What else is read is the table of slots, 32 bits each."""
    sizes = twin.constants(16, HEAD_DIM, 16, torch.bfloat16)
    warp = 32 * 16  # bytes that the threads of a program move at once
    tensor = sizes["TILE"] * (sizes["MAIN"] + sizes["TAIL"]) * 2 // warp
    bias = sizes["TILE"] ** 2 * 2 // warp
    attentions = 2 if "dual" in name else 1
    loaded = tensor * (4 if "backward" in name else 3) + ("bias" in name) * bias
    stored = tensor * 3 + ("bias" in name) * 2 * bias if "backward" in name else tensor
    assert core[name]["stores"] == {"128": stored}
    assert core[name]["loads"].pop("128") == attentions * loaded
    assert set(core[name]["loads"]) == {"32"}


@pytest.mark.slow
@pytest.mark.parametrize("name", OTHERS)
def test_no_other_dtype_window_or_head_spills_anything(name, tmp_path):
    assert measured([name], str(tmp_path))[name]["spilled"] == 0


if __name__ == "__main__":
    print(json.dumps({name: measure(name) for name in sys.argv[1:]}))
