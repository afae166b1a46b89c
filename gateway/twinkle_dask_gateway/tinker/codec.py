"""The core's records and small results to what Tinker clients read."""

from collections.abc import Mapping
from typing import Any, Literal, assert_never

import orjson

from twinkle_dask.operations.events import Completions
from twinkle_dask.operations.values import (
    CheckpointInfo,
    CustomLossCreated,
    Exported,
    Loaded,
    LoraRequest,
    Page,
    RunCreated,
    RunInfo,
    SamplerInfo,
    SamplerSaved,
    Saved,
    SessionInfo,
    Unloaded,
)
from twinkle_dask.store.records import CheckpointKind
from twinkle_dask.types import EmbedResult, GradientStepResult, StepResult
from twinkle_dask_gateway.tinker import replies, wire
from twinkle_dask_gateway.tinker.addresses import format_address

_TYPES: Mapping[CheckpointKind, Literal["training", "sampler", "external"]] = {
    CheckpointKind.TRAINING: "training",
    CheckpointKind.SAMPLER: "sampler",
    CheckpointKind.EXTERNAL: "external",
}


def lora_of(config: wire.LoraConfig) -> LoraRequest:
    """The adapter that a client asks for."""
    return LoraRequest(
        rank=config.rank,
        seed=config.seed,
        train_attn=config.train_attn,
        train_mlp=config.train_mlp,
        train_unembed=config.train_unembed,
    )


def small_result(
    result: RunCreated
    | CustomLossCreated
    | EmbedResult
    | StepResult
    | GradientStepResult
    | Saved
    | SamplerSaved
    | Exported
    | Loaded
    | Unloaded,
) -> dict[str, Any]:
    """A result that every SDK reads as JSON."""
    match result:
        case RunCreated():
            return {"model_id": result.run, "type": "create_model"}
        case CustomLossCreated():
            return {"loss_id": result.loss, "type": "create_custom_loss"}
        case EmbedResult():
            return {"embeddings": result.embeddings.tolist(), "type": "embed"}
        case StepResult():
            # JSON has no NaN or infinity (orjson writes null), and clients want numbers here.
            finite = {k: v for k, v in result.metrics.items() if abs(v) < float("inf")}
            return {"metrics": finite, "type": "optim_step"}
        case GradientStepResult():
            told = {"grad_norm": result.grad_norm, "learning_rate": result.learning_rate}
            return {"metrics": {k: v for k, v in told.items() if v is not None}, "type": "step"}
        case Saved():
            return {"path": format_address(result.address), "type": "save_weights"}
        case SamplerSaved():
            path = result.address and format_address(result.address)
            return {
                "path": path,
                "sampling_session_id": result.sampler,
                "type": "save_weights_for_sampler",
            }
        case Exported():
            path = format_address(result.address)
            return {
                "path": path,
                "size_bytes": result.size_bytes,
                "type": "save_weights_external",
            }
        case Unloaded():
            return {"model_id": result.run, "type": "unload_model"}
        case Loaded():
            path = format_address(result.address)
            return {"path": path, "model_id": result.run, "type": "load_weights"}
        case _:
            assert_never(result)


def model_info(run: RunInfo) -> replies.ModelInfo:
    """What a training client asks for right after its run exists."""
    data = replies.ModelData(
        arch=run.architecture, model_name=run.base_model, tokenizer_id=run.tokenizer_id
    )
    return replies.ModelInfo(
        model_id=run.run, model_name=run.base_model, model_data=data, lora_rank=run.spec.rank
    )


def training_run(run: RunInfo) -> replies.TrainingRun:
    """A run as it is listed."""
    return replies.TrainingRun(
        training_run_id=run.run,
        base_model=run.base_model,
        model_owner=run.owner,
        lora_rank=run.spec.rank,
        last_request_time=run.last_request_at,
        last_checkpoint=run.last_checkpoint and checkpoint(run.last_checkpoint),
        last_sampler_checkpoint=run.last_sampler_checkpoint
        and checkpoint(run.last_sampler_checkpoint),
        user_metadata=texts(run.user_metadata),
    )


def checkpoint(info: CheckpointInfo) -> replies.Checkpoint:
    """A checkpoint as it is listed."""
    address = info.address
    return replies.Checkpoint(
        checkpoint_id=f"{address.kind}/{address.name}",
        checkpoint_type=_TYPES[address.kind],
        time=info.created_at,
        tinker_path=format_address(address),
        size_bytes=info.size_bytes,
        public=info.public,
        user_metadata=texts(info.user_metadata),
        expires_at=info.expires_at,
    )


def weights_info(info: CheckpointInfo) -> replies.WeightsInfo:
    """What a client must know to make a run of a checkpoint's shape."""
    return replies.WeightsInfo(
        base_model=info.base_model,
        lora_rank=info.spec.rank,
        train_unembed=info.spec.train_unembed,
        train_mlp=info.spec.train_mlp,
        train_attn=info.spec.train_attn,
    )


def sampler(info: SamplerInfo) -> replies.Sampler:
    """What a sampling client asks for right after it exists."""
    return replies.Sampler(
        sampler_id=info.sampler,
        base_model=info.base_model,
        model_path=info.address and format_address(info.address),
    )


def completions(some: Completions) -> replies.FutureCompletions:
    """What a client that polls for many results learns."""
    return replies.FutureCompletions(
        completions=[
            replies.FutureFailed(request_id=one.ticket)
            if one.num_bytes is None
            else replies.FutureFinished(
                request_id=one.ticket, response_payload_uncompressed_size=one.num_bytes
            )
            for one in some.items
        ],
        cursor=some.cursor,
    )


def session(info: SessionInfo) -> replies.Session:
    """A session and what was made in it."""
    return replies.Session(
        training_run_ids=list(info.runs),
        sampler_ids=list(info.samplers),
        user_metadata=texts(info.user_metadata),
        display_name=info.display_name,
    )


def cursor(page: Page[Any]) -> replies.Cursor:
    """Where a page lies."""
    return replies.Cursor(offset=page.offset, limit=page.limit, total_count=page.total)


def texts(metadata: Mapping[str, Any]) -> dict[str, str]:
    """Metadata for clients that read nothing but strings, though they may send any JSON."""
    return {
        key: value if isinstance(value, str) else orjson.dumps(value).decode()
        for key, value in metadata.items()
    }
