"""The class names of a model's outputs, for the protocol's `classification`.

Owns the reading of the label files that `config.pbtxt` names: one name a line, as Triton
reads them. A version's own copy lies in its folder.
"""

from collections.abc import Mapping
from pathlib import Path

from agent.manifest import Manifest
from worker.engine.modelconfig.text import ConfigText
from worker.errors import ModelConfigError


def read_labels(
    folder: Path, manifest: Manifest, config: ConfigText | None
) -> Mapping[str, tuple[str, ...]]:
    """Return the names of the classes by output; outputs without labels are left out.

    Args:
        folder: the version's.
        manifest: its manifest; only files that it lists, and has digests of, are read there.
        config: its `config.pbtxt`, if any; else the step `top_k` of the manifest says, for a
            model with one output.

    Raises:
        ModelConfigError: a label file cannot be read, or is not among the version's files.
    """
    named = _find_step_labels(manifest)
    if config is not None:
        named |= {
            entry.name: entry.label_filename
            for entry in config.message.output
            if entry.label_filename
        }
    return {output: _read_lines(folder, manifest, file) for output, file in named.items()}


def _find_step_labels(manifest: Manifest) -> dict[str, str]:
    files = [step.params.get("labels_file") for step in manifest.postprocess]
    found = [file for file in files if isinstance(file, str)]
    if len(manifest.outputs) != 1 or not found:
        return {}
    return {manifest.outputs[0].name: found[-1]}


def _read_lines(folder: Path, manifest: Manifest, file: str) -> tuple[str, ...]:
    if file not in manifest.files:
        msg = f"the label file {file!r} is not among the files of {manifest.name}'s manifest"
        raise ModelConfigError(msg)
    try:
        text = (folder / file).read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as exc:
        msg = f"the label file {file!r} of {manifest.name} cannot be read: {exc}"
        raise ModelConfigError(msg) from exc
    return tuple(line.strip() for line in text.splitlines())
