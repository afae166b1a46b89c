"""Every check of a tenant's values, made before anything is stored or sent.

Each function returns what it was given, images having their places (see ``images``), or raises
``InvalidRequest`` with what is wrong, where, and what would be right.
"""

import math
import re
from collections.abc import Mapping
from dataclasses import replace

import numpy as np
import orjson

from twinkle_dask import lora_targets
from twinkle_dask.checkpoints import encryption
from twinkle_dask.config import LimitConfig
from twinkle_dask.errors import InvalidRequest
from twinkle_dask.losses import CLIP_HIGH, CLIP_LOW, LOSSES, SEQUENCE_RATIO_MASK
from twinkle_dask.operations import images, questions
from twinkle_dask.operations.values import LoraRequest, ServedModel
from twinkle_dask.types import (
    AdamParams,
    CustomLoss,
    Datum,
    Embed,
    ForwardBackward,
    Int32Array,
    LossName,
    LossSpec,
    SampleRequest,
)

_NAME = re.compile(r"[A-Za-z0-9_][A-Za-z0-9._-]*")
MAX_NAME_LENGTH = 128
MIN_TTL_S = 3600
MAX_TTL_S = 10 * 365 * 86400
MAX_LABEL_LENGTH = 256
MAX_TAGS = 64
MAX_DETAIL_LENGTH = 8192
MAX_METADATA_BYTES = 64 * 1024
MAX_RECIPIENTS = 32
MAX_RECIPIENT_LENGTH = 2048  # an SSH key of RSA with 8192 bits has 1,400
MAX_STOPS = 64
MAX_STOP_LENGTH = 1024
#: Of one batch; each takes 8 bytes on its way in and 4 on its way out.
MAX_RAW_SCORES = 4_000_000


def checkpoint_name(name: str) -> str:
    """A checkpoint's name is one safe segment of a path."""
    if not name:
        raise InvalidRequest("A checkpoint name must not be empty.")
    if len(name) > MAX_NAME_LENGTH:
        raise InvalidRequest(
            f"A checkpoint name may have {MAX_NAME_LENGTH} characters, not {len(name)}."
        )
    if not _NAME.fullmatch(name) or ".." in name:
        raise InvalidRequest(
            f"Checkpoint name {name!r} is not usable: letters, digits, '.', '_' and '-' are "
            "allowed, it does not start with '.' or '-', and '..' does not occur."
        )
    return name


def input_tokens(tokens: int | None, limits: LimitConfig) -> int:
    """The tokens of a batch or prompt, as far as they are counted for one request."""
    most = limits.max_input_tokens
    if most is not None and tokens is not None and tokens > most:
        raise InvalidRequest(
            f"Input tokens ({tokens}) exceed the maximum of one request here, {most}. Send it in "
            "several requests."
        )
    return tokens or 0


def ttl(ttl_s: int | None) -> int | None:
    """A lifetime in seconds, from an hour to ten years; None is for ever."""
    if ttl_s is not None and not MIN_TTL_S <= ttl_s <= MAX_TTL_S:
        raise InvalidRequest(f"ttl_seconds must be from {MIN_TTL_S} to {MAX_TTL_S}, not {ttl_s}.")
    return ttl_s


def recipients(keys: tuple[str, ...]) -> tuple[str, ...]:
    """Few public keys of age, each of which can be encrypted for."""
    if len(keys) > MAX_RECIPIENTS:
        raise InvalidRequest(f"An export may have {MAX_RECIPIENTS} recipients, not {len(keys)}.")
    if any(len(key) > MAX_RECIPIENT_LENGTH for key in keys):
        raise InvalidRequest(f"A recipient may have {MAX_RECIPIENT_LENGTH} characters.")
    encryption.parse(keys)
    return keys


def lora(request: LoraRequest, model: ServedModel) -> LoraRequest:
    """Rank within the limit, and something to train; a pattern of targets becomes their paths."""
    limit = model.facts.max_rank
    if not 1 <= request.rank <= limit:
        raise InvalidRequest(f"LoRA rank must be from 1 to {limit}, not {request.rank}.")
    groups = request.train_attn or request.train_mlp or request.train_unembed
    if not groups and request.targets is None and request.target_pattern is None:
        raise InvalidRequest("Train at least one of train_attn, train_mlp and train_unembed.")
    if not 0 < request.alpha < math.inf:
        raise InvalidRequest(f"lora_alpha must be above 0 and finite, not {request.alpha}.")
    if not 0 <= request.dropout < 1:
        raise InvalidRequest(f"lora_dropout must be from 0 to below 1, not {request.dropout}.")
    if request.seed is not None and not -(2**63) <= request.seed < 2**63:
        raise InvalidRequest("A LoRA seed must fit in 64 bits.")
    if request.target_pattern is not None:
        found = lora_targets.matching(request.target_pattern, model.facts.linear_names)
        return replace(request, targets=found, target_pattern=None)
    if request.targets is None:
        return request
    if not request.targets or len(request.targets) > lora_targets.MAX_NAMES:
        raise InvalidRequest(
            f"Name 1 to {lora_targets.MAX_NAMES} target modules, not {len(request.targets)}."
        )
    lora_targets.named(request.targets, model.facts.linear_names)
    return replace(request, targets=tuple(sorted(set(request.targets))))


