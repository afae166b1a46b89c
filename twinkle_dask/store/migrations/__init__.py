"""Alembic's revisions, applied by ``twinkle_dask.store.migrate`` whenever the store opens.

To change the schema: change ``tables.py``, add ``versions/000N_<what>.py`` by hand with the last
revision as its ``down_revision``; the test of the schema says what is still missing. Revisions go
forward only: the way back is a copy of the database.
"""
