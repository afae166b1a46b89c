"""Many runs trained over one frozen base model; knows neither Dask nor HTTP.

``engine.Trainer`` is the whole of it from outside: ``submit`` work, ``step``, take completions.

To add a loss: see ``twinkle_dask.losses``; its formula belongs in ``losses`` here.
"""
