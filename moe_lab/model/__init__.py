"""The network, one mechanism a file.

transformer.py   the whole model: blocks, heads, its losses; build_model
attention.py     grouped queries, rotary positions, the cache of generation
moe.py           router, experts, balance loss and z-loss
mamba.py         the selective state space, and Routing Mamba, a mixture of them
scan.py          Mamba's recurrence, in chunks, with its own backward pass
depth.py         Mixture-of-Depths: which tokens a sublayer computes, and their way back
heads.py         multi-token prediction and its loss
layers.py        what blocks share: SwiGLU, the routers' MLP, dropout
generate.py      text, a token a step
count.py         how many parameters a config has

A new mechanism is a file here with the contract that `Block` states, and: its fields in config.py; the choice of layer in
`Block`; start values in `init_weights`; its matrices in `MATRICES` of optim/groups.py; an entry in `MECHANISMS` of
tests/helpers.py, which puts it through the tests of causality, generation, counting and gradients; a comparison under
tests/peers; what the study model leaves out in notebooks/checks/designs.py.
"""

from moe_lab.model.count import ParameterCount, count_parameters
from moe_lab.model.transformer import LanguageModel, Output, build_model

__all__ = ["LanguageModel", "Output", "ParameterCount", "build_model", "count_parameters"]
