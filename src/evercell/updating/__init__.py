"""Updates: a finished model learns a new data set and keeps what it knows.

A strategy is how it keeps it. To add one: a new file here with a subclass of `Strategy`, and its line in `STRATEGIES`.
"""

from evercell.plugins import Registry
from evercell.updating.base import StageContext, Strategy, UpdateSettings

STRATEGIES: Registry[Strategy] = Registry(
    "strategy",
    {
        "canal": "evercell.updating.canal:CanalStrategy",
        "replay": "evercell.updating.replay:ReplayStrategy",
        "analytic": "evercell.updating.analytic:AnalyticStrategy",
        "lwf": "evercell.updating.lwf:LwfStrategy",
        "ewc": "evercell.updating.ewc:EwcStrategy",
        "naive": "evercell.updating.naive:NaiveStrategy",
        "joint": "evercell.updating.joint:JointStrategy",
    },
)

__all__ = ["STRATEGIES", "StageContext", "Strategy", "UpdateSettings"]
