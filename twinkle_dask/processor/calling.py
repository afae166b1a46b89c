"""One call of a tenant's, with all that it may touch."""

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, TypeAlias

from twinkle_dask.errors import InvalidRequest
from twinkle_dask.processor.encoding import encoder
from twinkle_dask.processor.naming import checked
from twinkle_dask.processor.rows import Encode
from twinkle_dask.processor.sources import Doors
from twinkle_dask.processor.states import DatasetState, LoaderState, ObjectState
from twinkle_dask.processor.streams import Streams
from twinkle_dask.processor.tables import Area
from twinkle_dask.types import Json

AnyState: TypeAlias = DatasetState | LoaderState | ObjectState


@dataclass(slots=True, kw_only=True)
class Call:
    """One call with all that it may touch.

    Attributes:
        processor: Id of the processor.
        state: Of the processor; changed in place of the old one.
        others: States of the processors that the arguments name, by id; may be changed as well.
        streams: Iterations that this process has in hand.
        models: Served models, name to source, for templates.
        saved_folder: The tenant's own area, among the blobs.
        saved: A file that was written into the tenant's area, if one was.
        over: There is no next row, or no such one.
    """

    processor: str
    function: str
    arguments: Json
    state: AnyState
    others: dict[str, AnyState]
    area: Area
    doors: Doors
    streams: Streams
    models: Mapping[str, str]
    saved_folder: str
    saved: Json | None = None
    over: bool = False
    changed: set[str] = field(default_factory=set[str])

    def read(self, model: type[Any]) -> Any:
        """The arguments of the function."""
        return checked(model, self.function, self.arguments)

    def encode(self, template: Json | None) -> Encode:
        """How a template encodes rows."""
        return encoder(template, self.models)

    def dataset(self, processor: str) -> DatasetState:
        """Another processor of the tenant, which must be a data set."""
        state = self.others.get(processor.removeprefix("pid:"))
        if not isinstance(state, DatasetState):
            raise InvalidRequest("The argument dataset must be a data set made before.")
        return state
