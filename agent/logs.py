"""Log lines, for people or as JSON objects; one place that sets them up."""

import json
import logging
import sys
import traceback

from agent.clock import format_ms


class JsonFormatter(logging.Formatter):
    """One JSON object a line: ts, level, logger, thread, message and, if any, traceback."""

    def format(self, record: logging.LogRecord) -> str:
        """Return the line."""
        fields = {
            "ts": format_ms(int(record.created * 1000)),
            "level": record.levelname.lower(),
            "logger": record.name,
            "thread": record.threadName,
            "message": record.getMessage(),
        }
        if record.exc_info:
            fields["traceback"] = "".join(traceback.format_exception(*record.exc_info))
        return json.dumps(fields, ensure_ascii=False)


def set_up_logs(level: str, *, as_json: bool) -> None:
    """Send log lines of `level` and above to standard error."""
    handler = logging.StreamHandler(sys.stderr)
    text = logging.Formatter("%(asctime)s %(levelname)-7s %(name)s: %(message)s")
    handler.setFormatter(JsonFormatter() if as_json else text)
    root = logging.getLogger()
    root.handlers[:] = [handler]
    root.setLevel(level.upper())
    for noisy in ("alembic", "celery.redirected", "amqp"):
        logging.getLogger(noisy).setLevel(logging.WARNING)
