"""Matrix products of bfloat16 values for devices that are slow at them: computed in float32 and rounded.

A bfloat16 product has float32 sums and one rounding at its end anywhere; so only the order of the sums differs.
"""

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_map_only

aten = torch.ops.aten
PRODUCTS = {aten.mm, aten.addmm, aten.bmm, aten.baddbmm, aten._grouped_mm}


def has_fast_bfloat16(device: torch.device) -> bool:
    """False on a CPU for which torch multiplies bfloat16 matrices in a plain loop, some 70 times slower than float32: one
    without AVX-512 or its like."""
    if device.type != "cpu":
        return True
    return torch.backends.mkldnn.is_available() and torch.ops.mkldnn._is_mkldnn_bf16_supported()


def fast_dtype(device: torch.device) -> torch.dtype:
    """In which a device multiplies matrices fast, whatever it costs in digits."""
    return torch.bfloat16 if has_fast_bfloat16(device) else torch.float32


class RoundedProducts(TorchDispatchMode):
    """Within this context every matrix product of bfloat16 tensors is made so, forward and backward: for a model's layers."""

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        def widened(x: Tensor) -> Tensor:
            return x.float() if x.dtype == torch.bfloat16 else x

        kwargs = kwargs or {}
        if func.overloadpacket not in PRODUCTS or args[0].dtype != torch.bfloat16:
            return func(*args, **kwargs)
        args, kwargs = tree_map_only(Tensor, widened, (args, kwargs))
        return func(*args, **kwargs).bfloat16()