def sampled(model: ServedModel) -> ServedModel:
    """A model that can be sampled here, not only trained."""
    if (why := model.facts.why_not_sampled) is not None:
        raise InvalidRequest(f"Model {model.name!r} can be trained here and not sampled yet. {why}")
    return model


def batch(request: ForwardBackward, model: ServedModel, limits: LimitConfig) -> ForwardBackward:
    """Tokens, targets and loss inputs of every datum, with room for images."""
    if not request.data:
        raise InvalidRequest("The batch is empty; send at least one datum.")
    if len(request.data) > limits.max_data:
        raise InvalidRequest(
            f"The batch has {len(request.data)} data; send at most {limits.max_data} at a time."
        )
    _asked_of_pass(request)
    request = images.placed_in_batch(request, model, limits)
    for index, datum in enumerate(request.data):
        _datum(datum, request, model, f"Datum {index}")
    return request


def _asked_of_pass(request: ForwardBackward) -> None:
    """How a batch goes through the model, apart from its data."""
    if not 0 < request.temperature < math.inf:
        raise InvalidRequest(f"temperature must be above 0 and finite, not {request.temperature}.")
    _passes_adapter(request)
    if not request.raw_scores:
        return
    if not isinstance(request.loss, LossSpec) or request.loss.name is not LossName.CROSS_ENTROPY:
        raise InvalidRequest("Raw scores are logits; only the loss 'cross_entropy' takes them.")
    if request.num_scores > MAX_RAW_SCORES:
        raise InvalidRequest(
            f"{request.num_scores:,} logits are asked for; {MAX_RAW_SCORES:,} are the most at a "
            "time. Send fewer or shorter rows, or ask for fewer of the vocabulary."
        )


def _passes_adapter(request: ForwardBackward | Embed) -> None:
    if request.backward and not request.adapter:
        raise InvalidRequest(
            "The base model alone has no gradient, since it is frozen: leave its adapter on, or "
            "compute forward only."
        )
    if request.dropout_seed is not None and not 0 <= request.dropout_seed < 2**63:
        raise InvalidRequest("A dropout seed must be from 0 to 2**63 - 1.")
    if not 0 <= request.num_counted < math.inf:
        raise InvalidRequest("What a batch counts for must be a number of at least 0.")


def embed(request: Embed, model: ServedModel, limits: LimitConfig) -> Embed:
    """Tokens of every row, and as many slopes as rows."""
    if not request.rows:
        raise InvalidRequest("The batch is empty; send at least one row.")
    if len(request.rows) > limits.max_data:
        raise InvalidRequest(
            f"The batch has {len(request.rows)} rows; send at most {limits.max_data} at a time."
        )
    _passes_adapter(request)
    for index, row in enumerate(request.rows):
        _tokens(row, model, f"Row {index}")
    if request.slopes is None:
        return request
    shapes = {slope.shape for slope in request.slopes}
    if len(request.slopes) != len(request.rows) or len(shapes) != 1 or len(min(shapes)) != 1:
        raise InvalidRequest("There must be one slope for each row, all of one length.")
    if not all(np.isfinite(slope).all() for slope in request.slopes):
        raise InvalidRequest("The slopes have values that are NaN or infinite.")
    return request


def _datum(datum: Datum, request: ForwardBackward, model: ServedModel, where: str) -> None:
    _tokens(datum.tokens, model, where)
    length = len(datum.tokens)
    targets = datum.target_tokens
    if targets.ndim not in {1, 2} or len(targets) != length:
        raise InvalidRequest(
            f"{where}: target_tokens has shape {targets.shape} but there are {length} tokens; "
            "position i of the input predicts target i, so the lengths must agree."
        )
    if targets.size == 0:
        raise InvalidRequest(f"{where}: target_tokens is empty.")
    _in_vocabulary(targets, model, f"{where}: target_tokens")
    if isinstance(request.loss, CustomLoss):
        _custom_inputs(datum, request.loss, where)
    else:
        _loss_inputs(datum, request.loss, where)


