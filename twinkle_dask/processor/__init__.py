"""What CPU workers do for tenants beside the engines; no torch is loaded for it.

* ``commands``: the closed table of functions, and how Dask calls them.
* ``tokenizers``: of the served models, each loaded once in a process.
* ``templates``: messages to tokens and labels; ``labelling``, ``truncation``, ``tool_calls`` help.
* ``template_calls``: these as functions of the table.
"""
