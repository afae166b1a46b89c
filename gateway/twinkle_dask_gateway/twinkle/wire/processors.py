"""Bodies of the processor service: names, and whatever arguments go with them."""

from twinkle_dask.types import Json
from twinkle_dask_gateway.twinkle.wire.base import OpenBody


class _WithArguments(OpenBody):
    @property
    def arguments(self) -> Json:
        """What the body has beside its names."""
        return dict(self.model_extra or {})


class ProcessorCreate(_WithArguments):
    """Make a processor of a type and class."""

    processor_type: str
    class_type: str


class ProcessorCall(_WithArguments):
    """Call a function of a processor."""

    processor_id: str
    function: str
