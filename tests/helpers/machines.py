"""Runs hypothesis's state machines, each against plain lists of tokens."""

import hypothesis
from hypothesis.stateful import run_state_machine_as_test


def run(machine, examples: int, steps: int) -> None:
    """Runs a state machine for so many examples of so many steps."""
    settings = hypothesis.settings(
        max_examples=examples,
        stateful_step_count=steps,
        deadline=None,
        suppress_health_check=list(hypothesis.HealthCheck),
    )
    run_state_machine_as_test(machine, settings=settings)
