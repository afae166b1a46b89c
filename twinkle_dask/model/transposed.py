"""GPT-2's ``Conv1D``, a linear that keeps its weight the other way round, made an ``nn.Linear``."""

from collections.abc import Iterable
from typing import Any, cast

from torch import nn
from transformers.pytorch_utils import Conv1D


def replace_conv1d(model: nn.Module) -> None:
    """Put an ``nn.Linear`` with the same numbers in the place of every ``Conv1D``.

    Paths stay; each weight is copied once, since what is multiplied by it wants it in this order.
    """
    modules = cast("Iterable[tuple[str, nn.Module]]", model.named_modules())
    for path, module in list(modules):
        if type(module) is not Conv1D:
            continue
        weight_DE = module.weight
        in_features, out_features = weight_DE.shape
        linear = nn.Linear(in_features, out_features, device="meta")
        linear.weight = nn.Parameter(weight_DE.detach().T.contiguous(), requires_grad=False)
        linear.bias = module.bias
        parent, _, name = path.rpartition(".")
        setattr(cast("Any", model.get_submodule(parent)), name, linear)
