"""A real language model that speaks through `jattn`: `python -m examples.chat`.

`README.md` in this folder says in which order to read.
"""
