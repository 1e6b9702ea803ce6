"""Signing keys in folders: ed25519, one PEM file each.

Owns the key folders: `NAME.pem` is the private key (mode 0600), `NAME.pub` the public one
as JSON, for whoever has to name a key that lies in another safe. Never signs by itself, and
never lets a private key lie in a release repository, which is there to be served.

Invariants: a file is never overwritten; there is no cryptography here but calls of
securesystemslib's CryptoSigner.
"""

import json
import os
import re
from collections.abc import Iterator, Sequence
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any

from agent.fileio import fsync_dir
from agent.manifest import NAME_PATTERN
from console.errors import PublishMissingError, SigningKeyError

if TYPE_CHECKING:
    from securesystemslib.signer import CryptoSigner, Key

PRIVATE_SUFFIX = ".pem"
PUBLIC_SUFFIX = ".pub"


class KeyRing:
    """The keys of some folders.

    Args:
        folders: where keys are looked for; new ones are made in the first.
        repository: in which none of the folders may lie.

    Raises:
        SigningKeyError: a folder lies in the repository.
        PublishMissingError: the library that signs is not installed.
    """

    def __init__(self, folders: Sequence[Path], repository: Path | None = None) -> None:
        _check_library()
        for folder in folders:
            if repository is not None and folder.resolve().is_relative_to(repository.resolve()):
                msg = f"{folder} lies in the repository: whoever can read that could sign, too"
                raise SigningKeyError(msg)
        self._folders = tuple(folders)

    @cached_property
    def _signers(self) -> "dict[str, CryptoSigner]":
        """Signers by the name of their key."""
        return dict(self._iter_signers())

    def _iter_signers(self) -> "Iterator[tuple[str, CryptoSigner]]":
        for folder in self._folders:
            for path in sorted(folder.glob(f"*{PRIVATE_SUFFIX}")):
                yield path.stem, _read_signer(path)

    def find_signer(self, keyid: str) -> "CryptoSigner | None":
        """Return the signer of a key, where its private half is here."""
        for signer in self._signers.values():
            if signer.public_key.keyid == keyid:
                return signer
        return None

    def list_keys(self) -> dict[str, str]:
        """Return the ids of the private keys that are here, by name."""
        return {name: signer.public_key.keyid for name, signer in self._signers.items()}

    def create(self, name: str) -> "Key":
        """Make a key pair and return the public half.

        Raises:
            SigningKeyError: there is no folder, the name cannot be used, or is in use.
        """
        from securesystemslib.signer import CryptoSigner

        if not self._folders:
            raise SigningKeyError("name a folder for keys: --keys DIR")
        if not re.fullmatch(NAME_PATTERN, name):
            raise SigningKeyError(f"{name!r} cannot be the name of a key")
        folder = self._folders[0]
        folder.mkdir(mode=0o700, parents=True, exist_ok=True)
        signer = CryptoSigner.generate_ed25519()
        key: Key = signer.public_key
        public = json.dumps({"keyid": key.keyid, **key.to_dict()}, indent=1) + "\n"
        _write_new(folder / (name + PRIVATE_SUFFIX), signer.private_bytes, 0o600)
        _write_new(folder / (name + PUBLIC_SUFFIX), public.encode(), 0o644)
        fsync_dir(folder)
        self._signers[name] = signer
        return key

    def get_or_create(self, name: str) -> "Key":
        """Return the public half of the key of that name; made, if there is none."""
        signer = self._signers.get(name)
        return self.create(name) if signer is None else signer.public_key

    def create_next(self, role: str) -> "Key":
        """Make a key with the first free name for a role, such as `targets-2`."""
        taken = {path.stem for folder in self._folders for path in folder.iterdir()}
        number = next(number for number in range(2, 10_000) if f"{role}-{number}" not in taken)
        return self.create(f"{role}-{number}")


def read_public_key(path: Path) -> "Key":
    """Return the key of a `.pub` file.

    Raises:
        SigningKeyError: it cannot be read, or is no public key.
    """
    _check_library()
    from securesystemslib.signer import Key

    try:
        document: dict[str, Any] = json.loads(path.read_text(encoding="utf-8"))
        return Key.from_dict(document.pop("keyid"), document)
    except OSError as exc:
        raise SigningKeyError(f"{path} cannot be read: {exc.strerror}") from exc
    except (ValueError, KeyError, AttributeError, TypeError) as exc:
        raise SigningKeyError(f"{path} is no public key of `edgeward keys create`") from exc


def _read_signer(path: Path) -> "CryptoSigner":
    from cryptography.exceptions import UnsupportedAlgorithm
    from cryptography.hazmat.primitives.serialization import load_pem_private_key
    from securesystemslib.signer import CryptoSigner

    try:
        # `from_priv_key_uri` would read the path as a URL, and want the public half beside it.
        return CryptoSigner(load_pem_private_key(path.read_bytes(), None))
    except OSError as exc:
        raise SigningKeyError(f"{path} cannot be read: {exc.strerror}") from exc
    except (ValueError, TypeError, UnsupportedAlgorithm) as exc:
        raise SigningKeyError(f"{path} is no private key as it should be: {exc}") from exc


def _write_new(path: Path, data: bytes, mode: int) -> None:
    try:
        fd = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, mode)
    except FileExistsError as exc:
        raise SigningKeyError(f"{path} is there already: a key is never overwritten") from exc
    with os.fdopen(fd, "wb") as file:
        file.write(data)
        file.flush()
        os.fsync(fd)


def _check_library() -> None:
    try:
        import cryptography
        import securesystemslib.signer
    except ImportError as exc:
        msg = "signing needs a library that a box does without: pip install 'edgeward[publish]'"
        raise PublishMissingError(msg) from exc
    del cryptography, securesystemslib