def _custom_inputs(datum: Datum, loss: CustomLoss, where: str) -> None:
    """What a custom loss reads is there, of its rank; the values are the loss's own affair."""
    given = {"logprobs": datum.target_tokens, **datum.custom_inputs}
    for name, rank in loss.ranks.items():
        if name not in given:
            raise InvalidRequest(f"{where}: custom loss {loss.name!r} needs {name!r}.")
        if given[name].ndim != rank:
            what = "target_tokens" if name == "logprobs" else repr(name)
            raise InvalidRequest(
                f"{where}: {what} has shape {given[name].shape}, but custom loss {loss.name!r} "
                f"takes {name!r} of rank {rank}."
            )


def _loss_inputs(datum: Datum, spec: LossSpec, where: str) -> None:
    terms, loss, targets = LOSSES[spec.name], str(spec.name), datum.target_tokens
    if targets.ndim == 2 and not terms.many_targets:
        raise InvalidRequest(f"{where}: loss {loss!r} takes one target a position.")
    names = datum.loss_inputs.keys()
    if missing := sorted(terms.required - names):
        raise InvalidRequest(f"{where}: loss {loss!r} needs {missing[0]!r}.")
    if unknown := sorted(names - terms.required - terms.optional):
        known = ", ".join(sorted({"target_tokens", *terms.required, *terms.optional}))
        hint = " A weight of 0 leaves a token out." if unknown[0] == "mask" else ""
        raise InvalidRequest(
            f"{where}: loss {loss!r} has no input {unknown[0][:60]!r}; it takes: {known}.{hint}"
        )
    for name, values in datum.loss_inputs.items():
        if values.shape != targets.shape:
            raise InvalidRequest(
                f"{where}: {name!r} has shape {values.shape}, target_tokens {targets.shape}; "
                "they must agree."
            )
    _finite(datum, where)
    if SEQUENCE_RATIO_MASK in terms.required and not datum.loss_inputs[SEQUENCE_RATIO_MASK].any():
        raise InvalidRequest(
            f"{where}: {SEQUENCE_RATIO_MASK!r} is 0 everywhere, so there is no ratio; it must be "
            "nonzero where the sequence was sampled."
        )
    if CLIP_HIGH in terms.optional:
        _thresholds(datum, spec, where)


def _finite(datum: Datum, where: str) -> None:
    """Numbers wherever they are used: a token of weight 0 may have anything in its other inputs."""
    inputs = datum.loss_inputs
    used: np.ndarray | bool = True
    if "weights" in inputs:
        used = inputs["weights"] != 0
        if SEQUENCE_RATIO_MASK in inputs:
            used |= inputs[SEQUENCE_RATIO_MASK] != 0
    for name, values in inputs.items():
        needed = True if name in {"weights", SEQUENCE_RATIO_MASK} else used
        if not np.isfinite(values).all(where=needed):
            raise InvalidRequest(
                f"{where}: {name!r} has values that are NaN or infinite; only a token whose "
                "'weights' is 0 may have them, in its other inputs."
            )


def _thresholds(datum: Datum, loss: LossSpec, where: str) -> None:
    """Bounds of each token's ratio, from the datum or else from the settings."""
    inputs = datum.loss_inputs
    if not {CLIP_LOW, CLIP_HIGH} & inputs.keys():
        return
    low = inputs.get(CLIP_LOW, np.float32(loss.config.get(CLIP_LOW, 0.0)))
    high = inputs.get(CLIP_HIGH, np.float32(loss.config[CLIP_HIGH]))
    # NaN at a token of weight 0 is nobody's concern.
    if ((low < 0) | (high <= 0) | (low > high)).any():
        raise InvalidRequest(
            f"{where}: the thresholds are bounds of the ratio itself (around 1). Everywhere "
            f"{CLIP_LOW!r} must be at least 0, {CLIP_HIGH!r} above 0 and not below it; what a "
            "datum leaves out is as in the loss's settings."
        )


def _tokens(tokens: Int32Array, model: ServedModel, where: str) -> None:
    if tokens.ndim != 1 or len(tokens) == 0:
        raise InvalidRequest(f"{where} has no tokens.")
    if len(tokens) > model.facts.context_length:
        raise InvalidRequest(
            f"{where} has {len(tokens)} tokens, but the context of {model.name!r} holds "
            f"{model.facts.context_length}."
        )
    _in_vocabulary(tokens, model, where)


def _in_vocabulary(tokens: np.ndarray, model: ServedModel, where: str) -> None:
    low, high = int(tokens.min()), int(tokens.max())
    if low < 0 or high >= model.facts.vocab_size:
        bad = low if low < 0 else high
        raise InvalidRequest(
            f"{where} has token {bad}, but the vocabulary of {model.name!r} runs from 0 to "
            f"{model.facts.vocab_size - 1}."
        )


