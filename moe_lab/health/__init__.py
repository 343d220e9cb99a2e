"""Watch any PyTorch training and say what is wrong. Needs torch and the standard library, nothing else.

before/          what a config says, before a second of compute
during/          the Watch: rules on a training's own steps; the branch probe
after/           what a checkpoint says
choices.py       top-k, sort and other choices of a forward pass: heard, recorded, held, taken for positions
conventions.py   what a learning rate means, and which are usual
findings.py      what every check returns, and the table of rules
measures.py      pure functions: rounding, reach, trend, realised over intended
random_state.py  torch's generators, kept and put back
sampling.py      which elements are looked at, what waits on its device until a check, and how tensors are named
tokens.py        pure functions: batches of tokens and their targets
__main__.py      the command `doctor`
torch_private.py every private interface of torch that is leaned on
"""

from importlib import import_module

HOMES = {
    "HealthCallback": "during.callback",
    "RULES": "findings",
    "SICKNESSES": "findings",
    "Finding": "findings",
    "Watch": "during.watch",
    "branch_findings": "during.branch",
    "branch_probe": "during.branch",
    "check_causality": "during.causal",
    "check_data": "before.data",
    "check_train_eval": "before.flow",
    "dry_run": "before.trying",
    "examine": "before.examine",
    "inspect_checkpoint": "after.inspection",
    "preflight": "before.preflight",
    "start_sample": "sampling",
    "unread_keys": "before.trying",
}
__all__ = list(HOMES)


def __getattr__(name: str):
    """Each public name is imported when it is first asked for."""
    if name not in HOMES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    globals()[name] = getattr(import_module(f".{HOMES[name]}", __name__), name)
    return globals()[name]
