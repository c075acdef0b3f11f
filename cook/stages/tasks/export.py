"""The compact model of a finished stage."""
from cook.config.tasks import TaskConfig


def run_export(config: TaskConfig) -> None:
    raise NotImplementedError
