"""How a model version is served: what the scheduler, the cache and warm-up go by.

Owns `ServingConfig`, its checks, and the way to and from Triton's message and the manifest's
key `serving`. Never looks at a graph: whether rows may be stacked at all is the session's.

Invariants: frozen; what is inconsistent in itself is refused when it is made.
"""

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field, replace
from enum import StrEnum
from types import MappingProxyType
from typing import Any

from agent.manifest import QueueRules, Serving, VersionPolicy, Warmup
from platforms.artifact import Datatype
from worker.engine.modelconfig.message import ConfigMessage
from worker.engine.modelconfig.text import ConfigText
from worker.errors import ModelConfigError

_US = 1_000_000


class TimeoutAction(StrEnum):
    """What becomes of a request that has waited too long."""

    REJECT = "REJECT"
    DELAY = "DELAY"
    """It runs after all that have not."""


class WarmupSource(StrEnum):
    """Where a warm-up run's tensor comes from."""

    ZERO = "zero"
    RANDOM = "random"
    FILE = "file"


@dataclass(frozen=True, slots=True)
class QueuePolicy:
    """The rules of one queue."""

    timeout_s: float = 0.0
    """0: no limit."""
    timeout_action: TimeoutAction = TimeoutAction.REJECT
    allow_timeout_override: bool = False
    """A request may ask for a shorter wait."""
    max_queue_size: int = 0
    """0: no limit."""


@dataclass(frozen=True, slots=True)
class VersionChoice:
    """Which versions are served by number: the latest n, the ones named, or all."""

    latest: int | None = 1
    specific: tuple[int, ...] = ()

    def choose(self, versions: Iterable[int]) -> tuple[int, ...]:
        """Return those of the versions that are served, ascending."""
        known = sorted(set(versions))
        if self.specific:
            return tuple(version for version in known if version in self.specific)
        return tuple(known if self.latest is None else known[-self.latest :])


@dataclass(frozen=True, slots=True)
class WarmupTensor:
    """One input of a warm-up run."""

    datatype: Datatype
    shape: tuple[int, ...]
    """Without the batch axis."""
    source: WarmupSource = WarmupSource.ZERO
    file: str | None = None
    """Below the version's folder; raw little-endian data, BYTES with 4-byte lengths."""


@dataclass(frozen=True, slots=True)
class WarmupSample:
    """One run before a version takes requests."""

    name: str
    inputs: Mapping[str, WarmupTensor]
    rows: int = 1
    """0 or 1 for a model without a batch axis."""
    count: int = 1


@dataclass(frozen=True, slots=True)
class ServingConfig:
    """The effective settings of one model version."""

    max_rows: int | None = None
    """Most rows in one run, 0 for a model that takes no batch; None: by the graph and the
    measured cost."""
    is_batching: bool = True
    """Requests may be put together; False: a run is one request of at most `max_rows` rows."""
    preferred_rows: tuple[int, ...] = ()
    max_queue_delay_s: float = 0.0
    preserve_ordering: bool = False
    priority_levels: int = 0
    """0: no priorities. 1 is the most urgent level."""
    default_priority: int = 0
    queue: QueuePolicy = QueuePolicy()
    priority_queues: Mapping[int, QueuePolicy] = field(default_factory=dict)
    instances: int | None = None
    """Runs at the same time; None: as many as pay on this box."""
    response_cache: bool = False
    warmup: tuple[WarmupSample, ...] = ()
    version_policy: VersionChoice = VersionChoice()
    parameters: Mapping[str, str] = field(default_factory=dict)

    def __post_init__(self) -> None:
        """Refuse what contradicts itself; Triton's rules.

        Raises:
            ModelConfigError: it does.
        """
        object.__setattr__(self, "priority_queues", MappingProxyType(dict(self.priority_queues)))
        object.__setattr__(self, "parameters", MappingProxyType(dict(self.parameters)))
        for problem in (_check_rows(self), _check_priorities(self)):
            if problem:
                raise ModelConfigError(problem)

    def get_queue(self, priority: int = 0) -> QueuePolicy:
        """Return the rules for a request of this priority; 0 stands for the default one."""
        return self.priority_queues.get(priority or self.default_priority, self.queue)


def _check_rows(config: ServingConfig) -> str:
    if (config.max_rows or 0) < 0:
        return f"max_batch_size is {config.max_rows}, which is no number of rows"
    if config.max_queue_delay_s < 0 or any(size < 1 for size in config.preferred_rows):
        return "preferred batch sizes and the queue delay are positive"
    if config.max_rows and max(config.preferred_rows, default=0) > config.max_rows:
        return f"a preferred batch size is over max_batch_size, which is {config.max_rows}"
    if config.instances is not None and config.instances < 1:
        return f"{config.instances} instances would serve nobody"
    return ""


