"""Bodies of saving, loading and uploading."""

from typing import Annotated, Any

from pydantic import Field

from twinkle_dask_gateway.twinkle.wire.base import AdapterName, Body, OpenBody

Path = Annotated[str, Field(max_length=4096)]
Samples = Annotated[int, Field(ge=0, lt=2**53)]


class SaveAdapter(OpenBody):
    """Save an adapter.

    ``interval`` lets a client call after every step: nothing is saved unless the number of passes
    is a multiple of it.
    """

    adapter_name: AdapterName
    name: Annotated[str, Field(max_length=1024)] | None = None
    save_optimizer: bool = False
    is_sampler: bool = False
    consumed_train_samples: Samples = 0
    interval: Annotated[int, Field(ge=1)] = 1


class LoadAdapter(Body):
    """Set an adapter to a checkpoint."""

    adapter_name: AdapterName
    name: Path
    load_optimizer: bool = False


class ResumeAdapter(Body):
    """Set an adapter to a checkpoint and say how far its client had got."""

    name: Path
    adapter_name: str = ""
    resume_only_model: bool = False


class UploadAdapter(Body):
    """Send a checkpoint's files elsewhere; ``checkpoint_dir`` may be the answer of a save."""

    checkpoint_dir: Path | dict[str, Any]
    hub_model_id: Annotated[str, Field(max_length=256)]
    hub_token: Annotated[str, Field(max_length=1024)] | None = None
    async_upload: bool = True


class AskWeights(Body):
    """Ask for the shape of saved weights."""

    twinkle_path: Path
