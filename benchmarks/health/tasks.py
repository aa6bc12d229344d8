"""All sound tasks by their names: to add one, add it to its family."""

import functools

from benchmarks.health import agents, classes, fields, games, pairs, regression, rising
from benchmarks.health.task import Task


@functools.cache
def tasks() -> dict[str, Task]:
    """In the order of the page."""
    families = (regression, classes, fields, pairs, rising, agents, games)
    return {name: task for family in families for name, task in family.tasks().items()}
