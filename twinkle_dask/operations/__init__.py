"""The one core that every protocol calls. ``service.Service`` is its front.

* ``values``: what faces hand in and get back.
* ``validation``: every check of a tenant's values, before anything is stored.
* ``tickets``: results to come, awaitable in this process.
* ``lanes``: one run's order, its host, its recovery; ``requests`` are what a lane may carry.
* ``sessions``, ``runs``, ``training``, ``sampling``, ``checkpoints``: the operations by subject.
* ``upkeep``: what happens by itself: expiry, pruning.
"""
