"""Prompts and verifiable rewards; runs on the host."""

from krl.tasks.data import EncodedTasks, TaskSet, encode_tasks, load_tasks, step_task_ids

__all__ = ["EncodedTasks", "TaskSet", "encode_tasks", "load_tasks", "step_task_ids"]
