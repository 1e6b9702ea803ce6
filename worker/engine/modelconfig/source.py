"""Where a version's configuration is from: its own `config.pbtxt`, its model's, its manifest.

Owns the order. A `config.pbtxt` among the version's files goes before the one in the model's
folder, and the manifest's key `serving` is put over either, key by key.
"""

from pathlib import Path

from agent.manifest import Manifest
from worker.engine.modelconfig.serving import ServingConfig, apply_manifest, from_config
from worker.engine.modelconfig.support import verify_supported
from worker.engine.modelconfig.text import CONFIG_FILE, ConfigText, parse_config
from worker.errors import ModelConfigError


def find_config(folder: Path, manifest: Manifest, *, has_gpu: bool = False) -> ConfigText | None:
    """Return the `config.pbtxt` of the version in `folder`, or None; reads one small file.

    Raises:
        ModelConfigError: it cannot be read, or is malformed; or protobuf is not installed.
        UnsupportedConfigError: it asks for something that is not offered here.
    """
    is_own = CONFIG_FILE in manifest.files
    # The version's folder may be reached through a link such as `current`.
    path = (folder if is_own else folder.resolve().parent) / CONFIG_FILE
    if not is_own and not path.is_file():
        return None
    try:
        data = path.read_bytes()
    except OSError as exc:
        msg = f"{path} cannot be read: {exc.strerror}"
        raise ModelConfigError(msg) from exc
    config = parse_config(data, str(path))
    verify_supported(config, has_gpu=has_gpu)
    return config


def build_serving(config: ConfigText | None, manifest: Manifest) -> ServingConfig:
    """Return the effective settings of a version.

    Raises:
        ModelConfigError: they contradict themselves.
    """
    base = ServingConfig() if config is None else from_config(config)
    return apply_manifest(base, manifest.serving)
