"""What a calibration keeps on disk while it runs, so that a killed one goes on where it was."""

from __future__ import annotations

import hashlib
import json
import os
from contextlib import suppress
from dataclasses import asdict
from pathlib import Path
from zipfile import BadZipFile

from minicache_trt.calibration.moments import Moments
from minicache_trt.calibration.search import Measured
from minicache_trt.calibration.settings import CalibrationSettings
from minicache_trt.errors import UserError


class State:
    """Partial sums and measured losses beside the plan that is to be written.

    Parameters
    ----------
    plan : Path
        Of plan.json; the state's files are hidden ones beside it.
    fingerprint : str
        Of checkpoint, text and settings; a state of another fingerprint is not used.
    """

    def __init__(self, plan: Path, fingerprint: str) -> None:
        self._progress = plan.with_name(f".{plan.stem}.calibration.json")
        self._moments = plan.with_name(f".{plan.stem}.calibration.npz")
        self._fingerprint = fingerprint
        self.done = 0
        self.measured: dict[str, Measured] = {}

    def load(self) -> Moments | None:
        """Partial sums of an earlier run, None when there are none that can be used."""
        try:
            data = json.loads(self._progress.read_text(encoding="utf-8"))
            if data["fingerprint"] != self._fingerprint:
                return None
            moments = Moments.load(self._moments_of(data["done"]))
            self.measured = {key: Measured(**row) for key, row in data["measured"].items()}
            self.done = data["done"]
        except (OSError, ValueError, KeyError, TypeError, BadZipFile):
            return None
        return moments

    def save_moments(self, moments: Moments, done: int) -> None:
        """Keep sums over the first ``done`` sequences."""
        before = self._moments_of(self.done)
        path = self._moments_of(done)
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            moments.save(path)
        except OSError as error:
            raise UserError(f"cannot write {path}: {error.strerror or error}") from error
        self.done = done
        self.save_measured()
        if before != path:
            before.unlink(missing_ok=True)

    def save_measured(self) -> None:
        """Keep the measured losses; the file is complete at any time."""
        rows = {key: asdict(row) for key, row in self.measured.items()}
        temporary = self._progress.with_suffix(".tmp")
        data = {"fingerprint": self._fingerprint, "done": self.done, "measured": rows}
        try:
            temporary.write_text(json.dumps(data), encoding="utf-8")
            os.replace(temporary, self._progress)
        except OSError as error:
            raise UserError(f"cannot write {self._progress}: {error.strerror or error}") from error

    def remove(self) -> None:
        """The plan is written: nothing is partial any more."""
        with suppress(OSError):
            for path in (self._progress, self._moments_of(self.done)):
                path.unlink(missing_ok=True)

    def _moments_of(self, done: int) -> Path:
        """Sums over so many sequences; the name says how many, so that both files always agree."""
        return self._moments.with_suffix(f".{done}.npz")


def fingerprint(checksum: str, text: str, settings: CalibrationSettings, positions: int) -> str:
    """Digest of everything that partial sums and single streams' losses depend on."""
    parts = {"checkpoint": checksum, "text": text, "settings": asdict(settings), "positions": positions}
    return hashlib.sha256(json.dumps(parts, sort_keys=True).encode()).hexdigest()
