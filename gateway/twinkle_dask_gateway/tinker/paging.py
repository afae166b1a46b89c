"""Which part of a list a client asks for."""

from typing import Annotated, Literal, TypeAlias

from fastapi import Query

Limit = Annotated[int, Query(ge=1, le=1000)]
Offset = Annotated[int, Query(ge=0, lt=2**31)]
AccessScope: TypeAlias = Literal["owned", "accessible"]
