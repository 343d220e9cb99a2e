"""Mamba against transformers' mixer (its plain-PyTorch path): outputs and gradients, with copied weights."""

import pytest
import torch
from helpers import assert_agreement, assert_nonzero, gradients, perturb, seeded, tiny
from transformers import MambaConfig
from transformers.models.mamba.modeling_mamba import MambaMixer

from moe_lab.model.mamba import Mamba


def pair(d_model: int, d_state: int, expand: int, d_conv: int, dt_rank: int):
    config = tiny(
        d_model=d_model,
        head_dim=2,
        ssm_state_dim=d_state,
        mamba_expand=expand,
        mamba_d_conv=d_conv,
        mamba_dt_rank=dt_rank,
    )
    ours = seeded(Mamba, config)
    seeded(ours.reset_state_space)
    perturb(ours)
    theirs = MambaMixer(
        MambaConfig(
            hidden_size=d_model,
            state_size=d_state,
            expand=expand,
            conv_kernel=d_conv,
            time_step_rank=dt_rank,
            num_hidden_layers=1,
        ),
        layer_idx=0,
    )
    theirs.load_state_dict(ours.state_dict())
    return ours.eval(), theirs.eval()


USUAL = (16, 4, 2, 4, 1)
ODD = (7, 5, 3, 3, 3)
CASES = [(USUAL, length) for length in (1, 2, 3, 15, 16, 17, 63, 100, 255, 300)]
CASES += [(ODD, length) for length in (1, 2, 17, 100)] + [((9, 1, 1, 2, 5), 37)]


@pytest.mark.parametrize(("sizes", "length"), CASES, ids=str)
def test_mamba_mixer_agrees(sizes, length: int) -> None:
    ours, theirs = pair(*sizes)
    generator = torch.Generator().manual_seed(length)
    x = torch.randn(2, length, sizes[0], generator=generator)
    weight = torch.randn(2, length, sizes[0], generator=generator)
    outputs, grads = [], []
    for layer in (ours, theirs):
        inputs = x.clone().requires_grad_()
        y = layer(inputs)
        y = y[0] if layer is ours else y
        (y * weight).sum().backward()
        outputs.append({"output": y.detach()})
        grads.append(gradients(layer) | {"input": inputs.grad})
    assert_agreement(*outputs)
    assert_agreement(*grads)
    if length > 1:  # the first token finds an empty state, so that nothing decays yet
        assert_nonzero(grads[0])
