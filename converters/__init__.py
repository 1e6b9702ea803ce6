"""Model file in, model file out, with evidence.

`routes` turns one format into another, step by step, each in a process of its own. Knows
nothing of jobs, the store, MQTT or Celery, and imports `platforms` only.
"""
