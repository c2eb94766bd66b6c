"""Which sample fills which slot of a run, and what the order costs: computed without reading."""

from pipeline.data.order.order_v1 import Order, Run, Tail, default_lanes

__all__ = ["Order", "Run", "Tail", "default_lanes"]
