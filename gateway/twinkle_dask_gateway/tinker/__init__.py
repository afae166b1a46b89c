"""The Tinker protocol, version 0.38 of its SDK and older ones as far as they speak JSON."""

from twinkle_dask_gateway.tinker.face import add_routes

__all__ = ["add_routes"]