def _check_priorities(config: ServingConfig) -> str:
    levels = config.priority_levels
    if levels and not 1 <= config.default_priority <= levels:
        return f"default_priority_level is {config.default_priority}: it goes from 1 to {levels}"
    if not levels and config.default_priority:
        return "default_priority_level needs priority_levels"
    if config.preserve_ordering and levels > 1:
        return "only one priority level is allowed with preserve_ordering"
    wrong = [level for level in config.priority_queues if not 1 <= level <= levels]
    return f"priority_queue_policy {wrong[0]} is no level of {levels}" if wrong else ""


# --- from the manifest ------------------------------------------------------------------------


def apply_manifest(base: ServingConfig, serving: Serving | None) -> ServingConfig:
    """Return `base` with the keys that the manifest's `serving` really has put over it.

    Raises:
        ModelConfigError: together they contradict themselves.
    """
    if serving is None:
        return base
    given = serving.model_fields_set
    changes: dict[str, Any] = {key: getattr(serving, key) for key in given & _PLAIN_KEYS}
    if "queue" in given:
        changes["queue"] = _from_rules(serving.queue)
    if "priority_queues" in given:
        changes["priority_queues"] = {
            level: _from_rules(rules) for level, rules in serving.priority_queues.items()
        }
    if "warmup" in given:
        changes["warmup"] = tuple(_from_warmup(item) for item in serving.warmup)
    if serving.version_policy is not None:
        changes["version_policy"] = _from_policy(serving.version_policy)
    if given & _BATCHING_KEYS:
        changes["is_batching"] = serving.max_rows != 0
    return replace(base, **changes)


_PLAIN_KEYS = {
    "max_rows",
    "preferred_rows",
    "max_queue_delay_s",
    "preserve_ordering",
    "priority_levels",
    "default_priority",
    "instances",
    "response_cache",
    "parameters",
}
_BATCHING_KEYS = {"max_rows", "preferred_rows", "max_queue_delay_s"}


def _from_rules(rules: QueueRules) -> QueuePolicy:
    return QueuePolicy(
        rules.timeout_s,
        TimeoutAction(rules.timeout_action.upper()),
        rules.allow_timeout_override,
        rules.max_queue_size,
    )


def _from_policy(policy: VersionPolicy) -> VersionChoice:
    return VersionChoice(policy.latest, policy.specific or ())


def _from_warmup(item: Warmup) -> WarmupSample:
    inputs = {
        name: WarmupTensor(given.datatype, given.shape, WarmupSource(given.source), given.file)
        for name, given in item.inputs.items()
    }
    return WarmupSample(item.name, inputs, item.rows, item.count)


# --- from and to Triton's message ---------------------------------------------------------------


def from_config(config: ConfigText) -> ServingConfig:
    """Return the settings that a `config.pbtxt` makes.

    Raises:
        ModelConfigError: it contradicts itself.
    """
    message = config.message
    batching = message.dynamic_batching
    is_sized = config.has_batch_size
    # As Triton's onnxruntime backend completes: only a file that names its tensors is left alone.
    is_whole = bool(message.input and message.output) or message.max_batch_size <= 1
    return ServingConfig(
        max_rows=message.max_batch_size if is_sized else None,
        # A file that says nothing of batches leaves all of it to us.
        is_batching=message.HasField("dynamic_batching") or not (is_sized and is_whole),
        preferred_rows=tuple(batching.preferred_batch_size),
        max_queue_delay_s=batching.max_queue_delay_microseconds / _US,
        preserve_ordering=batching.preserve_ordering,
        priority_levels=batching.priority_levels,
        default_priority=batching.default_priority_level,
        queue=_read_queue(batching.default_queue_policy),
        priority_queues={
            level: _read_queue(batching.priority_queue_policy[level])
            for level in batching.priority_queue_policy
        },
        instances=sum(max(group.count, 1) for group in message.instance_group) or None,
        response_cache=message.response_cache.enable,
        warmup=tuple(_read_warmup(item) for item in message.model_warmup),
        version_policy=_read_policy(message.version_policy),
        parameters={key: message.parameters[key].string_value for key in message.parameters},
    )


def _read_queue(policy: Any) -> QueuePolicy:
    return QueuePolicy(
        policy.default_timeout_microseconds / _US,
        TimeoutAction(policy.TimeoutAction.Name(policy.timeout_action)),
        policy.allow_timeout_override,
        policy.max_queue_size,
    )


def _read_policy(policy: Any) -> VersionChoice:
    kind = policy.WhichOneof("policy_choice")
    if kind == "specific":
        return VersionChoice(None, tuple(policy.specific.versions))
    if kind == "all":
        return VersionChoice(None)
    return VersionChoice(policy.latest.num_versions or 1)


WARMUP_FOLDER = "warmup"
"""Where Triton looks for a warm-up's data files, below the model's folder."""


