"""What stands beside the name of a loss: numbers for our own, an id for a client's."""

from collections.abc import Mapping

from twinkle_dask.errors import InvalidRequest
from twinkle_dask.losses import loss_spec
from twinkle_dask.types import CustomLoss, Loss

CUSTOM = "custom"


def loss_of(name: str, config: Mapping[str, float | str], custom: CustomLoss | None) -> Loss:
    """The loss of a batch.

    Args:
        name: The client's word for it.
        config: Its settings.
        custom: What ``custom_loss_id`` stands for, if that gave one.

    Raises:
        InvalidRequest: Unknown loss or setting.
    """
    if custom is not None:
        return custom
    numbers: dict[str, float] = {}
    for key, value in config.items():
        if isinstance(value, str):
            raise InvalidRequest(f"Setting {key[:60]!r} of the loss must be a number.")
        numbers[key] = value
    return loss_spec(name, numbers)


def custom_loss_id(name: str, config: Mapping[str, float | str]) -> str | None:
    """The id of the custom loss that a batch is under; None if it is one of ours.

    Raises:
        InvalidRequest: It is a custom loss without an id, or with other settings.
    """
    if name != CUSTOM:
        return None
    match dict(config):
        case {"loss_id": str() as loss, **others} if loss and not others:
            return loss
        case _:
            raise InvalidRequest(
                "Loss 'custom' takes the setting 'loss_id' alone, a text: the id that "
                "create_custom_loss gave."
            )
