"""The models that are served, by name."""

from collections.abc import Mapping
from pathlib import Path

from twinkle_dask.config import ModelConfig, ServiceConfig
from twinkle_dask.errors import InvalidRequest
from twinkle_dask.operations.values import ServedModel
from twinkle_dask.types import ModelFacts


class Catalogue:
    """Served names and what is known about their base models."""

    def __init__(self, models: Mapping[str, ServedModel]) -> None:
        self._models = dict(models)

    @classmethod
    def of(cls, config: ServiceConfig, facts: Mapping[str, ModelFacts]) -> "Catalogue":
        """The configured names, with the facts of their sources."""
        return cls(
            {
                name: ServedModel(
                    name=name,
                    source=model.source,
                    facts=facts[model.source],
                    tokenizer_id=_tokenizer_id(name, model, config),
                )
                for name, model in config.models.items()
            }
        )

    def all(self) -> tuple[ServedModel, ...]:
        """In the order of the configuration."""
        return tuple(self._models.values())

    def get(self, name: str) -> ServedModel:
        """A served model.

        Raises:
            InvalidRequest: Not served; names those that are.
        """
        model = self._models.get(name)
        if model is None:
            served = ", ".join(sorted(self._models))
            raise InvalidRequest(f"Model {name[:80]!r} is not served here. Served: {served}.")
        return model

    def find(self, name: str) -> ServedModel | None:
        """A model that may have been served when a record was made."""
        return self._models.get(name)

    def same_base(self, one: str, other: str) -> bool:
        """Whether two names mean the same weights."""
        first, second = self._models.get(one), self._models.get(other)
        if first is None or second is None:
            return one == other
        return first.source == second.source


def _tokenizer_id(name: str, model: ModelConfig, config: ServiceConfig) -> str:
    if model.tokenizer is not None:
        return model.tokenizer
    folder = Path(model.source).expanduser()
    if not folder.exists():
        return model.source  # a hub id, which clients can load too
    if config.loopback and (folder / "tokenizer_config.json").is_file():
        # Only clients on this machine can connect, so they can read the folder as well.
        return str(folder.resolve())
    return name
