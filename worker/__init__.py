"""Runs jobs: the engine, the steps around a model, and later the Celery tasks."""
