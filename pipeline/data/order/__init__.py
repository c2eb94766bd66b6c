"""Which sample stands where in a run, and what that costs: by arithmetic alone, nothing is read."""

from pipeline.data.order.order_v1 import Order, Run, Tail, default_lanes

__all__ = ["Order", "Run", "Tail", "default_lanes"]
