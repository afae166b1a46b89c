"""Samplers: prompts in, continuations with logprobs out, many adapters over one base model.

``interface`` says what every engine does; ``engine`` is the torch one. Only ``interface`` and
``fairness`` are free of torch.
"""
