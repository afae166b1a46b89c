"""What each layer of a model may attend to while rows of different lengths decode together.

During prefill all rows of a pass stand at the same position and Transformers makes the masks.
During decoding they do not, which it has no mask for, so they are made here: of all earlier
positions, or of a sliding window of them (Mistral, Gemma 3).

Shapes: B rows, K positions that attention sees.
"""

from typing import Any

import torch
from torch import Tensor

from twinkle_dask.errors import CannotSample

_FULL = "full_attention"
_SLIDING = "sliding_attention"


class DecodeMasks:
    """Makes the masks of one model."""

    def __init__(self, text_config: Any) -> None:
        """Read from a Transformers text configuration how the layers attend.

        Raises:
            CannotSample: Some layer attends in a way that this sampler does not know.
        """
        layer_types: set[str] | None = None
        if (named := getattr(text_config, "layer_types", None)) is not None:
            layer_types = set(named)
        window: int | None = getattr(text_config, "sliding_window", None)
        if layer_types is None:
            unknown = {"chunked attention"} if _chunked(text_config) else set[str]()
            layer_types = {_FULL} if window is None else {_SLIDING}
        else:
            unknown = layer_types - {_FULL, _SLIDING}
        if unknown or (_SLIDING in layer_types and window is None):
            raise CannotSample(
                "This model cannot be sampled with the torch engine: it has layers of "
                f"{', '.join(sorted(unknown)) or 'sliding_attention without a window'}; known are "
                f"{_FULL} and {_SLIDING}."
            )
        self._layer_types = layer_types
        self._window = window

    def of(self, positions_B: Tensor, num_keys: int) -> Tensor | dict[str, Tensor]:
        """Boolean masks (B, 1, 1, K), True where the token at its row's position attends to.

        One mask where all layers are alike, which every model takes; else one for each type of
        layer, as models with several types do.
        """
        keys_K = torch.arange(num_keys, device=positions_B.device)
        positions_B1 = positions_B.unsqueeze(1)
        full_BK = keys_K <= positions_B1
        masks: dict[str, Tensor] = {_FULL: full_BK[:, None, None]}
        if _SLIDING in self._layer_types and self._window is not None:
            near_BK = full_BK & (keys_K > positions_B1 - self._window)
            masks[_SLIDING] = near_BK[:, None, None]
        if len(self._layer_types) == 1:
            return masks[next(iter(self._layer_types))]
        return masks


def _chunked(text_config: Any) -> bool:
    return getattr(text_config, "attention_chunk_size", None) is not None
