"""Model file in, model file out, with evidence. Empty so far but for its errors.

Will own the registry of conversion pairs, quantization, pruning, distillation and the
parity check of every result. Knows nothing of jobs, the store, MQTT or Celery, and
imports `platforms` only.
"""
