"""The ASGI application: every face over one service."""

from fastapi import FastAPI
from fastapi.routing import APIRoute

from twinkle_dask.operations.service import Service
from twinkle_dask_gateway import openai, tinker, twinkle
from twinkle_dask_gateway.access_log import AccessLog
from twinkle_dask_gateway.config import GatewayConfig
from twinkle_dask_gateway.limits import BodyLimit
from twinkle_dask_gateway.polls import Polls
from twinkle_dask_gateway.signing import Signer
from twinkle_dask_gateway.tokens import Credentials


def _name(route: APIRoute) -> str:
    return route.name


def create_app(service: Service, config: GatewayConfig) -> FastAPI:
    """Put the faces over a service. The service's life is the caller's.

    Nothing is compressed on the way out: the Tinker SDK takes a 400 without Content-Length for a
    proxy's glitch and repeats the request for minutes.
    """
    # No documentation pages: they would be open to anyone.
    app = FastAPI(
        title="twinkle_dask",
        docs_url=None,
        redoc_url=None,
        openapi_url=None,
        redirect_slashes=False,
        # Operations are named after their functions, without the path.
        generate_unique_id_function=_name,
    )
    app.state.service = service
    app.state.config = config
    app.state.polls = Polls()
    app.state.credentials = Credentials(
        service.tenants,
        service.token_secret,
        enabled=config.tokens,
        lifetime_s=config.token_lifetime_s,
    )
    app.state.signer = Signer(service.url_secret)
    tinker.add_routes(app, config.url_prefix)
    twinkle.add_routes(app, config.url_prefix)
    openai.add_routes(app, config.url_prefix)
    app.add_middleware(BodyLimit, max_bytes=config.max_body_bytes)
    app.add_middleware(AccessLog)  # added last, so outermost
    return app
