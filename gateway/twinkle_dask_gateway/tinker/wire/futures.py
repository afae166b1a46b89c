"""Bodies that ask for results."""

from twinkle_dask_gateway.tinker.wire.base import Id, Told


class TicketQuery(Told):
    """``retrieve_future`` and ``cancel_future``."""

    request_id: Id
