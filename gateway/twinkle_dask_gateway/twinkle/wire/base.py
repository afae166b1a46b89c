"""What all bodies have in common."""

from typing import Annotated

from pydantic import BaseModel, ConfigDict, Field

#: An adapter's name is the client's; the run's id is made of it and the session's.
AdapterName = Annotated[str, Field(min_length=1, max_length=256)]


class Body(BaseModel):
    """A body whose other fields nobody asked for."""

    model_config = ConfigDict(extra="ignore", protected_namespaces=(), allow_inf_nan=False)


class OpenBody(Body):
    """A body whose other fields are arguments of what it names; they stand in ``model_extra``."""

    model_config = ConfigDict(extra="allow")
