"""Who reads weights, where that is another account than the one that asks."""

from twinkle_dask.errors import InvalidRequest, NotAuthenticated, TokenRejected
from twinkle_dask.operations.values import Tenant
from twinkle_dask_gateway.tokens import Credentials


async def reader_of(tenant: Tenant, token: str | None, credentials: Credentials) -> Tenant:
    """The account of a ``weights_access_token``; without one, whoever asks.

    Raises:
        InvalidRequest: The token is no key of this service. Not 401, which would make clients look
            for another key of their own.
    """
    if not token:
        return tenant
    try:
        return await credentials.tenant(token)
    except (NotAuthenticated, TokenRejected):
        raise InvalidRequest(
            "The weights_access_token is not valid: it must be an API key, or a token for one, of "
            "the account that may read the weights."
        ) from None