def adam(params: AdamParams) -> AdamParams:
    """Settings of a step that AdamW is defined for."""
    values = {
        "learning_rate": (params.learning_rate, 0.0, math.inf),
        "beta1": (params.beta1, 0.0, 1.0),
        "beta2": (params.beta2, 0.0, 1.0),
        "eps": (params.eps, 0.0, math.inf),
        "weight_decay": (params.weight_decay, 0.0, math.inf),
    }
    for name, (value, low, high) in values.items():
        if not low <= value < high:
            raise InvalidRequest(f"{name} must be at least {low} and below {high}, not {value}.")
    if math.isnan(params.grad_clip_norm) or math.isinf(params.grad_clip_norm):
        raise InvalidRequest("grad_clip_norm must be finite; 0 means no clipping.")
    return params


def sample(request: SampleRequest, model: ServedModel, limits: LimitConfig) -> SampleRequest:
    """Prompt and drawing parameters; the prompt with room for images."""
    request = images.placed_in_prompt(request, model, limits)
    _tokens(request.prompt, model, "The prompt")
    if not 1 <= request.num_samples <= limits.max_samples:
        raise InvalidRequest(
            f"num_samples must be from 1 to {limits.max_samples}, not {request.num_samples}."
        )
    params = request.params
    room = model.facts.context_length - len(request.prompt)
    if room < (0 if request.score_only else 1):
        raise InvalidRequest(
            f"The prompt of {len(request.prompt)} tokens fills the context of {model.name!r} "
            f"({model.facts.context_length}); leave room for at least one more token."
        )
    if params.max_tokens is not None and params.max_tokens < 1:
        raise InvalidRequest(f"max_tokens must be at least 1, not {params.max_tokens}.")
    if not 0 <= params.temperature < math.inf:
        raise InvalidRequest(f"temperature must be at least 0, not {params.temperature}.")
    if params.top_k != -1 and params.top_k < 1:
        raise InvalidRequest(f"top_k must be -1 (all) or at least 1, not {params.top_k}.")
    if not 0 < params.top_p <= 1:
        raise InvalidRequest(f"top_p must be above 0 and at most 1, not {params.top_p}.")
    if not 0 < params.repetition_penalty < math.inf:
        raise InvalidRequest(
            f"repetition_penalty must be above 0 (1 is none), not {params.repetition_penalty}."
        )
    if max(len(params.stop.strings), len(params.stop.tokens)) > MAX_STOPS:
        raise InvalidRequest(f"A request may have {MAX_STOPS} stop strings or tokens.")
    if any(not string for string in params.stop.strings):
        raise InvalidRequest("A stop string must not be empty.")
    if any(len(string) > MAX_STOP_LENGTH for string in params.stop.strings):
        raise InvalidRequest(f"A stop string may have {MAX_STOP_LENGTH} characters.")
    if params.stop.strings and not model.facts.has_tokenizer:
        raise InvalidRequest(f"{model.name!r} has no tokenizer here; give stop token ids instead.")
    if params.stop.tokens:
        _in_vocabulary(np.asarray(params.stop.tokens), model, "stop")
    questions.check(request, model, limits)
    return request


def session(
    *,
    tags: tuple[str, ...],
    user_metadata: Mapping[str, object],
    labels: Mapping[str, str | None],
) -> None:
    """What a client says about itself: few tags, small metadata, short ``labels`` by name."""
    if len(tags) > MAX_TAGS:
        raise InvalidRequest(f"A session may have {MAX_TAGS} tags, not {len(tags)}.")
    for tag in tags:
        text(tag, "A tag", MAX_LABEL_LENGTH)
    for name, value in labels.items():
        text(value, name, MAX_LABEL_LENGTH)
    metadata(user_metadata, "A session's")


def text(value: str | None, what: str, max_length: int) -> None:
    """A text that every database can store in a column, if there is one."""
    if value is None:
        return
    if len(value) > max_length:
        raise InvalidRequest(f"{what} may have {max_length} characters, not {len(value)}.")
    if "\0" in value:
        raise InvalidRequest(f"{what} must not contain the character 0.")


def metadata(values: Mapping[str, object], what: str) -> None:
    """User metadata small enough to list, and not nested too deeply to write down again."""
    try:
        size = len(orjson.dumps(values))
    except orjson.JSONEncodeError:
        raise InvalidRequest(f"{what} metadata is nested too deeply.") from None
    if size > MAX_METADATA_BYTES:
        raise InvalidRequest(
            f"{what} metadata may have {MAX_METADATA_BYTES // 1024} KiB as JSON, not {size} bytes."
        )
