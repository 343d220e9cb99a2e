"""Mamba against transformers' mixer (its plain-PyTorch path): outputs and gradients, with copied weights."""

import pytest
from helpers import assert_agreement, assert_nonzero, normal, perturb, seeded, there_and_back, tiny
from transformers import MambaConfig
from transformers.models.mamba.modeling_mamba import MambaMixer

from moe_lab.model.mamba import Mamba


def pair(d_model: int, d_state: int, expand: int, d_conv: int, dt_rank: int):
    sizes = {"ssm_state_dim": d_state, "mamba_expand": expand, "mamba_d_conv": d_conv, "mamba_dt_rank": dt_rank}
    ours = seeded(Mamba, tiny(d_model=d_model, head_dim=2, **sizes))
    seeded(ours.reset_state_space)
    perturb(ours)
    sizes = {"state_size": d_state, "expand": expand, "conv_kernel": d_conv, "time_step_rank": dt_rank}
    theirs = MambaMixer(MambaConfig(hidden_size=d_model, num_hidden_layers=1, **sizes), layer_idx=0)
    theirs.load_state_dict(ours.state_dict())
    return ours.eval(), theirs.eval()


USUAL = (16, 4, 2, 4, 1)
ODD = (7, 5, 3, 3, 3)
CASES = [(USUAL, length) for length in (1, 2, 3, 15, 16, 17, 63, 100, 255)]
CASES += [(ODD, length) for length in (1, 2, 17, 100)] + [((9, 1, 1, 2, 5), 37)]


@pytest.mark.parametrize(("sizes", "length"), CASES, ids=str)
def test_mamba_mixer_agrees(sizes, length: int) -> None:
    (our_output, our_gradients), (their_output, their_gradients) = (
        there_and_back(layer, normal(2, length, sizes[0])) for layer in pair(*sizes)
    )
    assert_agreement(our_output, their_output)
    assert_agreement(our_gradients, their_gradients)
    if length > 1:  # the first token finds an empty state, so that nothing decays yet
        assert_nonzero(our_gradients)
