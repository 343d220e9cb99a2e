from moe_lab.optim.groups import build_optimizers, groups_of
from moe_lab.optim.muon import Muon
from moe_lab.optim.schedule import lr_share

__all__ = ["Muon", "build_optimizers", "groups_of", "lr_share"]
