"""Release repositories to fetch from, made for tests."""

import hashlib
from pathlib import Path

from agent.release import BLOBS_DIR, CHUNKS_DIR, ReleaseFile
from worker.update.chunks import write_chunk_index


def publish_blob(repository: Path, data: bytes, path: str = "model.onnx") -> ReleaseFile:
    """Put a blob and its chunk index into a repository."""
    digest = hashlib.sha256(data).hexdigest()
    blob = repository / BLOBS_DIR / digest
    blob.parent.mkdir(parents=True, exist_ok=True)
    blob.write_bytes(data)
    index = repository / CHUNKS_DIR / f"{digest}.json"
    index.parent.mkdir(exist_ok=True)
    write_chunk_index(blob, index)
    return ReleaseFile(path=path, sha256=digest, size_bytes=len(data))
