"""Every collective of a piece of work: what it is, its bytes, and who asked for it.

PyTorch's own collectives, DeepSpeed's (which end in them) and those of hooks in the backward all pass
PyTorch's dispatcher as operators of the namespace `c10d`, so a dispatch mode sees each one with its
tensors. Nothing is estimated: bytes are those of the tensors that were handed over.
"""

from __future__ import annotations

import sys
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

NAMESPACES = ("c10d", "_c10d_functional")
NOT_COLLECTIVES = ("wait_tensor", "barrier", "monitored_barrier_")
OURS, THEIRS = "langcell.", "deepspeed."


@dataclass(frozen=True)
class Collective:
    """One collective as a rank sees it.

    kind: the operator's name; dtype: of what is handed in; shapes: of each tensor handed in; handed,
    received: bytes that the rank hands in, and that it holds afterwards (equal but for gathers and
    scatters); origin: the innermost module of langcell or DeepSpeed that asked for it.
    """

    kind: str
    dtype: str
    shapes: tuple[tuple[int, ...], ...]
    handed: int
    received: int
    origin: str

    @property
    def ours(self) -> bool:
        """Whether langcell asked for it itself, rather than through DeepSpeed."""
        return self.origin.startswith(OURS)


class Collectives(TorchDispatchMode):
    """A context that notes every collective of this process, in `seen`."""

    def __init__(self) -> None:
        super().__init__()
        self.seen: list[Collective] = []

    def __enter__(self) -> Collectives:
        super().__enter__()
        return self

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        if func.namespace in NAMESPACES and func._opname not in NOT_COLLECTIVES:
            self.seen.append(_collective(func, args))
        return func(*args, **(kwargs or {}))


def _collective(func: Any, args: tuple[Any, ...]) -> Collective:
    handed: list[Tensor] = []
    received: list[Tensor] = []
    for argument, value in zip(func._schema.arguments, args, strict=False):
        tensors = [leaf for leaf in tree_leaves(value) if isinstance(leaf, Tensor)]
        (received if argument.name.startswith("output") else handed).extend(tensors)
    return Collective(
        kind=func._opname.strip("_"),
        dtype=str(handed[0].dtype).removeprefix("torch."),
        shapes=tuple(tuple(tensor.shape) for tensor in handed),
        handed=_bytes(handed),
        received=_bytes(received or handed),
        origin=next(_origins(), "torch"),
    )


def _bytes(tensors: list[Tensor]) -> int:
    return sum(tensor.numel() * tensor.element_size() for tensor in tensors)


def _origins() -> Iterator[str]:
    """Modules of langcell and DeepSpeed on the stack, innermost first."""
    frame = sys._getframe(1)
    while frame.f_back is not None:
        frame = frame.f_back
        name = str(frame.f_globals.get("__name__", ""))
        if name.startswith((OURS, THEIRS)) and name != __name__:
            yield name
