"""Data sets that the service reads, maps and encodes, and batches of them."""

from collections.abc import AsyncGenerator, Generator, Mapping
from typing import Any

from twinkle_dask_client.calls import datasets as calls
from twinkle_dask_client.door import AsyncDoor, Door
from twinkle_dask_client.errors import Gone
from twinkle_dask_client.inputs import Source

Row = dict[str, Any]


def _named(preprocessor: str, arguments: Mapping[str, Any]) -> dict[str, Any]:
    return {"preprocess_func": preprocessor, "init_args": dict(arguments)}


class Dataset:
    """Rows on the service, made by ``Service.dataset``; they live as long as the session."""

    def __init__(self, door: Door, source: Source) -> None:
        self._door = door
        made = door.ask_in_session(
            calls.create("dataset", "Dataset", {"dataset_meta": source.meta()})
        )
        self.id = made.processor_id

    def set_template(self, model_id: str, name: str = "Template", **settings: Any) -> None:
        """How ``encode`` makes tokens: the served model whose tokenizer and chat template it is."""
        body = {"template_func": name, "model_id": model_id, **settings}
        self._call("set_template", body, repeatable=True)

    def map(self, preprocessor: str, **arguments: Any) -> None:
        """Let a preprocessor of the service, by its name, change every row."""
        self._call("map", _named(preprocessor, arguments), doing="mapping")

    def encode(self, *, add_generation_prompt: bool = False) -> None:
        """Turn conversations into tokens and labels."""
        self._call("encode", {"add_generation_prompt": add_generation_prompt}, doing="encoding")

    def save_as(self, path: str, file_format: str | None = None) -> None:
        """Write a file into this tenant's own area of the service."""
        self._call("save_as", {"output_path": path, "format": file_format}, doing="writing")

    def batches(self, batch_size: int, *, skip: int = 0) -> Generator[list[Row]]:
        """The rows in order, ``batch_size`` at a time, the first ``skip`` left out."""
        ask = self._door.ask_in_session
        settings = {"dataset": self.id, "batch_size": batch_size}
        loader = ask(calls.create("dataloader", "DataLoader", settings)).processor_id
        if skip:
            ask(calls.call(loader, "skip_consumed_samples", {"consumed_train_samples": skip}))
        total: int = ask(calls.call(loader, "__len__", repeatable=True)).result
        ask(calls.call(loader, "__iter__"))

        def rows() -> Generator[list[Row]]:
            while True:
                try:
                    yield ask(calls.call(loader, "__next__")).result
                except Gone:
                    return

        yield from self._door.display.counted(rows(), "batches", total)

    def __len__(self) -> int:
        return int(self._call("__len__", repeatable=True))

    def __getitem__(self, index: int) -> Row:
        try:
            return self._call("__getitem__", {"idx": index}, repeatable=True)
        except Gone as error:
            raise IndexError(index) from error

    def _call(
        self,
        function: str,
        settings: Mapping[str, Any] | None = None,
        *,
        repeatable: bool = False,
        doing: str = "",
    ) -> Any:
        call = calls.call(self.id, function, settings, repeatable=repeatable, doing=doing)
        return self._door.ask_in_session(call).result


class AsyncDataset:
    """``Dataset`` with ``await``; ``AsyncService.dataset`` makes one."""

    def __init__(self, door: AsyncDoor, processor_id: str) -> None:
        self._door = door
        self.id = processor_id

    async def set_template(self, model_id: str, name: str = "Template", **settings: Any) -> None:
        """See ``Dataset.set_template``."""
        body = {"template_func": name, "model_id": model_id, **settings}
        await self._call("set_template", body, repeatable=True)

    async def map(self, preprocessor: str, **arguments: Any) -> None:
        """See ``Dataset.map``."""
        await self._call("map", _named(preprocessor, arguments), doing="mapping")

    async def encode(self, *, add_generation_prompt: bool = False) -> None:
        """See ``Dataset.encode``."""
        body = {"add_generation_prompt": add_generation_prompt}
        await self._call("encode", body, doing="encoding")

    async def save_as(self, path: str, file_format: str | None = None) -> None:
        """See ``Dataset.save_as``."""
        await self._call("save_as", {"output_path": path, "format": file_format}, doing="writing")

    async def batches(self, batch_size: int, *, skip: int = 0) -> AsyncGenerator[list[Row]]:
        """See ``Dataset.batches``."""
        ask = self._door.ask_in_session
        settings = {"dataset": self.id, "batch_size": batch_size}
        loader = (await ask(calls.create("dataloader", "DataLoader", settings))).processor_id
        if skip:
            await ask(calls.call(loader, "skip_consumed_samples", {"consumed_train_samples": skip}))
        await ask(calls.call(loader, "__iter__"))
        while True:
            try:
                yield (await ask(calls.call(loader, "__next__"))).result
            except Gone:
                return

    async def count(self) -> int:
        """Rows in all; ``len`` cannot await."""
        return int(await self._call("__len__", repeatable=True))

    async def row(self, index: int) -> Row:
        """One row.

        Raises:
            IndexError: There is none.
        """
        try:
            return await self._call("__getitem__", {"idx": index}, repeatable=True)
        except Gone as error:
            raise IndexError(index) from error

    async def _call(
        self,
        function: str,
        settings: Mapping[str, Any] | None = None,
        *,
        repeatable: bool = False,
        doing: str = "",
    ) -> Any:
        call = calls.call(self.id, function, settings, repeatable=repeatable, doing=doing)
        return (await self._door.ask_in_session(call)).result
