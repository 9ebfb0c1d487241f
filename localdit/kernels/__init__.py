"""Fast functions of tensors: each a plain definition (`<name>.py`), and its Triton twin (`<name>_triton.py`).

Nothing here imports Triton before it is used.
"""

from importlib.util import find_spec

import torch
from torch import Tensor

HAS_TRITON = find_spec("triton") is not None

# Who computes what has a Triton twin: "auto" is Triton on CUDA where it is installed, else PyTorch.
KERNELS = ("auto", "triton", "torch")

_DTYPES = (torch.float32, torch.float16, torch.bfloat16)


def check_kernels(kernels: str) -> None:
    """Raise ValueError for a name that is none of `KERNELS`, ImportError for Triton where it is missing."""
    if kernels not in KERNELS:
        raise ValueError(f"kernels must be one of {', '.join(KERNELS)}, got {kernels!r}")
    if kernels == "triton" and not HAS_TRITON:
        raise ImportError('kernels="triton" needs Triton, which is not installed: pip install triton')


def use_triton(kernels: str, x: Tensor) -> bool:
    """Whether the Triton twin computes on x, by one of the names in `KERNELS`.

    Raises:
        ValueError: "triton" for a dtype that the kernels do not know, or for a tensor that is not on CUDA,
            which only Triton's interpreter takes, as in the tests.
    """
    if kernels == "torch":
        return False
    known = x.dtype in _DTYPES
    if kernels == "auto":
        return HAS_TRITON and x.is_cuda and known
    if not known:
        raise ValueError(f'kernels="triton" takes float32, float16 and bfloat16, got {x.dtype}')
    if not x.is_cuda and not interpreted():
        raise ValueError(f'kernels="triton" takes tensors on CUDA, got one on {x.device}')
    return True


def interpreted() -> bool:
    """Whether Triton runs its kernels in Python, on any device."""
    from localdit.kernels.triton_mode import INTERPRETED

    return INTERPRETED
