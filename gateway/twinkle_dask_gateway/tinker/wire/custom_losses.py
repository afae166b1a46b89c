"""Bodies that define losses."""

from typing import Any, Literal, cast

from pydantic import Field, field_validator

from twinkle_dask.custom_losses import MAX_NODES
from twinkle_dask_gateway.tinker.wire.base import Asked, Id, Seq


class CustomLossInput(Asked):
    """An input: a scalar, of shape [T], or of shape [T, K]."""

    name: str
    rank: Literal[0, 1, 2]


class CustomLossNode(Asked):
    """A node as ``torch.fx`` records it, its arguments in the protocol's own form."""

    op: str
    name: str
    target: str
    args: list[Any] = Field(default_factory=list[Any])
    kwargs: dict[str, Any] = Field(default_factory=dict[str, Any])


class CustomLossGraph(Asked):
    """The nodes in order of execution."""

    format: Literal[1] = 1
    nodes: list[CustomLossNode]

    @field_validator("nodes", mode="before")
    @classmethod
    def _not_too_many(cls, nodes: Any) -> Any:
        # Before they are looked at one by one.
        if isinstance(nodes, list) and len(cast(list[Any], nodes)) > MAX_NODES:
            raise ValueError(f"a custom loss may have {MAX_NODES} nodes")
        return cast(Any, nodes)


class CreateCustomLoss(Asked):
    """``POST create_custom_loss``."""

    session_id: Id
    custom_loss_seq_id: Seq
    name: str
    inputs: list[CustomLossInput] = Field(max_length=64)
    graph: CustomLossGraph
