"""The only room that imports Dask: hosts (actors), their placement and supervision.

* ``commands``: what a host can be told, and what it answers.
* ``host``: the actor, on the worker's side; ``engine_thread`` computes for it.
* ``link``: one host as the gateway sees it.
* ``placement``: which worker carries what; pure.
* ``processing``: tasks on CPU workers; ``turns`` says whose is next.
* ``supervisor``: starts or joins a cluster, places hosts, notices losses and replaces them.
"""
