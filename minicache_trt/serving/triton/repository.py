"""Model repositories: what Triton reads.

REPO/NAME/config.pbtxt        tensors, instances, parameters; of all versions
REPO/NAME/VERSION/model.py    the shim
REPO/NAME/VERSION/engine/     the engine directory
"""

from __future__ import annotations

import os
import shutil
import sysconfig
import tempfile
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import minicache_trt
from minicache_trt.engine_directory import CONFIG, is_engine_directory, read_engine
from minicache_trt.errors import UserError
from minicache_trt.serving.triton import shim
from minicache_trt.serving.triton.config_text import config_text
from minicache_trt.serving.triton.model import ENGINE
from minicache_trt.serving.triton.settings import ModelSettings
from minicache_trt.staging import Product, link_or_copy, staged

MODEL_CONFIG = "config.pbtxt"
PACKAGES = "packages.pth"


@dataclass(frozen=True)
class Deployed:
    """What was written.

    Parameters
    ----------
    directory : Path
        Of the version.
    linked : bool
        Whether all files are the engine's own, by hard links.
    config_changed : bool
        Whether a ``config.pbtxt`` that was there says something else now; a running server then loads all versions
        again.
    """

    directory: Path
    linked: bool
    config_changed: bool


def deploy(
    engine: Path,
    repository: Path,
    settings: ModelSettings,
    version: int = 1,
    *,
    packages: Sequence[Path] = (),
    copy: bool = False,
    overwrite: bool = False,
) -> Deployed:
    """Write an engine into a model repository, as a new model or as a version of one that is there.

    Everything appears complete or not at all, so a server may be running on the repository.

    Parameters
    ----------
    engine : Path
        Engine directory.
    repository : Path
        Created where there is none.
    settings : ModelSettings
        Of the model; they hold for all its versions.
    version : int
        Triton serves the highest one unless told otherwise.
    packages : sequence of Path
        Folders of Python packages that come before the server's own; those that do not exist there are skipped.
    copy : bool
        Copy the engine's files, rather than hard-link them.
    overwrite : bool
        Replace this version.

    Raises
    ------
    UserError
        The engine is not one, the version is there, or nothing can be written.
    """
    if version < 1:
        raise UserError(f"--version: expected a positive number, got {version}")
    files = [CONFIG, *read_engine(engine).files]
    model = repository / settings.name
    if model.exists() and not _is_model(model):
        raise UserError(
            f"cannot write {model}: it exists and is not a model of minicache-trt", "choose another --model-name"
        )
    if not model.exists():
        with staged(model, False, Product("a model", _is_model)) as directory:
            linked = _write_version(engine, files, directory / str(version), copy, packages)
            (directory / MODEL_CONFIG).write_text(config_text(settings), encoding="utf-8")
        return Deployed(model / str(version), linked, False)
    with staged(model / str(version), overwrite, Product(f"version {version}", _is_version)) as directory:
        linked = _write_version(engine, files, directory, copy, packages)
    return Deployed(model / str(version), linked, _write_config(model / MODEL_CONFIG, config_text(settings)))


def this_environment() -> tuple[Path, ...]:
    """Folders of the packages this process imports, minicache-trt's first."""
    package = Path(minicache_trt.__file__).parents[1]
    site = (Path(sysconfig.get_path(name)) for name in ("purelib", "platlib"))
    return tuple(dict.fromkeys([package, *site]))


def _write_version(engine: Path, files: list[str], directory: Path, copy: bool, packages: Sequence[Path]) -> bool:
    linked = not copy
    for name in files:
        target = directory / ENGINE / name
        if copy:
            target.parent.mkdir(parents=True, exist_ok=True)
            shutil.copyfile(engine / name, target)
        else:
            linked = link_or_copy(engine / name, target) and linked
    shutil.copyfile(shim.__file__, directory / "model.py")
    (directory / PACKAGES).write_text("".join(f"{folder}\n" for folder in packages), encoding="utf-8")
    return linked


def _write_config(path: Path, text: str) -> bool:
    """Replace a file at once, if it would change; whether it did."""
    try:
        if path.exists() and path.read_text(encoding="utf-8") == text:
            return False
        descriptor, temporary = tempfile.mkstemp(prefix=".config.", dir=path.parent)
        with os.fdopen(descriptor, "w", encoding="utf-8") as file:
            file.write(text)
        os.chmod(temporary, 0o644)
        os.replace(temporary, path)
    except OSError as error:
        raise UserError(f"cannot write {path}: {error.strerror or error}") from error
    return True


def _is_version(directory: Path) -> bool:
    return is_engine_directory(directory / ENGINE)


def _is_model(directory: Path) -> bool:
    return directory.is_dir() and any(_is_version(version) for version in directory.iterdir() if version.name.isdigit())
