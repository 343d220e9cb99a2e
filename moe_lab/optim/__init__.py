"""Who updates which tensor, how far, and in which precision.

groups.py    which optimizer updates which tensor, and which tensors decay
muon.py      Muon, for matrices and for stacks of them
sharded.py   matrices that are spread over ranks
schedule.py  the share of the learning rate with which an update runs
rounding.py  bfloat16 parameters that keep their small updates
products.py  bfloat16 products where bfloat16 is slow
"""

from moe_lab.optim.groups import build_optimizers, groups_of
from moe_lab.optim.muon import Muon
from moe_lab.optim.schedule import lr_share

__all__ = ["Muon", "build_optimizers", "groups_of", "lr_share"]
