"""What fastpref's operators would do on a GPU, counted on tensors without data.

Matrix products and kernels of its own are replaced by recorders; every other operation runs on the
meta device, where it costs nothing, under a mode that counts its bytes.
"""

import inspect
import sys
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from importlib.util import find_spec
from types import SimpleNamespace
from typing import Any, Literal
from unittest import mock

import torch
from contenders import Mode
from head_shapes import HeadShape
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

META = torch.device("meta")


@dataclass(frozen=True)
class Product:
    """One matrix product, (rows, inner) @ (inner, columns)."""

    name: Literal["logits", "hidden gradient", "weight gradient"]
    rows: int
    inner: int
    columns: int
    adds: bool  # to what its output holds
    operand_bytes: int  # of one number
    out_bytes: int

    @property
    def flops(self) -> int:
        """Multiplications and additions."""
        return 2 * self.rows * self.inner * self.columns

    @property
    def nbytes(self) -> int:
        """Operands read and output written, each once."""
        operands = self.inner * (self.rows + self.columns) * self.operand_bytes
        return operands + self.rows * self.columns * self.out_bytes


@dataclass(frozen=True)
class Kernel:
    """One kernel that is no product: one of fastpref's, or one of PyTorch's."""

    name: str  # "fold", "gradient", "projection", or that of PyTorch's operation
    shape: tuple[int, ...]  # of the largest tensor it touches
    nbytes: int  # read and written
    logits: int = 0  # that pass through it
    flops: int = 0  # of the product inside it


@dataclass(frozen=True)
class HostRead:
    """The host waits for a number from the device."""


Step = Product | Kernel | HostRead


@contextmanager
def replaced(
    steps: list[Step], *, processors: int = 132, weight: Tensor | None = None
) -> Iterator[None]:
    """Within, products and kernels of fastpref are recorded in `steps` and write nothing.

    A GPU of so many `processors` is pretended. With `weight`, products are named for their part.
    """
    # What is to be replaced must have been imported.
    from fastpref.ops import backend, linear_logps_op  # noqa: F401

    if has_triton := find_spec("triton") is not None:
        from fastpref.kernels import logsumexp  # noqa: F401
    signature = inspect.signature(backend.multiply)

    def multiply(*args: Any, **kwargs: Any) -> None:
        bound = signature.bind(*args, **kwargs)
        bound.apply_defaults()
        given = bound.arguments
        left, right, out = (given[name] for name in ("left", "right", "out"))
        assert out.shape == (left.shape[0], right.shape[1])
        steps.append(
            Product(
                _part(right, weight), left.shape[0], left.shape[1], right.shape[1],
                given["add"], left.dtype.itemsize, out.dtype.itemsize,
            )
        )  # fmt: skip

    def fold_tile(tile: Tensor, *_: Any, exponentials: Tensor | None = None, **__: Any) -> None:
        written = 0 if exponentials is None else exponentials.nbytes
        steps.append(_over_logits("fold", tile, tile.nbytes + written))

    def gradient_tile(tile: Tensor, *args: Any) -> None:
        steps.append(_over_logits("gradient", tile, tile.nbytes + args[-1].nbytes))

    def gradient_of_kept_tile(tile: Tensor, *args: Any) -> None:
        steps.append(Kernel("kept tile", tuple(tile.shape), tile.nbytes + args[-1].nbytes))

    def projection_logsumexp(
        hidden: Tensor, weight: Tensor, bias: Any, labels: Any, rows: Any, transform: Any
    ) -> tuple[Tensor, ...]:
        count = len(hidden) if rows is None else len(rows)
        logits = count * len(weight)
        steps.append(
            Kernel(
                "projection", (count, len(weight)), hidden.nbytes + weight.nbytes, logits,
                2 * logits * hidden.shape[1],
            )
        )  # fmt: skip
        return tuple(hidden.new_empty(count, dtype=torch.float32) for _ in range(3))

    functions = SimpleNamespace(
        fold_tile=fold_tile,
        gradient_tile=gradient_tile,
        gradient_of_kept_tile=gradient_of_kept_tile,
    )
    with (
        everywhere("multiply", multiply),
        everywhere("tile_functions", lambda tensor: functions),
        everywhere("projection_logsumexp", projection_logsumexp),
        everywhere("operand_dtype", lambda tensor: tensor.dtype),
        everywhere("uses_triton", lambda tensor: has_triton and tensor.dtype != torch.float64),
        everywhere("multiprocessors", lambda device: processors),
    ):
        yield


@contextmanager
def everywhere(name: str, function: Callable[..., Any]) -> Iterator[None]:
    """Within, `function` is what every module of fastpref that has a function `name` finds."""
    with ExitStack() as stack:
        for path, module in list(sys.modules.items()):
            if path.startswith("fastpref.") and inspect.isfunction(vars(module).get(name)):
                stack.enter_context(mock.patch.object(module, name, function))
        yield


