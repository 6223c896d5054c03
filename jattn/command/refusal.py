"""What the commands say when they cannot do what was asked."""


class Refusal(Exception):
    """What the user gave cannot be done, in one sentence; nothing was written."""
