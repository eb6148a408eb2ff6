"""Plans of several sizes from one calibration: the model is run and its streams are measured once for all of them.

    python examples/calibration/several_sizes.py CHECKPOINT TEXT FOLDER --ratios 5,8,12
    minicache-trt eval --model CHECKPOINT --plan FOLDER/plan-5x.json --plan FOLDER/plan-8x.json --text HELD_OUT

`minicache-trt calibrate` writes one plan, with a record and plots; this is what it is made of. TEXT is plain text, or
documents separated by a newline and a NUL.
"""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from minicache_trt.calibration.calibrate import calibrate
from minicache_trt.calibration.record import record, record_path, save_record
from minicache_trt.calibration.settings import CalibrationSettings
from minicache_trt.checkpoint import load_checkpoint
from minicache_trt.cli.console import progress_bars
from minicache_trt.compression.plan_json import save_plan


def main(
    checkpoint: Path,
    text: Path,
    folder: Path,
    ratios: Annotated[str, typer.Option(help="Sizes against a 16-bit cache.")] = "5,8,12",
    context: Annotated[int, typer.Option(help="Tokens at which ratios count.")] = 2048,
    groups: Annotated[str, typer.Option(help="Layers a stream may hold.")] = "1,2",
) -> None:
    """Calibrate, print what was found, write plan-Nx.json for each ratio N."""
    settings = CalibrationSettings(groups=tuple(map(int, groups.split(","))))
    loaded = load_checkpoint(str(checkpoint))
    folder.mkdir(parents=True, exist_ok=True)
    for ratio in map(float, ratios.split(",")):
        with progress_bars() as report:
            # Sums and measured streams are kept beside the first argument's plan; the next ratio finds them there.
            found = calibrate(loaded, text, folder / "shared.json", context, settings, ratio, None, report)
        path = folder / f"plan-{ratio:g}x.json"
        save_plan(found.chosen.plan, path)
        save_record(record(found, text, settings, 0.0), record_path(path))
        for each in (found.chosen, *found.tried, *found.baselines):
            print(f"{path.name}: {found.sizes.ratio(each.block_bytes):6.2f}x  "
                  f"{found.search.total(each):.1e} nats  {each.name}")  # fmt: skip
    found.state.remove()


if __name__ == "__main__":
    typer.run(main)
