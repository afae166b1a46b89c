"""The Twinkle protocol, as ``twinkle_client`` of twinkle-kit 0.5.1 speaks it."""

from twinkle_dask_gateway.twinkle.face import add_routes

__all__ = ["add_routes"]
