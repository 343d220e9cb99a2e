"""Which optimizer updates which tensor, and which tensors decay."""

from collections.abc import Iterable, Iterator

from torch import nn
from torch.optim import AdamW, Optimizer

from moe_lab.config import OptimizerConfig
from moe_lab.optim.muon import Muon

# The last module of a parameter's name decides, never its rank: A_log is 2-D and no matrix, conv1d is 3-D and no stack.
# A router's matrices are not listed: they go to AdamW, as in the case.
MATRICES = {
    *("q_proj", "k_proj", "v_proj", "o_proj"),
    *("gate_proj", "up_proj", "down_proj"),
    *("in_proj", "x_proj", "dt_proj", "out_proj"),
}
DECAYED = ("embedding", "lm_heads")
FUSED_ON = {"cpu", "cuda", "mps"}  # where torch has AdamW in one pass, its counts on the device


def group_of(name: str) -> str:
    """`muon`, `adamw_decayed` or `adamw` for a parameter's full name."""
    parts = name.split(".")
    if parts[-1] == "weight":
        parts.pop()
    if parts[-1] in MATRICES:  # "….q_proj.weight" and the experts' stack "….gate_proj", but not "dt_proj.bias"
        return "muon"
    return "adamw_decayed" if parts[0] in DECAYED else "adamw"


def split_parameters(model: nn.Module) -> dict[str, list[nn.Parameter]]:
    """Every trainable parameter, once, under the name of its group."""
    groups: dict[str, list[nn.Parameter]] = {"muon": [], "adamw_decayed": [], "adamw": []}
    for name, p in model.named_parameters():
        if p.requires_grad:
            groups[group_of(name)].append(p)
    return groups


def build_optimizers(model: nn.Module, config: OptimizerConfig, max_lr: float) -> list[Optimizer]:
    """Muon and AdamW, or AdamW alone, with the peak LRs in `lr` and in `initial_lr`, from which a schedule scales.

    Beside Muon, AdamW runs at `adamw_lr_ratio · max_lr`, on embeddings and heads at `embedding_lr_ratio · max_lr`; alone, it
    moves everything at `max_lr` and decays matrices too.
    """
    decay = {"muon": config.weight_decay, "adamw_decayed": config.weight_decay, "adamw": 0.0}
    split = split_parameters(model).items()
    matrices, decayed, rest = ({"params": params, "name": name, "weight_decay": decay[name]} for name, params in split)
    fused = {p.device.type for p in model.parameters()} <= FUSED_ON
    adam = {"betas": tuple(config.betas), "eps": config.eps, "fused": fused}
    if config.type == "muon":
        decayed["lr"] = (config.embedding_lr_ratio or config.adamw_lr_ratio) * max_lr
        momentum = {"momentum": config.momentum, "nesterov": config.nesterov}
        muon = Muon([matrices], lr=max_lr, ns_steps=config.ns_steps, adjust_lr=config.adjust_lr, **momentum)
        optimizers = [muon, AdamW([decayed, rest], lr=config.adamw_lr_ratio * max_lr, **adam)]
    else:
        matrices["name"] = "adamw_matrices"
        optimizers = [AdamW([matrices, decayed, rest], lr=max_lr, **adam)]
    for group in groups_of(optimizers):
        group["initial_lr"] = group["lr"]
    return optimizers


def groups_of(optimizers: list[Optimizer]) -> Iterator[dict]:
    return (group for optimizer in optimizers for group in optimizer.param_groups)


def pass_options(source: Iterable[dict], target: Iterable[dict]) -> None:
    """Copy every option of each group but its parameters."""
    for given, taken in zip(source, target, strict=True):
        taken.update({key: value for key, value in given.items() if key != "params"})
