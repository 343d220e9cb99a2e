"""The MoE layer and its balance loss against transformers' Mixtral, with copied weights and our router in its place."""

import pytest
import torch
from helpers import assert_agreement, assert_nonzero, normal, there_and_back, tiny
from torch import nn
from transformers import MixtralConfig
from transformers.models.mixtral.modeling_mixtral import MixtralSparseMoeBlock, load_balancing_loss_func

from moe_lab.model.moe import MoE, Router, Routing, load_balancing_loss


class AsMixtralGate(nn.Module):
    """Our router with the interface of Mixtral's gate."""

    def __init__(self, router: nn.Module):
        super().__init__()
        self.router = router

    def forward(self, tokens):
        routing = self.router(tokens)
        return routing.logits, routing.weights, routing.expert_ids


def pair(config):
    ours, router = MoE(config), Router(config)
    for index, p in enumerate(ours.parameters()):
        nn.init.normal_(p, std=0.3, generator=torch.Generator().manual_seed(index))
    router.load_state_dict(ours.router.state_dict())
    mixtral = MixtralConfig(
        hidden_size=config.d_model,
        intermediate_size=config.d_ff_expert,
        num_local_experts=config.n_experts,
        num_experts_per_tok=config.moe_top_k,
        experts_implementation="eager",
    )
    theirs = MixtralSparseMoeBlock(mixtral)
    theirs.gate = AsMixtralGate(router)
    with torch.no_grad():
        theirs.experts.gate_up_proj.copy_(torch.cat([ours.gate_proj, ours.up_proj], dim=1))
        theirs.experts.down_proj.copy_(ours.down_proj)
    return ours, theirs


def in_our_names(theirs: dict) -> dict:
    gate, up = theirs.pop("experts.gate_up_proj").chunk(2, dim=1)
    renamed = {"gate_proj": gate, "up_proj": up, "down_proj": theirs.pop("experts.down_proj")}
    return renamed | {name.removeprefix("gate."): value for name, value in theirs.items()}


SHAPES = [  # d_model, d_ff_expert, experts, K, router's hidden width, batch, T
    (16, 24, 4, 2, 8, 2, 9),
    (16, 24, 4, 2, 0, 1, 1),  # one token: two experts get nothing
    (24, 32, 8, 1, 8, 3, 21),
    (8, 40, 8, 3, 0, 1, 64),
    (32, 16, 2, 2, 16, 2, 33),  # every expert takes every token
]


@pytest.mark.parametrize("training", [False, True], ids=["eval", "train"])
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_mixtral_block_agrees(shape, training: bool) -> None:
    d_model, d_ff, n_experts, top_k, hidden, batch, length = shape
    config = tiny(d_model=d_model, d_ff_expert=d_ff, n_experts=n_experts, moe_top_k=top_k, moe_router_hidden=hidden)
    ours, theirs = (layer.train(training) for layer in pair(config))
    (our_output, our_gradients), (their_output, theirs_renamed) = (
        there_and_back(layer, normal(batch, length, d_model)) for layer in (ours, theirs)
    )
    assert_agreement(our_output, their_output)
    theirs_renamed = in_our_names(theirs_renamed)
    assert_agreement(our_gradients, theirs_renamed)
    if top_k > 1:  # a lone expert's weight is one, whatever its logit
        assert_nonzero(our_gradients)
    for name in ("gate_proj", "down_proj"):  # the same experts idle
        assert torch.equal(our_gradients[name].flatten(1).any(1), theirs_renamed[name].flatten(1).any(1))


@pytest.mark.parametrize(("n_experts", "top_k"), [(4, 1), (4, 2), (8, 3), (8, 8)])
def test_balance_loss_is_theirs_over_k(n_experts: int, top_k: int) -> None:
    results = []
    for use_ours in (True, False):
        logits = (normal(50, n_experts, seed=top_k) * 2).requires_grad_()
        if use_ours:
            kept, ids = logits.topk(top_k)
            loss = top_k * load_balancing_loss(Routing(kept.softmax(-1), ids, logits))
        else:
            loss = load_balancing_loss_func((logits,), n_experts, top_k)
        loss.backward()
        results.append((loss.item(), logits.grad))
    (our_loss, our_grad), (their_loss, their_grad) = results
    assert our_loss == pytest.approx(their_loss, rel=1e-5)
    if top_k < n_experts:
        assert_nonzero({"logits": our_grad})
        assert_agreement({"logits": our_grad}, {"logits": their_grad})
    else:  # every expert takes every token: nothing to balance
        assert our_grad.abs().max() < 1e-7
