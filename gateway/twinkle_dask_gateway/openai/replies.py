"""Answers, as they stand in the OpenAPI document; the routes write most of them as bytes."""

from typing import Any

from pydantic import BaseModel, ConfigDict


class _Answer(BaseModel):
    model_config = ConfigDict(protected_namespaces=())


class ChatError(_Answer):
    """A failure."""

    error: dict[str, Any]


class ChatModel(_Answer):
    """Something that can answer."""

    id: str
    object: str = "model"
    created: int = 0
    owned_by: str = "twinkle_dask"


class ChatModels(_Answer):
    """The base models."""

    object: str = "list"
    data: list[ChatModel]


class ChatCompletion(_Answer):
    """A whole answer."""

    id: str
    object: str = "chat.completion"
    created: int
    model: str
    choices: list[dict[str, Any]]
    usage: dict[str, Any]
