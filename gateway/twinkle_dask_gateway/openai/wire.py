"""The body of a chat completion: every field is honoured, harmless, or refused."""

from typing import Annotated, Any

from pydantic import BaseModel, ConfigDict, Field, StrictBool, StrictInt

_Number = Annotated[float, Field(allow_inf_nan=False)]


class StreamOptions(BaseModel):
    """What a stream tells besides its parts."""

    model_config = ConfigDict(extra="ignore")

    include_usage: StrictBool = False


class ChatTemplateOptions(BaseModel):
    """What the model's chat template is told."""

    model_config = ConfigDict(extra="forbid")

    enable_thinking: StrictBool = True


class ChatCompletionRequest(BaseModel):
    """Answer a conversation.

    ``adapter_uri``, ``top_k``, ``repetition_penalty`` and ``chat_template_kwargs`` are beside
    OpenAI's own fields.
    """

    model_config = ConfigDict(extra="allow", protected_namespaces=())

    model: Annotated[str, Field(min_length=1, max_length=4096)]
    messages: Annotated[list[dict[str, Any]], Field(min_length=1)]
    tools: list[dict[str, Any]] | None = None
    tool_choice: Any = None
    temperature: _Number | None = None
    top_p: _Number | None = None
    top_k: StrictInt | None = None
    repetition_penalty: _Number | None = None
    max_tokens: StrictInt | None = None
    max_completion_tokens: StrictInt | None = None
    seed: StrictInt | None = None
    stop: str | list[str] | None = None
    n: StrictInt | None = None
    logprobs: StrictBool | None = None
    top_logprobs: Annotated[StrictInt, Field(ge=0, le=20)] | None = None
    stream: StrictBool | None = None
    stream_options: StreamOptions | None = None
    chat_template_kwargs: ChatTemplateOptions | None = None
    adapter_uri: Annotated[str, Field(max_length=4096)] | None = None
