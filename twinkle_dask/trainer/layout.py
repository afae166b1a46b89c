"""How an adapter's tensors lie in one flat buffer."""

from collections.abc import Mapping
from dataclasses import dataclass, replace
from math import prod

import numpy as np
import torch
from torch import Tensor

from twinkle_dask.errors import InvalidRequest
from twinkle_dask.model.base import BaseModel
from twinkle_dask.trainer import pages
from twinkle_dask.types import Float32Array, LoraSpec


@dataclass(frozen=True, slots=True)
class Layout:
    """Where each weight lies in a flat buffer: one after another, in the order of ``shapes``.

    The As of linears that read one input are neighbours, so that they are one matrix too; the
    output head comes last.

    Attributes:
        shapes: By weight name.
        size: Numbers in all.
        body_size: Numbers before the head's.
    """

    shapes: dict[str, tuple[int, ...]]
    size: int
    body_size: int

    @classmethod
    def of(cls, base: BaseModel, spec: LoraSpec) -> "Layout":
        """The weights of an adapter of this shape."""
        shapes: dict[str, tuple[int, ...]] = {}
        for family in base.families(spec):
            of_family = [target.shapes(spec.rank).items() for target in family]
            for pair in zip(*of_family, strict=True):  # all the As, then all the Bs
                shapes |= pair
        head = f"{base.head.path}.lora_"
        of_head = sum(prod(shape) for name, shape in shapes.items() if name.startswith(head))
        size = sum(map(prod, shapes.values()))
        return cls(shapes, size, size - of_head)

    def zeros(self, device: torch.device) -> Tensor:
        """A buffer of zeros."""
        return torch.zeros(self.size, device=device)

    def views(self, flat: Tensor) -> dict[str, Tensor]:
        """The weights as views of a buffer, or of the beginning of one."""
        views: dict[str, Tensor] = {}
        start = 0
        for name, shape in self.shapes.items():
            size = prod(shape)
            if start + size > len(flat):
                break
            views[name] = flat[start : start + size].view(shape)
            start += size
        return views

    def head_views(self, flat: Tensor) -> dict[str, Tensor]:
        """The head's weights as views of a buffer that holds nothing else."""
        views: dict[str, Tensor] = {}
        start = -self.body_size
        for name, shape in self.shapes.items():
            size = prod(shape)
            if start >= 0:
                views[name] = flat[start : start + size].view(shape)
            start += size
        return views

    def gather(
        self,
        arrays: Mapping[str, Float32Array],
        device: torch.device,
        shapes: Mapping[str, tuple[int, ...]] | None = None,
    ) -> Tensor:
        """Copy arrays from the host into a new buffer.

        Args:
            arrays: One for each weight.
            device: Of the buffer.
            shapes: Of the arrays, in the weights' order, if they are not the weights' own.

        Raises:
            InvalidRequest: A weight is missing, is one too many, or has another shape.
        """
        wanted = self.shapes if shapes is None else shapes
        found = {name: array.shape for name, array in arrays.items()}
        if found != wanted:
            names = found.keys() | wanted.keys()
            name = min(name for name in names if found.get(name) != wanted.get(name))
            raise InvalidRequest(
                f"The state does not fit this base model and LoRA configuration: {name} has shape "
                f"{found.get(name)}, expected {wanted.get(name)}."
            )
        # Not the arrays' own memory: products may round by alignment, and these are aligned.
        size = self.size if shapes is None else sum(map(prod, shapes.values()))
        flat = pages.zeros(size, torch.device("cpu"))
        if arrays:
            np.concatenate([arrays[name].ravel() for name in wanted], out=flat.numpy())
        return flat.to(device)

    def scatter(self, flat: Tensor) -> dict[str, Float32Array]:
        """Copy a buffer to the host, as arrays."""
        host = flat.to("cpu", copy=True)
        return {name: view.numpy() for name, view in self.views(host).items()}


class Layouts:
    """One layout for all runs of one shape: its names would outweigh a small adapter."""

    def __init__(self, base: BaseModel) -> None:
        self._base = base
        self._known: dict[LoraSpec, Layout] = {}

    def of(self, spec: LoraSpec) -> Layout:
        """The layout of an adapter of this shape."""
        shape = replace(spec, seed=0, alpha=1.0, dropout=0.0, rslora=False)
        if shape not in self._known:
            self._known[shape] = Layout.of(self._base, shape)
        return self._known[shape]
