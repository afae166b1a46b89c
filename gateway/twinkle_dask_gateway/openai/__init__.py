"""Chat completions as clients of OpenAI's API know them, over samplers."""

from twinkle_dask_gateway.openai.face import add_routes

__all__ = ["add_routes"]
