"""The parts of `python -m jattn`: each prints to stdout and returns an exit code."""