def _read_warmup(item: Any) -> WarmupSample:
    inputs = {name: _read_tensor(item.inputs[name]) for name in item.inputs}
    return WarmupSample(item.name, inputs, max(item.batch_size, 1), max(item.count, 1))


def _read_tensor(given: Any) -> WarmupTensor:
    kind = given.WhichOneof("input_data_type")
    source = {"random_data": WarmupSource.RANDOM, "input_data_file": WarmupSource.FILE}.get(
        kind, WarmupSource.ZERO
    )
    file = f"{WARMUP_FOLDER}/{given.input_data_file}" if source is WarmupSource.FILE else None
    return WarmupTensor(read_datatype(given.data_type), tuple(given.dims), source, file)


_TYPE_NUMBERS: Mapping[Datatype, int] = MappingProxyType(
    {
        Datatype.BOOL: 1,
        Datatype.UINT8: 2,
        Datatype.UINT16: 3,
        Datatype.UINT32: 4,
        Datatype.UINT64: 5,
        Datatype.INT8: 6,
        Datatype.INT16: 7,
        Datatype.INT32: 8,
        Datatype.INT64: 9,
        Datatype.FP16: 10,
        Datatype.FP32: 11,
        Datatype.FP64: 12,
        Datatype.BYTES: 13,
        Datatype.BF16: 14,
    }
)
"""`inference.DataType` of each element type; BYTES is TYPE_STRING there."""


def read_datatype(number: int) -> Datatype:
    """Return the element type of a number of `inference.DataType`.

    Raises:
        ModelConfigError: it is TYPE_INVALID, or none.
    """
    for datatype, known in _TYPE_NUMBERS.items():
        if known == number:
            return datatype
    msg = "a data_type is missing or is no element type"
    raise ModelConfigError(msg)


def get_type_number(datatype: Datatype) -> int:
    """Return the number in `inference.DataType` of an element type."""
    return _TYPE_NUMBERS[datatype]


def write_serving(message: ConfigMessage, serving: ServingConfig) -> None:
    """Put the effective settings into a message; the batch size is `completion`'s."""
    _write_batching(message, serving)
    had = sum(max(group.count, 1) for group in message.instance_group) or None
    if serving.instances is not None and serving.instances != had:
        del message.instance_group[:]
        message.instance_group.add(count=serving.instances)
    if serving.response_cache or message.HasField("response_cache"):
        message.response_cache.enable = serving.response_cache
    _write_policy(message.version_policy, serving.version_policy)
    for key in set(message.parameters) - set(serving.parameters):
        del message.parameters[key]
    for key, value in serving.parameters.items():
        message.parameters[key].string_value = value
    if tuple(_read_warmup(item) for item in message.model_warmup) != serving.warmup:
        del message.model_warmup[:]
        for sample in serving.warmup:
            _write_warmup(message.model_warmup.add(), sample)


def _write_batching(message: ConfigMessage, serving: ServingConfig) -> None:
    if not serving.is_batching:
        message.ClearField("dynamic_batching")
        return
    batching = message.dynamic_batching
    batching.SetInParent()
    batching.preferred_batch_size[:] = serving.preferred_rows
    batching.max_queue_delay_microseconds = round(serving.max_queue_delay_s * _US)
    batching.preserve_ordering = serving.preserve_ordering
    batching.priority_levels = serving.priority_levels
    batching.default_priority_level = serving.default_priority
    if serving.queue != QueuePolicy() or batching.HasField("default_queue_policy"):
        _write_queue(batching.default_queue_policy, serving.queue)
    for level in set(batching.priority_queue_policy) - set(serving.priority_queues):
        del batching.priority_queue_policy[level]
    for level, policy in serving.priority_queues.items():
        _write_queue(batching.priority_queue_policy[level], policy)


def _write_queue(target: Any, policy: QueuePolicy) -> None:
    target.timeout_action = target.TimeoutAction.Value(policy.timeout_action.value)
    target.default_timeout_microseconds = round(policy.timeout_s * _US)
    target.allow_timeout_override = policy.allow_timeout_override
    target.max_queue_size = policy.max_queue_size


def _write_policy(target: Any, choice: VersionChoice) -> None:
    if choice.specific:
        target.specific.versions[:] = choice.specific
    elif choice.latest is None:
        target.all.SetInParent()
    else:
        target.latest.num_versions = choice.latest


def _write_warmup(target: Any, sample: WarmupSample) -> None:
    target.name, target.batch_size, target.count = sample.name, sample.rows, sample.count
    for name, tensor in sample.inputs.items():
        entry = target.inputs[name]
        entry.data_type = get_type_number(tensor.datatype)
        entry.dims[:] = tensor.shape
        if tensor.source is WarmupSource.FILE:
            entry.input_data_file = (tensor.file or "").removeprefix(f"{WARMUP_FOLDER}/")
        else:
            setattr(entry, f"{tensor.source.value}_data", True)
