"""How Triton runs kernels. A constant of a module, read by compilers that cannot ask Triton itself."""

from triton import knobs

# In Python, on any device (TRITON_INTERPRET=1), as Triton reads it when it first sees a kernel.
INTERPRETED: bool = knobs.runtime.interpret
