"""Which operations, models and plans `kernels.py` measures."""

from __future__ import annotations

from dataclasses import dataclass

from kernel_plans import MODELS, PLANS

from minicache_trt.errors import UserError

OPS = ("decode", "restore", "compress", "prefill")


@dataclass(frozen=True)
class Selection:
    """What is measured."""

    ops: tuple[str, ...] = OPS
    models: tuple[str, ...] = tuple(MODELS)
    plans: tuple[str, ...] = PLANS

    @classmethod
    def of(cls, ops: str, models: str, plans: str) -> Selection:
        """From comma-separated lists.

        Raises
        ------
        UserError
            One of them names what there is not.
        """
        return cls(
            listed("--ops", ops, OPS), listed("--models", models, tuple(MODELS)), listed("--plans", plans, PLANS)
        )


def listed(option: str, text: str, known: tuple[str, ...]) -> tuple[str, ...]:
    """The names in a comma-separated list, in the order of ``known``; all for an empty one."""
    names = [name.strip() for name in text.split(",")] if text else list(known)
    if unknown := [name for name in names if name not in known]:
        raise UserError(f"{option}: unknown {unknown[0]!r}", f"known are: {', '.join(known)}")
    return tuple(name for name in known if name in names)
