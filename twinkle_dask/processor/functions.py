"""What processors can be made and what each can be asked: closed tables, and typed arguments.

Read by the gateway to refuse unknown names and by workers to read arguments; it imports nothing
that is slow to load.
"""

from collections.abc import Mapping
from typing import Annotated, Any, Final, Literal, TypeAlias, cast

import orjson
from pydantic import AliasChoices, BaseModel, BeforeValidator, ConfigDict, Field

from twinkle_dask.errors import InvalidRequest, NotSupported
from twinkle_dask.processor.naming import looked_up
from twinkle_dask.processor.preprocessors import PREPROCESSORS
from twinkle_dask.processor.rewards import REWARDS
from twinkle_dask.processor.templates import CLASSES
from twinkle_dask.types import Json

TAG: Final = "_TWINKLE_TYPE_"

#: Placed by the client for parts of Twinkle's own server; they mean nothing here.
DROPPED: Final = frozenset({"remote_group", "device_mesh"})


def tagged(value: object) -> object:
    """A tagged JSON string as what it says; every other string is a string."""
    if not isinstance(value, str) or TAG not in value:
        return value
    try:
        made = orjson.loads(value)
    except orjson.JSONDecodeError:
        return value
    return cast(object, made) if isinstance(made, dict) and TAG in made else value


class _Arguments(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True, populate_by_name=True)


def _meta_fields(value: object) -> object:
    value = tagged(value)
    if not isinstance(value, dict):
        return value
    fields = dict(cast(Json, value))
    tag = fields.pop(TAG, "DatasetMeta")
    if tag != "DatasetMeta":
        raise ValueError(f"it is a {tag}, not a DatasetMeta")
    known = {name: one for name, one in fields.items() if name in Meta.model_fields}
    part = known.get("data_slice")
    if isinstance(part, list):
        known["data_slice"] = {"kind": "list", "values": cast(object, part)}
    elif isinstance(part, dict):
        bounds = dict(cast(Json, part))
        if "_slice_type_" in bounds:
            known["data_slice"] = {"kind": bounds.pop("_slice_type_"), **bounds}
    return known


class Meta(_Arguments):
    """A ``DatasetMeta`` as the client writes it; fields of newer clients are passed over."""

    dataset_id: str = ""
    subset_name: str = "default"
    split: str = "train"
    data_slice: Any = None
    data: Any = None


MetaValue: TypeAlias = Annotated[Meta, BeforeValidator(_meta_fields)]


class Hints(_Arguments):
    """How the ``datasets`` library would go about it; none of it changes what comes out.

    How many processes work and what is kept in memory is the server's affair, so these are
    checked and have no effect.
    """

    batched: bool | None = None
    batch_size: int | None = Field(default=None, ge=1)
    num_proc: int | None = Field(default=None, ge=1)
    load_from_cache_file: bool | None = None
    keep_in_memory: bool | None = None
    writer_batch_size: int | None = Field(default=None, ge=1)
    desc: str | None = None


def _names(value: object) -> object:
    return [value] if isinstance(value, str) else value


Names: TypeAlias = Annotated[tuple[str, ...], BeforeValidator(_names)]


class Loading(_Arguments):
    """What every data set is made with, and ``add_dataset``."""

    dataset_meta: MetaValue | None = None
    num_proc: int | None = Field(default=None, ge=1)
    revision: str | None = None
    streaming: bool | None = None


class PackingLoading(Loading):
    """``PackingDataset``; one process packs, whatever the number."""

    packing_num_proc: int = Field(default=1, ge=1)


class IterablePackingLoading(PackingLoading):
    """``IterablePackingDataset``."""

    packing_interval: int = Field(default=128, ge=1, le=65536)
    cyclic: bool = False


class AddDataset(Loading):
    """``add_dataset``."""

    dataset_meta: MetaValue  # pyright: ignore[reportIncompatibleVariableOverride, reportGeneralTypeIssues]


class SetTemplate(_Arguments):
    """``set_template``: a template's name, and what it is made with beside it."""

    model_config = ConfigDict(extra="allow", frozen=True, populate_by_name=True)
    name: str = Field(validation_alias=AliasChoices("template_func", "template_cls"))


class Encode(Hints):
    """``encode``."""

    add_generation_prompt: bool = False
    remove_columns: Names = ()


class CastColumn(_Arguments):
    """``cast_column``."""

    column: str
    decode: bool = True


class Map(Hints):
    """``map``."""

    preprocess_func: str
    dataset_meta: MetaValue | None = None
    init_args: dict[str, Any] | None = None
    remove_columns: Names | None = None


class Filter(Hints):
    """``filter``."""

    filter_func: str
    dataset_meta: MetaValue | None = None
    init_args: dict[str, Any] | None = None


class Mix(_Arguments):
    """``mix_dataset``."""

    interleave: bool = True


class SaveAs(_Arguments):
    """``save_as``. Rows are written in batches of our own size, so ``batch_size`` is a hint."""

    output_path: str
    format: Literal["jsonl", "json", "csv", "parquet"] | None = None
    batch_size: int = Field(default=1000, ge=1)
    mode: Literal["immediate", "training"] = "immediate"


class GetItem(_Arguments):
    """``__getitem__``; packing data sets call it ``index``."""

    index: int = Field(validation_alias=AliasChoices("idx", "index"), strict=True)


class Nothing(_Arguments):
    """A function without arguments."""


class CreateLoader(_Arguments):
    """``DataLoader``. What concerns worker processes and pinned memory has no effect here."""

    dataset: str
    batch_size: int = Field(ge=1, le=1_000_000)
    min_batch_size: int | None = Field(default=None, ge=0)
    shuffle: bool = False
    seed: int = Field(default=42, ge=0, lt=2**63)
    drop_last: bool = False
    max_retries: int = Field(default=20, ge=1, le=1000)
    num_workers: int = Field(default=0, ge=0)
    prefetch_factor: int | None = None
    persistent_workers: bool = False
    pin_memory: bool = False


