"""Bring a database to the newest schema. Runs inside the server; nobody needs an alembic.ini."""

from alembic import command
from alembic.config import Config
from alembic.util import CommandError
from sqlalchemy import Connection

from twinkle_dask.errors import StartupError

_SCRIPTS = "twinkle_dask.store:migrations"


def migrate(connection: Connection) -> None:
    """Apply the missing revisions on an open transaction; nothing to do is cheap.

    Raises:
        StartupError: The database was made by a newer version of this service.
    """
    config = Config()
    config.set_main_option("script_location", _SCRIPTS)
    config.attributes["connection"] = connection
    try:
        command.upgrade(config, "head")
    except CommandError as error:
        raise StartupError(
            f"The database has a schema this version does not know (a newer one made it): {error}"
        ) from error
