"""Structured logs on standard error: one JSON object a line, in every process of the service.

Whoever handles a request binds ``request_id``, ``run`` and so on with
``structlog.contextvars.bind_contextvars``; every line written below then carries them.
"""

import logging
import sys

import structlog


def configure(level: str) -> None:
    """Send structlog and standard logging to standard error as JSON.

    Args:
        level: Least severe level that is written: debug, info, warning or error.
    """
    shared: list[structlog.typing.Processor] = [
        structlog.contextvars.merge_contextvars,
        structlog.stdlib.add_log_level,
        structlog.stdlib.add_logger_name,
        structlog.processors.TimeStamper(fmt="iso", utc=True),
        structlog.processors.format_exc_info,
    ]
    handler = logging.StreamHandler(sys.stderr)
    handler.setFormatter(
        structlog.stdlib.ProcessorFormatter(
            foreign_pre_chain=shared,
            processors=[
                structlog.stdlib.ProcessorFormatter.remove_processors_meta,
                structlog.processors.JSONRenderer(),
            ],
        )
    )
    root = logging.getLogger()
    root.handlers[:] = [handler]
    root.setLevel(level.upper())
    # Dask, uvicorn and the SQL driver tell at INFO what only their authors want to know.
    for chatty in ("distributed", "uvicorn", "asyncio", "alembic", "httpx", "bokeh"):
        logging.getLogger(chatty).setLevel(max(logging.WARNING, root.level))
        logging.getLogger(chatty).handlers[:] = []
        logging.getLogger(chatty).propagate = True
    structlog.configure(
        processors=[
            structlog.stdlib.filter_by_level,
            *shared,
            structlog.stdlib.ProcessorFormatter.wrap_for_formatter,
        ],
        logger_factory=structlog.stdlib.LoggerFactory(),
        wrapper_class=structlog.stdlib.BoundLogger,
        cache_logger_on_first_use=True,
    )
