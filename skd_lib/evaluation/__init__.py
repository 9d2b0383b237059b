"""Evaluation of models on a task: answers, metrics, intervals and tests."""
