"""Values that stand in several bodies: tensors and prompts."""

from typing import Any, Literal

from twinkle_dask_gateway.tinker.wire.base import Asked


class TensorData(Asked):
    """Flat numbers with a shape; with indices, the stored values of a CSR matrix."""

    data: list[Any]
    dtype: Literal["int64", "float32"]
    shape: list[int] | None = None
    sparse_crow_indices: list[Any] | None = None
    sparse_col_indices: list[Any] | None = None


class ModelInput(Asked):
    """A prompt in pieces."""

    chunks: list[dict[str, Any]]
