"""Prompts; runs on the host."""

from typing import Any

from krl import _moved
from krl.base.answers import Answer
from krl.tasks.data import EncodedTasks, TaskSet, encode_tasks, load_tasks, step_task_ids
from krl.tasks.sources import SOURCES, load_named
from krl.tasks.templates import TEMPLATES, find_template

__all__ = [
    "SOURCES",
    "TEMPLATES",
    "Answer",
    "EncodedTasks",
    "TaskSet",
    "encode_tasks",
    "find_template",
    "load_named",
    "load_tasks",
    "step_task_ids",
]


def __getattr__(name: str) -> Any:
    return _moved.attribute(__name__, name)
