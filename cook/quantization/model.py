"""A model whose linear modules, and perhaps token embedding, are rounded: what the writers of all formats read."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace
from functools import partial

import torch

from cook.base.tensor_files import LazyTensors
from cook.pruning.family import ModelSource
from cook.quantization.schemes import Matrix, QuantizedWeight, Scheme, quantized


@dataclass(frozen=True, kw_only=True)
class QuantizedModel:
    """A model and its rounded weights, each computed on access."""

    source: ModelSource
    """The model in floating point."""
    scheme: Scheme
    """Of the linear modules."""
    matrices: Mapping[str, Matrix]
    """The rounded modules, by path."""
    others: tuple[str, ...]
    """The paths of the linear modules that stay in floating point."""
    precision: torch.dtype | None = None
    """The type that weights had before training rounded them; None: as stored."""

    def weight(self, path: str) -> QuantizedWeight:
        """The rounded weight of a module, with the integers that training has used."""
        matrix, weight = self.matrices[path], self.source.tensors[f"{path}.weight"]
        assert matrix.rows(weight).shape == (matrix.outputs, matrix.inputs), path
        if self.precision is not None:
            weight = weight.to(self.precision)
        return quantized(matrix.rows(weight).contiguous(), matrix.scheme(self.scheme))

    def plain(self) -> Iterator[tuple[str, torch.Tensor]]:
        """Names and weights of everything that is not rounded."""
        rounded = {f"{path}.weight" for path in self.matrices}
        return ((name, tensor) for name, tensor in self.source.tensors.items() if name not in rounded)

    @property
    def embedding(self) -> Matrix | None:
        """The token embedding, if it is rounded."""
        return next((matrix for matrix in self.matrices.values() if matrix.is_embedding), None)

    def with_plain_embedding(self) -> QuantizedModel:
        """The same model with the token embedding in floating point: the rounded values, in the type of the others."""
        linear = {path: matrix for path, matrix in self.matrices.items() if not matrix.is_embedding}
        tensors, dtype = self.source.tensors, self.dtype
        readers = {name: partial(tensors.__getitem__, name) for name in tensors}
        for path in self.matrices.keys() - linear.keys():
            readers[f"{path}.weight"] = partial(lambda path: self.weight(path).dequantized().to(dtype), path)
        return replace(self, source=replace(self.source, tensors=LazyTensors(readers)), matrices=linear)

    @property
    def dtype(self) -> torch.dtype:
        """The type of the weights that are not rounded."""
        found = next((tensor.dtype for _, tensor in self.plain() if tensor.is_floating_point()), torch.float32)
        return found
