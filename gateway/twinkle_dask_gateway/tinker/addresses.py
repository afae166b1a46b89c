"""How Tinker writes the address of a checkpoint; ``twinkle://`` is read as well."""

from twinkle_dask.operations.values import CheckpointAddress
from twinkle_dask_gateway import addresses
from twinkle_dask_gateway.addresses import address_of

__all__ = ["address_of", "format_address", "parse_address"]


def parse_address(path: str) -> CheckpointAddress:
    """Read an address.

    Raises:
        InvalidRequest: It is none.
    """
    return addresses.parse_address(path, "tinker")


def format_address(address: CheckpointAddress) -> str:
    """Write an address as clients read it."""
    return addresses.format_address(address, "tinker")
