"""What a forward costs when nothing is computed: its kernels, bytes, operations and memory, counted.

The forward runs on PyTorch's meta device, where tensors have a shape and no numbers: a whole transformer of
0.52 B parameters at 4096 pixels takes seconds, and every machine counts the same, which is what eager PyTorch
does on a GPU:

- a *kernel* is an operation that moves data. Views, and tensors that are only allocated, are none;
- each kernel reads each of its inputs once and writes each of its outputs once. What an input repeats by
  broadcasting is read once; of an indexed input only what is taken is read;
- attention and RMSNorm are one kernel each, as on a GPU, where the scores never reach memory.

What a model makes once for a size and keeps is no part of a forward: count the second one.
"""

import math
import weakref
from collections import Counter
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from torch.utils.flop_counter import flop_registry, sdpa_flop_count

aten = torch.ops.aten

# Outputs that share an input's memory tell a view; these make memory and put nothing there.
_ALLOCATIONS = {aten.empty, aten.empty_like, aten.empty_strided, aten.new_empty, aten.new_empty_strided}
_ONLY_WRITTEN = {aten.copy_, aten.fill_, aten.zero_}  # their first argument is not read
_INDEXED = {aten.index_select, aten.index, aten.gather, aten.embedding}  # their first tensor is read in part


@dataclass(frozen=True)
class Kernel:
    """One operation that moves data."""

    name: str  # of the operation in PyTorch: "addmm"
    shape: tuple[int, ...]  # of its first output
    bytes_read: int
    bytes_written: int
    flops: int  # of matrix products, convolutions and attention; 2 for each multiplication and addition

    @property
    def bytes(self) -> int:
        return self.bytes_read + self.bytes_written


@dataclass(frozen=True)
class Count:
    """What a forward costs."""

    kernels: tuple[Kernel, ...]  # in order
    peak_bytes: int  # the most that is alive at a time, above what was there before

    @property
    def bytes(self) -> int:
        """Read and written."""
        return sum(kernel.bytes for kernel in self.kernels)

    @property
    def flops(self) -> int:
        return sum(kernel.flops for kernel in self.kernels)

    def bytes_by_name(self) -> dict[str, int]:
        """Bytes of each kind of operation, the largest first."""
        found: Counter[str] = Counter()
        for kernel in self.kernels:
            found[kernel.name] += kernel.bytes
        return dict(found.most_common())

    def seconds(self, flops_per_second: float, bytes_per_second: float) -> float:
        """What the kernels take one after the other, each as fast as its products or its memory allow."""
        return sum(
            max(kernel.flops / flops_per_second, kernel.bytes / bytes_per_second) for kernel in self.kernels
        )


def count(forward: Callable[[], object]) -> Count:
    """Count what a call does, without gradients.

    Args:
        forward: Any call of PyTorch, on tensors of the meta device.
    """
    with torch.no_grad(), _Tracer() as tracer, _Fused(tracer):
        result = forward()
    del result  # it was alive until here
    return Count(tuple(tracer.kernels), tracer.peak)


class _Tracer(TorchDispatchMode):
    """Notes each operation below autograd, where composed ones have come apart."""

    def __init__(self) -> None:
        super().__init__()
        self.kernels: list[Kernel] = []
        self.live = self.peak = 0
        self._seen = weakref.WeakSet[torch.UntypedStorage]()

    def __torch_dispatch__(
        self, func: Any, types: Any, args: Sequence[Any] = (), kwargs: Mapping[str, Any] | None = None
    ) -> Any:
        kwargs = kwargs or {}
        result = func(*args, **kwargs)
        op = func._overloadpacket
        inputs, outputs = _tensors((args, kwargs)), _tensors(result)
        before = {_storage(x) for x in inputs}
        self._hold(x for x in outputs if _storage(x) not in before)
        changes = func._schema.is_mutable
        if op in _ALLOCATIONS or not (changes or any(_storage(x) not in before for x in outputs)):
            return result

        if "out" in kwargs or op in _ONLY_WRITTEN:
            written = _tensors(kwargs.get("out", result))
            inputs = [x for x in inputs if all(x is not y for y in written)]
        read = [_bytes(x) for x in inputs]
        if op in _INDEXED:
            read[0] = min(read[0], sum(map(_bytes, outputs)))
        flops = flop_registry[op](*args, **kwargs, out_val=result) if op in flop_registry else 0
        self.note(str(op).removeprefix("aten."), sum(read), outputs, flops)
        return result

    def note(self, name: str, bytes_read: int, outputs: Sequence[Tensor], flops: int) -> None:
        shape = tuple(outputs[0].shape)
        self.kernels.append(Kernel(name, shape, bytes_read, sum(map(_bytes, outputs)), int(flops)))

    def _hold(self, tensors: Iterable[Tensor]) -> None:
        """Count memory as alive until nobody has it."""
        for storage in (x.untyped_storage() for x in tensors):
            if storage not in self._seen:
                self._seen.add(storage)
                self.live += storage.nbytes()
                self.peak = max(self.peak, self.live)
                weakref.finalize(storage, self._drop, storage.nbytes())

    def _drop(self, size: int) -> None:
        self.live -= size


class _Fused(TorchFunctionMode):
    """Notes attention and RMSNorm as the one kernel each that a GPU runs: on meta tensors they come apart."""

    def __init__(self, tracer: _Tracer):
        super().__init__()
        self.tracer = tracer

    def __torch_function__(
        self, func: Any, types: Any, args: Sequence[Any] = (), kwargs: Mapping[str, Any] | None = None
    ) -> Any:
        kwargs = kwargs or {}
        if func is F.scaled_dot_product_attention:
            return self._attention(*args, **kwargs)
        if func in (F.rms_norm, torch.rms_norm):
            return self._note("rms_norm", (args, kwargs), torch.empty_like(args[0]), 0)
        return func(*args, **kwargs)

    def _attention(self, query: Tensor, key: Tensor, value: Tensor, *rest: Any, **others: Any) -> Tensor:
        *batch, heads, length, _ = query.shape
        # As the fused kernels lay it out: the heads of a token beside each other.
        out = query.new_empty((*batch, length, heads, value.shape[-1])).transpose(-3, -2)
        flops = sdpa_flop_count(query.shape, key.shape, value.shape)
        return self._note("attention", (query, key, value, rest, others), out, flops)

    def _note(self, name: str, inputs: Any, out: Tensor, flops: int) -> Tensor:
        self.tracer.note(name, sum(map(_bytes, _tensors(inputs))), [out], flops)
        return out


def _tensors(tree: Any) -> list[Tensor]:
    return [leaf for leaf in tree_leaves(tree) if isinstance(leaf, Tensor)]


def _storage(x: Tensor) -> int:
    return x.untyped_storage()._cdata


def _bytes(x: Tensor) -> int:
    """Of a tensor's numbers, each once: along a dimension of stride 0 they repeat."""
    return x.element_size() * math.prod(size for size, stride in zip(x.shape, x.stride()) if stride)
