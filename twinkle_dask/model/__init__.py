"""The frozen base model and what is added to it: loading, wrapped linears, adapters' first weights.

``source`` and the gateway stay free of torch; import the other modules by name.
"""
