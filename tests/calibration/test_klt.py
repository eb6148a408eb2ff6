"""The joint transform against covariances and optima computed by other means."""

from __future__ import annotations

import numpy as np
import pytest

from minicache_trt.calibration.klt import joint_transform

HEADS, WIDTH = 2, 32


def case(seed: int) -> tuple[np.ndarray, np.ndarray]:
    """Vectors ``[H, n, WIDTH]`` and a sensitivity ``[H, WIDTH, WIDTH]``."""
    rng = np.random.default_rng(seed)
    x = rng.standard_normal((HEADS, 500, WIDTH)) @ rng.standard_normal((HEADS, WIDTH, WIDTH)) + 3.0
    root = rng.standard_normal((HEADS, WIDTH, WIDTH)) * np.geomspace(1, 0.01, WIDTH)
    return x, root @ root.swapaxes(-1, -2)


def transform_of(x: np.ndarray, sensitivity: np.ndarray, damping: float = 1e-9):  # type: ignore[no-untyped-def]
    return joint_transform(x.swapaxes(-1, -2) @ x / x.shape[1], x.mean(1), sensitivity, damping)


def test_without_sensitivity_it_is_the_principal_components() -> None:
    x, _ = case(0)
    found = transform_of(x, np.tile(np.eye(WIDTH), (HEADS, 1, 1)))
    for head in range(HEADS):
        centred = x[head] - x[head].mean(0)
        singular = np.linalg.svd(centred, compute_uv=False)
        np.testing.assert_allclose(found.sigma[head], singular / np.sqrt(500), rtol=1e-5)
        np.testing.assert_allclose(found.encode[head].T @ found.encode[head], np.eye(WIDTH), atol=1e-6)
        y = centred @ found.encode[head, :, :10]
        lost = ((centred - y @ found.decode[head, :10]) ** 2).sum() / 500
        assert lost == pytest.approx((singular[10:] ** 2).sum() / 500, rel=1e-4)
        assert found.cost[head, 10:].sum() == pytest.approx(lost / 2, rel=1e-4)


@pytest.mark.parametrize("rank", [1, 7, 20])
def test_no_projection_of_that_rank_loses_less(rank: int) -> None:
    """The optimum is known: the smallest eigenvalues of M^(1/2) C M^(1/2)."""
    x, sensitivity = case(1)
    found = transform_of(x, sensitivity)
    rng = np.random.default_rng(2)
    for head in range(HEADS):
        centred = x[head] - x[head].mean(0)
        values, vectors = np.linalg.eigh(sensitivity[head])
        root = vectors * np.sqrt(values.clip(0)) @ vectors.T
        optimum = 0.5 * np.linalg.eigvalsh(root @ (centred.T @ centred / 500) @ root)[: WIDTH - rank].sum()

        def loss(encode: np.ndarray, decode: np.ndarray, own: np.ndarray = centred, head: int = head) -> float:
            error = own - own @ encode @ decode
            return 0.5 * float(np.einsum("ni,ij,nj->", error, sensitivity[head], error)) / 500

        own = loss(found.encode[head, :, :rank], found.decode[head, :rank])
        assert own == pytest.approx(optimum, rel=1e-3)
        assert own == pytest.approx(found.cost[head, rank:].sum(), rel=1e-3)
        for _ in range(10):
            basis = np.linalg.qr(rng.standard_normal((WIDTH, rank)))[0]
            assert loss(basis, basis.T) > own


def test_constants_restore_everything_at_full_rank() -> None:
    x, sensitivity = case(3)
    found = transform_of(x, sensitivity, damping=0.05)
    constants = found.constants(WIDTH, gaussian=True)
    assert set(constants) == {"encode", "decode", "mean", "sigma"}
    assert all(value.dtype == np.float32 for value in constants.values()) and (constants["sigma"] > 0).all()
    mean = constants["mean"][:, None]
    y = (x - mean) @ constants["encode"]
    np.testing.assert_allclose(y @ constants["decode"] + mean, x, atol=2e-2)
    assert "sigma" not in found.constants(16, gaussian=False) and found.constants(16, True)["decode"].shape[1] == 16


def test_a_part_nothing_depends_on_is_no_error() -> None:
    x, _ = case(4)
    found = transform_of(x, np.zeros((HEADS, WIDTH, WIDTH)), damping=0.05)
    assert np.isfinite(found.encode).all() and (found.sigma > 0).all() and (found.cost == 0).all()
