"""The faces: HTTP protocols over ``twinkle_dask.operations``. One folder per protocol.

A face is wire models, a codec to the core's values, routes, and one table from error class to
status. Faces never import each other, and nothing below imports a face.
"""
