"""From a model somebody has trained to a version that the repository takes.

Owns what lies between `converters`, which knows nothing of manifests, and the repository: samples
prepared as serving prepares them, the version's folder, and the job that makes one on a box.
"""
