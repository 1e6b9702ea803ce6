"""Bringing a model's configuration to the engine: `modelconfig` on one side, batching on the other.

Owns the translation of `ServingConfig` into `BatchOptions`, the warm-up runs, and the JSON that
clients see. Reads the version's small files when it loads; decides nothing.
"""

import logging
import time
from dataclasses import replace
from pathlib import Path
from typing import Any

from agent.errors import AgentError
from agent.manifest import Manifest, read_manifest
from worker.engine.batcher import BatchOptions, WaitRules
from worker.engine.modelconfig.completion import Graph, complete
from worker.engine.modelconfig.document import to_json
from worker.engine.modelconfig.samples import build_warmup
from worker.engine.modelconfig.serving import (
    QueuePolicy,
    ServingConfig,
    TimeoutAction,
    VersionChoice,
)
from worker.engine.modelconfig.source import build_serving, find_config
from worker.engine.modelconfig.text import ConfigText
from worker.engine.sessions import LoadedModel
from worker.errors import ModelConfigError

_log = logging.getLogger(__name__)


def configure(model: LoadedModel, options: BatchOptions) -> BatchOptions:
    """Return what the model's configuration makes of the engine's own choice.

    The measured maximum holds below a configured one: that is a limit, not a wish.

    Raises:
        ManifestError, ModelConfigError: its files are damaged or contradict themselves.
    """
    manifest = read_manifest(model.folder)
    config = build_serving(find_config(model.folder, manifest), manifest)
    return apply_config(options, config)


def warm_up(model: LoadedModel) -> None:
    """Run what the model's configuration wants run before a request does.

    Raises:
        ManifestError, ModelConfigError: its files are damaged or contradict themselves.
        PlatformError: a run failed.
    """
    manifest = read_manifest(model.folder)
    config = build_serving(find_config(model.folder, manifest), manifest)
    for sample in config.warmup:
        inputs = build_warmup(sample, model.folder, has_batch=model.is_batchable)
        began = time.perf_counter()
        for _ in range(sample.count):
            model.session.run(inputs)
        spent_ms = 1000 * (time.perf_counter() - began)
        _log.info(
            "%s %s: warm-up %r took %.1f ms", model.name, model.version, sample.name, spent_ms
        )


def read_version_choice(folder: Path) -> VersionChoice:
    """Return which versions the configuration in a version's folder wants served by number.

    All where it says nothing: a version that nobody asks for costs nothing here, while Triton,
    which loads each one at once, serves the latest only.

    Raises:
        ManifestError, ModelConfigError: its files are damaged or contradict themselves.
    """
    manifest = read_manifest(folder)
    return _build_whole(find_config(folder, manifest), manifest).version_policy


def _build_whole(config: ConfigText | None, manifest: Manifest) -> ServingConfig:
    serving = build_serving(config, manifest)
    is_stated = manifest.serving is not None and manifest.serving.version_policy is not None
    if config is not None:
        is_stated |= config.message.version_policy.WhichOneof("policy_choice") is not None
    return serving if is_stated else replace(serving, version_policy=VersionChoice(None))


def apply_config(options: BatchOptions, config: ServingConfig) -> BatchOptions:
    """Return the options with the configuration put over them. Pure."""
    limit = config.max_rows or None
    return replace(
        options,
        # One run at a time is what keeps answers in the order of their requests.
        instances=1 if config.preserve_ordering else config.instances or options.instances,
        max_rows=min(options.max_rows, limit or options.max_rows),
        request_rows_max=limit,
        is_batchable=options.is_batchable and config.max_rows != 0,
        is_joining=config.is_batching,
        queue=_to_rules(config.queue, options.queue),
        priority_queues={
            level: _to_rules(policy, options.queue)
            for level, policy in config.priority_queues.items()
        },
        priority_levels=config.priority_levels,
        default_priority=config.default_priority or options.default_priority,
        max_queue_delay_s=config.max_queue_delay_s,
        preferred_rows=config.preferred_rows,
        is_cached=config.response_cache,
    )


def _to_rules(policy: QueuePolicy, default: WaitRules) -> WaitRules:
    timeout_s = policy.timeout_s or None
    return WaitRules(
        requests_max=policy.max_queue_size or default.requests_max,
        timeout_s=timeout_s,
        # Triton ignores a request's timeout where the model has none; here it may name one.
        is_timeout_free=timeout_s is None or policy.allow_timeout_override,
        is_delaying=policy.timeout_action is TimeoutAction.DELAY,
    )


def describe(name: str, model: LoadedModel) -> dict[str, Any] | None:
    """Return Triton's ModelConfig as JSON; None where protobuf, which it needs, is missing."""
    graph = Graph(
        name=name,
        format=model.artifact.format,
        file=model.artifact.file,
        inputs=model.session.inputs,
        outputs=model.session.outputs,
        is_batchable=model.is_batchable,
    )
    try:
        manifest = read_manifest(model.folder)
        config = find_config(model.folder, manifest)
        return to_json(complete(config, graph, _build_whole(config, manifest)))
    except (AgentError, ModelConfigError) as exc:
        _log.warning("%s: its configuration cannot be shown whole: %s", name, exc)
        return None
