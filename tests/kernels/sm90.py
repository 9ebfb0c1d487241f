"""Triton kernels compiled for an H100 or H200 on a machine that has none, and what they become.

Where kernels run in Triton's interpreter they are not compiled: this is for a process of its own.
"""

import re
import subprocess
import tempfile
from collections import Counter
from pathlib import Path
from typing import Any

import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

TOOLS = Path(triton.__file__).parent / "backends/nvidia/bin"


def figures(kernel: Any, types: dict[str, str | None], constants: dict[str, Any]) -> dict[str, Any]:
    """Compile one variant, and count.

    Args:
        kernel: A `triton.jit` function.
        types: Triton's type of each argument that is no stride, None for one that is not given. All others
            are strides: int32, multiples of 16.
        constants: Values of the `constexpr` arguments, and `num_warps`.

    Returns:
        registers: Per thread.
        spilled: Bytes of stack and local memory per thread.
        shared: Bytes of shared memory.
        instructions: In the program, without padding.
        loads, stores: Of global memory by their width in bits.
        products: Instructions of the tensor cores.
    """
    signature, fixed, attributes = {}, {}, {}
    for index, name in enumerate(kernel.arg_names):
        kind = types.get(name, "i32")
        if name in constants or kind is None:
            signature[name], fixed[(index,)] = "constexpr", constants.get(name)
            continue
        signature[name] = kind
        if name not in types or kind.startswith("*"):
            attributes[(index,)] = [["tt.divisibility", 16]]
    compiled = triton.compile(
        ASTSource(kernel, signature, fixed, attributes),
        target=GPUTarget("cuda", 90, 32),
        options={"num_warps": constants["num_warps"]},
    )
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder, "kernel.cubin")
        path.write_bytes(compiled.asm["cubin"])
        usage, assembly = (
            subprocess.run([TOOLS / tool, flag, path], check=True, capture_output=True, text=True).stdout
            for tool, flag in (("cuobjdump", "-res-usage"), ("nvdisasm", "-c"))
        )
    used = {key: int(value) for key, value in re.findall(r"(REG|STACK|LOCAL):(\d+)", usage)}
    names = re.findall(r"^\s+/\*[0-9a-f]+\*/\s+(?:@!?U?P\d\s+)?([A-Z][A-Z0-9_.]*)", assembly, re.MULTILINE)
    names = [name for name in names if name != "NOP"]

    def widths(kind: str) -> dict[int, int]:
        found = (re.fullmatch(rf"{kind}\..*?(?:U?[S]?(8|16)|(64)|(128))?", name) for name in names)
        return dict(Counter(int(next(filter(None, match.groups()), 32)) for match in found if match))

    return {
        "registers": used["REG"],
        "spilled": used["STACK"] + used["LOCAL"],
        "shared": compiled.metadata.shared,
        "instructions": len(names),
        "loads": widths("LDG"),
        "stores": widths("STG"),
        "products": sum(name.startswith(("HMMA", "HGMMA")) for name in names),
    }