class InputProcessorArguments(_Arguments):
    """``InputProcessor``."""

    padding_free: bool = False
    framework: Literal["transformers"] = "transformers"
    padding_side: Literal["left", "right"] = "right"


class SetProcessor(InputProcessorArguments):
    """``set_processor``."""

    processor_cls: str


class Skip(_Arguments):
    """``skip_consumed_samples``."""

    consumed_train_samples: int | None = Field(ge=0)


class Resume(Skip):
    """``resume_from_checkpoint``: all counters of a checkpoint may be given, one is used."""

    model_config = ConfigDict(extra="ignore", frozen=True)


class Inputs(_Arguments):
    """``InputProcessor.__call__``."""

    inputs: list[dict[str, Any]] | dict[str, Any]


class PreprocessRows(_Arguments):
    """``Preprocessor.__call__``: rows, or columns."""

    rows: list[dict[str, Any]] | dict[str, list[Any]]


class PreprocessRow(_Arguments):
    """``Preprocessor.preprocess``."""

    row: dict[str, Any]


class Score(_Arguments):
    """``Reward.__call__``."""

    trajectories: list[dict[str, Any]]
    ground_truths: list[dict[str, Any]] | None = None


class EncodeTrajectory(_Arguments):
    """``Template.encode`` and ``check``."""

    trajectory: dict[str, Any]
    add_generation_prompt: bool = False


class EncodeTrajectories(_Arguments):
    """``Template.batch_encode``."""

    trajectories: list[dict[str, Any]]
    add_generation_prompt: bool = False


class DecodeTokens(_Arguments):
    """``Template.decode``."""

    token_ids: list[int]


Functions: TypeAlias = Mapping[str, type[BaseModel]]

_DATASET: Final[Functions] = {
    "set_template": SetTemplate,
    "encode": Encode,
    "check": Hints,
    "cast_column": CastColumn,
    "map": Map,
    "filter": Filter,
    "add_dataset": AddDataset,
    "mix_dataset": Mix,
    "save_as": SaveAs,
    "flush_save": Nothing,
    "__getitem__": GetItem,
    "__len__": Nothing,
}
_STREAM: Final[Functions] = {
    "add_dataset": AddDataset,
    "map": Map,
    "set_template": SetTemplate,
    "__len__": Nothing,
    "__getitem__": GetItem,
    "__iter__": Nothing,
    "__next__": Nothing,
}
_LOADER: Final[Functions] = {
    "__len__": Nothing,
    "set_processor": SetProcessor,
    "__iter__": Nothing,
    "__next__": Nothing,
    "skip_consumed_samples": Skip,
    "resume_from_checkpoint": Resume,
    "get_state": Nothing,
}
_PREPROCESSOR: Final[Functions] = {"__call__": PreprocessRows, "preprocess": PreprocessRow}
_REWARD: Final[Functions] = {"__call__": Score}
_TEMPLATE: Final[Functions] = {
    "encode": EncodeTrajectory,
    "batch_encode": EncodeTrajectories,
    "check": EncodeTrajectory,
    "decode": DecodeTokens,
}

#: Type, then class: what can be called.
CALLS: Final[Mapping[str, Mapping[str, Functions]]] = {
    "dataset": {
        "Dataset": _DATASET,
        "LazyDataset": _DATASET,
        "PackingDataset": {**_DATASET, "pack_dataset": Nothing},
        "IterableDataset": _STREAM,
        "IterablePackingDataset": {**_STREAM, "pack_dataset": Nothing},
    },
    "dataloader": {"DataLoader": _LOADER},
    "preprocessor": dict.fromkeys(PREPROCESSORS, _PREPROCESSOR),
    "processor": {"InputProcessor": {"__call__": Inputs}},
    "reward": dict.fromkeys(REWARDS, _REWARD),
    "template": dict.fromkeys(CLASSES, _TEMPLATE),
}
#: Functions that write files.
WRITES: Final = frozenset(
    {
        "add_dataset",
        "map",
        "filter",
        "mix_dataset",
        "encode",
        "check",
        "cast_column",
        "pack_dataset",
        "save_as",
        "flush_save",
    }
)
#: Arguments that may name another processor, as ``pid:`` and its id.
REFERENCES: Final = frozenset(
    {"dataset", "preprocess_func", "template_func", "template_cls", "processor_cls"}
)
_LOADING: Final[Mapping[str, type[Loading]]] = {
    "PackingDataset": PackingLoading,
    "IterablePackingDataset": IterablePackingLoading,
}


def check_class(processor_type: str, class_type: str) -> Functions:
    """What a class can be asked.

    Raises:
        InvalidRequest: There is no such type or class; the message lists those there are.
        NotSupported: It exists in Twinkle, or is code on a hub.
    """
    if processor_type == "weight_loader":
        raise NotSupported(
            "Weights are not loaded by processors here: save a run's weights and sample with "
            "their twinkle:// address."
        )
    return looked_up(looked_up(CALLS, "processor type", processor_type), processor_type, class_type)


def check_function(processor_type: str, class_type: str, function: str) -> type[BaseModel]:
    """The arguments of a function.

    Raises:
        InvalidRequest: There is no such function.
    """
    functions = check_class(processor_type, class_type)
    found = functions.get(function)
    if found is None:
        raise InvalidRequest(
            f"A {class_type} has no function {function[:60]!r} to call; it has "
            f"{', '.join(functions)}."
        )
    return found


def loading_arguments(class_type: str) -> type[Loading]:
    """What a data set of a class is made with."""
    return _LOADING.get(class_type, Loading)
