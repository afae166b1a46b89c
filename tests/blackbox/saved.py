"""What the service wrote to its data folder, read without its own code."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import safetensors.numpy
import tinker
from numpy.typing import NDArray
from tinker.types import ParsedCheckpointTinkerPath

from twinkle_dask import LocalService

Weights = Mapping[str, NDArray[np.float32]]

# Its functions are typed with bare arrays.
_safetensors: Any = safetensors.numpy


def folder_of(service: LocalService, path: str) -> Path:
    """The newest folder of a run's checkpoints of this kind; call it right after the save."""
    address = ParsedCheckpointTinkerPath.from_tinker_path(path)
    kind = {"training": "weights", "sampler": "sampler"}[address.checkpoint_type]
    folders = (service.data_dir / "blobs" / "checkpoints" / address.training_run_id).glob(
        f"{kind}-*"
    )
    return max(folders, key=lambda folder: folder.stat().st_mtime_ns)


def arrays(file: Path) -> Weights:
    return _safetensors.load_file(file)


def weights_of(service: LocalService, run: tinker.TrainingClient, name: str) -> Weights:
    """A run's adapter as it is now, by PEFT's names; saved under ``name`` for that."""
    path = run.save_state(name).result().path
    return arrays(folder_of(service, path) / "adapter_model.safetensors")


def distance(actual: Weights, expected: Weights) -> float:
    """Relative distance in the 2-norm over all arrays together."""
    assert actual.keys() == expected.keys()
    gaps = [actual[name].astype(np.float64) - expected[name] for name in expected]
    size = sum(np.sum(np.square(array, dtype=np.float64)) for array in expected.values())
    return float(np.sqrt(sum(np.sum(gap**2) for gap in gaps) / size))


def moved(after: Weights, before: Weights) -> Weights:
    """How far every weight went."""
    return {name: after[name] - before[name] for name in before}


def identical(actual: Weights, expected: Weights) -> bool:
    """Bit for bit."""
    return actual.keys() == expected.keys() and all(
        np.array_equal(actual[name], expected[name]) for name in expected
    )
