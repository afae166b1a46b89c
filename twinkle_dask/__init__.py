"""Train and sample LoRA adapters of one shared base model over HTTP, on a Dask cluster.

This package is the core: values, scheduling, operations, engines and hosts. It knows no HTTP.
``local_service`` starts a whole service for a script, a notebook or a test.
"""

from twinkle_dask.local import LocalService, local_service

__all__ = ["LocalService", "__version__", "local_service"]

__version__ = "0.1.0"
