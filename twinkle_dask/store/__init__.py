"""Durable things: blobs (files in a folder or an object store) and records (SQL)."""
