"""What a command says when it cannot do what was asked."""


class Refusal(Exception):
    """What was asked cannot be done, in one sentence."""
