"""The one core that every protocol calls. ``service.Service`` is its front.

* ``values``: what faces hand in and get back; ``validation``: every check of a tenant's values.
* ``tenants``, ``catalogue``, ``quotas``: who asks, what is served, how much one may hold.
* ``sessions``, ``runs``, ``training``, ``sampling``, ``checkpoints``: the operations by subject.
* ``lanes``: one run's order, its host, its recovery; ``requests`` are what a lane may carry, and
  ``finishing`` is what their outcomes mean for the records.
* ``tickets``: results to come, awaitable in this process; ``describing``: runs as owners see them.
* ``upkeep``, ``closing``, ``sweeping``: what happens by itself.
"""
