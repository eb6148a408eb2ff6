"""Collectives of a parsed network, and the way to the other ranks when it runs."""

from __future__ import annotations

from typing import Any

from minicache_trt.backends.tensorrt.network import Network
from minicache_trt.errors import UserError

KIND = "DIST_COLLECTIVE"


def set_ranks(network: Network, ranks: int) -> None:
    """Tell every collective the number of ranks, where its node's attribute has not.

    Raises
    ------
    UserError
        This TensorRT has no collectives.
    """
    if ranks == 1:
        return
    kind = getattr(network.trt.LayerType, KIND, None)
    if kind is None:
        raise UserError(
            f"TensorRT {network.trt.__version__} has no collectives, which engines of {ranks} ranks need",
            "install TensorRT 11, or build with --tp-size 1",
        )
    for index in range(network.definition.num_layers):
        layer = network.definition.get_layer(index)
        if layer.type == kind and layer.num_ranks != ranks:
            layer.num_ranks = ranks


def connect(context: Any, communicator: Any) -> None:
    """Give an execution context its NCCL communicator, which must outlive it.

    Raises
    ------
    UserError
        TensorRT refuses it.
    """
    if not context.set_communicator(communicator):
        raise UserError("TensorRT refuses the ranks' NCCL communicator", "update NCCL, or run with one rank")
