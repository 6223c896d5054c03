"""A small language model that attends by `jattn`: `python -m examples.language_model`.

Read `attending` first: it is all that concerns attention. Then `model`.
"""
