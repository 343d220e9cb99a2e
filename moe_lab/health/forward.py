"""What can be learned from forward passes: the vocabulary, the logits' variance at the start, and who has a say at all."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn


class ForwardProbe:
    """Listens to a model's forward passes for the first updates, and can repeat one with a tensor changed."""

    def __init__(self, model: nn.Module):
        self.model = model
        self.inputs: tuple[tuple, dict] | None = None
        self.logit_variance: Tensor | None = None
        embeddings = [m for m in model.modules() if isinstance(m, nn.Embedding)]
        self.vocab_size = max((m.num_embeddings for m in embeddings), default=None)
        self.handles = [model.register_forward_pre_hook(self.keep_inputs, with_kwargs=True)]
        if embeddings:
            largest = max(embeddings, key=lambda m: m.num_embeddings)
            self.handles.append(largest.register_forward_pre_hook(self.keep_ids))
        heads = [m for m in model.modules() if isinstance(m, nn.Linear) and m.out_features == self.vocab_size]
        self.head_handle = heads[0].register_forward_hook(self.keep_variance) if heads else None

    def keep_inputs(self, module: nn.Module, args: tuple, kwargs: dict) -> None:
        self.inputs = args, {k: v for k, v in kwargs.items() if k != "labels"}

    def keep_ids(self, module: nn.Module, args: tuple) -> None:
        """Models trained through a method of their own (`model.losses(ids)`) never run the hook above."""
        if self.inputs is None and args and isinstance(args[0], Tensor) and args[0].ndim == 2:
            self.inputs = (args[0].detach(),), {}

    def keep_variance(self, module: nn.Module, args: tuple, output: Any) -> None:
        """Of the first head's first output, once."""
        if isinstance(output, Tensor):
            self.logit_variance = output.detach().float().var(dim=-1).mean()
        self.head_handle.remove()

    def matters(self, param: Tensor) -> bool | None:
        """Whether changing `param` changes the model's output for the last input; None where no forward can be repeated.

        Computed in evaluation mode without gradients; weights, modes and random state are put back.
        """
        if self.inputs is None:
            return None
        args, kwargs = self.inputs
        modes = [(module, module.training) for module in self.model.modules()]
        kept = param.detach().clone()
        devices = [param.device] if param.device.type == "cuda" else []
        try:
            self.model.eval()
            with torch.no_grad(), torch.random.fork_rng(devices=devices):
                before = tensors_of(self.model(*args, **kwargs))
                param.add_(0.1 + param.abs())  # in place: the same tensor object takes part
                after = tensors_of(self.model(*args, **kwargs))
        except (TypeError, ValueError, RuntimeError, KeyError):  # not called this way: then it cannot be told
            return None
        finally:
            with torch.no_grad():
                param.copy_(kept)
            for module, mode in modes:
                module.training = mode
        return any(not torch.equal(a, b) for a, b in zip(before, after, strict=True))

    def forget(self) -> None:
        """Let go of the inputs and stop listening."""
        self.close()
        self.inputs = None

    def close(self) -> None:
        for handle in self.handles:
            handle.remove()
        if self.head_handle is not None:
            self.head_handle.remove()


def tensors_of(output: Any) -> list[Tensor]:
    """All tensors of an output, however they are wrapped."""
    if isinstance(output, Tensor):
        return [output]
    if isinstance(output, dict):
        output = output.values()
    if isinstance(output, (list, tuple)) or hasattr(output, "__iter__"):
        return [t for part in output for t in tensors_of(part)] if not isinstance(output, str) else []
    return []
