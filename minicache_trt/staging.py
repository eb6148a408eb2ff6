"""How an engine directory comes into being: under a temporary name beside its destination, renamed when complete."""

from __future__ import annotations

import errno
import fcntl
import os
import shutil
import tempfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path

from minicache_trt.engine_directory import is_engine_directory
from minicache_trt.errors import UserError

_PREFIX = ".minicache-trt-build."


@dataclass(frozen=True)
class Product:
    """What is made: its name in messages, and how one that is already there is told from what must not be replaced."""

    noun: str
    is_one: Callable[[Path], bool]


ENGINE = Product("an engine", is_engine_directory)


@contextmanager
def staged(output: Path, overwrite: bool, product: Product = ENGINE) -> Iterator[Path]:
    """A temporary directory that becomes ``output`` if the block ends well and vanishes if it does not.

    Its parent is this build's alone and vanishes in any case: a place for temporary files on the same file system.
    It is locked while the build runs, so that a later build can tell and remove what a killed one left.

    Raises
    ------
    UserError
        ``output`` exists (and is not a product to overwrite), it cannot be written, or the disk is full.
    """
    output = Path(os.path.realpath(output))
    missing_parents: list[Path] = []
    complete = False
    try:
        _check_absent(output, overwrite, product)
        missing_parents = [parent for parent in output.parents if not parent.exists()]
        output.parent.mkdir(parents=True, exist_ok=True)
        _remove_abandoned(output.parent)
        private = tempfile.TemporaryDirectory(prefix=_PREFIX, dir=output.parent, ignore_cleanup_errors=True)
        with private as name, locked(Path(name)):
            staging = Path(name) / "engine"
            staging.mkdir()
            yield staging
            _check_absent(output, overwrite, product)
            _publish(staging, output)
            complete = True
    except OSError as error:
        if error.errno in (errno.ENOSPC, errno.EDQUOT):
            raise UserError(
                f"no space left on the disk of {output.parent} while building", "free some space and build again"
            ) from error
        where = f"{error.filename}: " if error.filename not in (None, str(output)) else ""
        raise UserError(f"cannot build {output}: {where}{error.strerror or error}") from error
    finally:
        if not complete:
            for parent in missing_parents:
                with suppress(OSError):
                    parent.rmdir()


def _check_absent(output: Path, overwrite: bool, product: Product) -> None:
    if not output.exists():
        return
    if not product.is_one(output):
        raise UserError(f"cannot write {output}: it exists and is not {product.noun}", "choose another directory")
    if not overwrite:
        raise UserError(f"cannot write {output}: {product.noun} is already there", "add --force to replace it")


def _publish(staging: Path, output: Path) -> None:
    """Rename; an engine that is replaced goes beside ``staging``, and comes back if the new one cannot be renamed."""
    if not output.exists():
        staging.rename(output)
        return
    old = staging.with_name("old")
    try:
        output.rename(old)
        staging.rename(output)
    except BaseException:
        if old.exists() and not output.exists():
            old.rename(output)
        raise


@contextmanager
def locked(directory: Path) -> Iterator[bool]:
    """Whether the directory's lock was free and is held now. The kernel frees it when the process ends, however."""
    descriptor = os.open(directory, os.O_RDONLY)
    try:
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError:  # taken, or a file system without locks
            yield False
        else:
            yield True
    finally:
        os.close(descriptor)


def _remove_abandoned(parent: Path) -> None:
    """Remove what killed builds left behind; what cannot be removed is left alone."""
    for path in parent.glob(f"{_PREFIX}*"):
        with suppress(OSError), locked(path) as free:
            if free:
                shutil.rmtree(path)


def link_or_copy(source: Path, target: Path) -> bool:
    """Hard-link a file, or copy it where the file system cannot; True if it was linked.

    A symbolic link would not do: ONNX Runtime refuses external data outside the model's directory.
    """
    target.parent.mkdir(parents=True, exist_ok=True)
    real = source.resolve()
    try:
        os.link(real, target)
        return True
    except OSError as error:
        if error.errno not in (errno.EXDEV, errno.EPERM, errno.EACCES, errno.EMLINK, errno.ENOTSUP, errno.ENOSYS):
            raise
    shutil.copyfile(real, target)
    return False
