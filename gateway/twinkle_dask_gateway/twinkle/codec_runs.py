"""Runs and checkpoints in Twinkle's words."""

from twinkle_dask.errors import InvalidRequest
from twinkle_dask.operations.values import CheckpointAddress, CheckpointInfo, RunInfo
from twinkle_dask.store.records import CheckpointKind
from twinkle_dask_gateway import addresses
from twinkle_dask_gateway.twinkle.replies import runs as replies

_TYPES = {
    CheckpointKind.TRAINING: "training",
    CheckpointKind.SAMPLER: "sampler",
    CheckpointKind.EXTERNAL: "external",
}


def parse_address(path: str) -> CheckpointAddress:
    """Read an address.

    Raises:
        InvalidRequest: It is none.
    """
    return addresses.parse_address(path, "twinkle")


def format_address(address: CheckpointAddress) -> str:
    """Write an address as clients read it."""
    return addresses.format_address(address, "twinkle")


def source_of(text: str) -> CheckpointAddress | str:
    """What a client loads from: an address, or what else it calls a checkpoint.

    Raises:
        InvalidRequest: It begins as an address and is none.
    """
    return parse_address(text) if addresses.is_address(text) else text


def address_of(run: str, checkpoint_id: str) -> CheckpointAddress:
    """The checkpoint ``<kind>/<name>`` of a run.

    Raises:
        InvalidRequest: It is no such id.
    """
    kind, slash, name = checkpoint_id.partition("/")
    if not slash or "/" in name:
        raise InvalidRequest(
            f"{checkpoint_id[:80]!r} is not the id of a checkpoint; it should read weights/<name>."
        )
    return addresses.address_of(run, kind, name)


def checkpoint(info: CheckpointInfo) -> replies.KeptCheckpoint:
    """A checkpoint."""
    address, spec = info.address, info.spec
    return replies.KeptCheckpoint(
        checkpoint_id=f"{address.kind}/{address.name}",
        checkpoint_type=_TYPES[address.kind],
        time=info.created_at,
        size_bytes=info.size_bytes,
        public=info.public,
        twinkle_path=format_address(address),
        base_model=info.base_model,
        is_lora=True,
        lora_rank=spec.rank,
        train_unembed=spec.train_unembed,
        train_mlp=spec.train_mlp,
        train_attn=spec.train_attn,
        user_metadata=info.user_metadata,
    )


def run(info: RunInfo, save_dir: str | None) -> replies.KeptRun:
    """A run, and where its checkpoints go besides."""
    last, sampler = info.last_checkpoint, info.last_sampler_checkpoint
    return replies.KeptRun(
        training_run_id=info.run,
        base_model=info.base_model,
        model_owner=info.owner,
        save_dir=save_dir,
        is_lora=True,
        corrupted=False,
        lora_rank=info.spec.rank,
        last_request_time=info.last_request_at,
        last_checkpoint=None if last is None else checkpoint(last),
        last_sampler_checkpoint=None if sampler is None else checkpoint(sampler),
        user_metadata=info.user_metadata,
    )
