"""Whole programs with `jattn` inside; `python -m examples.language_model` is the first."""
