"""What the workers say of watched versions, read from the queue broker.

Owns one connection, used by the updater's thread alone. A broker that does not answer has no
figures: the gate waits for the next ones.
"""

import logging
from typing import Any

import redis
from pydantic import ValidationError

from agent.commands import describe
from agent.tasks import FIGURES_PREFIX, FiguresBody, connect_redis

log = logging.getLogger(__name__)


class FigureReader:
    """Reads the workers' figures.

    Args:
        queue_url: the broker.
    """

    def __init__(self, queue_url: str) -> None:
        self._queue_url = queue_url
        self._client: redis.Redis | None = None

    def read(self) -> list[FiguresBody]:
        """Return the newest figures of every worker that lives; nothing where there are none."""
        try:
            if self._client is None:
                self._client = connect_redis(self._queue_url)
            client: Any = self._client
            keys = list(client.scan_iter(FIGURES_PREFIX + "*", count=100))
            texts = client.mget(keys) if keys else []
        except (redis.RedisError, OSError) as exc:
            log.info("figures: %s", exc)
            self._client = None
            return []
        return [body for text in texts if text is not None and (body := _parse(text)) is not None]


def _parse(text: bytes) -> FiguresBody | None:
    try:
        return FiguresBody.model_validate_json(text)
    except ValidationError as exc:
        log.warning("a worker's figures cannot be read: %s", describe(exc))
        return None
