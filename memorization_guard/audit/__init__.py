"""Auditing a model with whole prompt lists: which of them does it answer with a training image?

``dataset`` is the folder of results, ``prompts`` reads the lists, ``worker`` samples, ``run`` brings them together on one
machine and ``cluster`` on many, ``report`` and ``compare`` show what came out. Needs the extra ``audit``.
"""
