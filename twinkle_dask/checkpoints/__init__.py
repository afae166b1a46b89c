"""A run's state as files: a PEFT adapter folder plus what makes training go on. No torch.

``folders`` writes and reads them; ``peft_config``, ``state_file`` and ``tensors`` hold one file
format each.
"""