def _part(
    right: Tensor, weight: Tensor | None
) -> Literal["logits", "hidden gradient", "weight gradient"]:
    if weight is None or right.untyped_storage()._cdata != weight.untyped_storage()._cdata:
        return "weight gradient"
    return "logits" if right.stride(0) == 1 else "hidden gradient"


def _over_logits(name: str, tile: Tensor, nbytes: int) -> Kernel:
    return Kernel(name, tuple(tile.shape), nbytes, tile.numel())


class Counting(TorchDispatchMode):  # type: ignore[no-untyped-call]  # PyTorch's own
    """Record PyTorch's own operations on tensors without data."""

    ALLOCATIONS = ("empty", "new_empty", "empty_like", "empty_strided", "new_empty_strided")
    WRITE_ONLY = ("copy_", "fill_", "zero_")
    # They read as much of their first tensor as they give, or write as much as they are given.
    PICKING = ("index_select", "gather", "index", "embedding")
    PLACING = ("scatter_", "index_copy_", "index_add_", "index_put_")

    def __init__(self, steps: list[Step]) -> None:
        super().__init__()  # type: ignore[no-untyped-call]  # PyTorch's own
        self.steps = steps

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Any = None
    ) -> Any:
        """Run and count `func`."""
        kwargs = kwargs or {}
        result = func(*args, **kwargs)
        name = func.overloadpacket.__name__
        views = any(one.alias_info and not one.alias_info.is_write for one in func._schema.returns)
        if views or name in self.ALLOCATIONS:
            return result
        outputs = _tensors(result)
        if not any(tensor.device == META for tensor in outputs):
            return result
        out = _tensors(list(kwargs.values())) if func._overloadname.endswith("out") else []
        inputs = [one for one in _tensors([*args, *kwargs.values()]) if not _has(out, one)]
        self.steps.append(self._kernel(name, inputs, outputs))
        return result

    def _kernel(self, name: str, inputs: list[Tensor], outputs: list[Tensor]) -> Kernel:
        if name.startswith("new_") or name.endswith("_like"):
            inputs = []  # whose sizes are read, not their numbers
        largest = max([*inputs, *outputs], key=lambda tensor: tensor.numel())
        read = sum(tensor.nbytes for tensor in inputs)
        written = sum(tensor.nbytes for tensor in outputs)
        if name in self.WRITE_ONLY:
            read -= inputs[0].nbytes
        elif name in self.PICKING:
            read += written - inputs[0].nbytes
            largest = outputs[0]
        elif name in self.PLACING:
            read -= inputs[0].nbytes
            written = inputs[-1].nbytes
            largest = inputs[-1]
        return Kernel(name, tuple(largest.shape), read + written)


def _tensors(values: Any) -> list[Tensor]:
    """All tensors in lists of lists."""
    if isinstance(values, Tensor):
        return [values]
    if isinstance(values, (list, tuple)):
        return [tensor for value in values for tensor in _tensors(value)]
    return []


def _has(tensors: list[Tensor], one: Tensor) -> bool:
    return any(tensor is one for tensor in tensors)


def count_steps(
    shape: HeadShape,
    tokens: int,
    dtype: torch.dtype,
    mode: Mode,
    *,
    scratch_bytes: int = 0,
    processors: int = 132,
) -> tuple[list[Step], list[Step]]:
    """What the forward and the backward pass of `linear_logps` do; every token has a label."""
    from fastpref.ops.linear_logps_op import (
        Found,
        gradient_by_jacobian,
        gradients_of_operands,
        logps_and_more,
    )

    forward: list[Step] = []
    backward: list[Step] = []
    hidden = torch.empty(tokens, shape.hidden_size, dtype=dtype, device=META)
    weight = torch.empty(shape.vocab_size, shape.hidden_size, dtype=dtype, device=META)
    labels = torch.empty(tokens, dtype=torch.int64, device=META)
    arguments = (hidden, weight, None, labels, 1.0, 1.0, None, -100, True)
    frozen = mode == "frozen"
    with (
        replaced(forward, processors=processors, weight=weight),
        everywhere("labelled_rows", lambda *_: forward.append(HostRead())),  # all rows
        Counting(forward),
    ):
        found = Found(*logps_and_more(*arguments, frozen, False, scratch_bytes))
    if mode == "no-grad":
        return forward, backward
    incoming = torch.empty(tokens, device=META)
    left = (incoming, None, found.running, found.rows, found.n_rows)
    with replaced(backward, processors=processors, weight=weight), Counting(backward):
        if frozen:
            gradient_by_jacobian(*arguments, *left, found.jacobian)
        else:
            gradients_of_operands(*arguments, *left, found.cache, True, True, False)
    return forward, backward
