"""Every question the client can ask, as a value: no I/O here, so all twins share it.

To add a call: a function in the file of its subject, a reply in ``models.py`` or ``results.py``, a
method on each of the twins.
"""
