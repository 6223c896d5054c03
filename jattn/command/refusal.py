"""The message of a command that cannot do what the user asked."""


class Refusal(Exception):
    """An error that says in one sentence why a command cannot run; it wrote nothing."""
