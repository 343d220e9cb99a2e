"""What backward passes beside the loss's own show: that of a multiple of it, and that of the model's answer alone."""

from collections.abc import Iterator, Sequence
from statistics import median
from typing import Any

import torch
from torch import Tensor

from ..during.forward import disturbed
from ..during.heard import tensors_of
from ..findings import Finding, several
from .trial import first_numbers

MULTIPLE, APART = 1024.0, 0.05  # a power of two, which rounds nothing; of the gradient's norm
LEAVES_OUT = (
    "an autograd.Function's backward gives back a gradient without the one that comes in: multiply by it, or a GradScaler and "
    "an accumulation weigh that part otherwise"
)
# of the median gradient over weight: of the loss at least, and of the answer at most
TAUGHT, UNTAUGHT = 1e-2, 1e-5
CANCELS = (
    "their share cancels on the way: a weight that is divided by itself (the one expert of a token, normalised), or a softmax over one; "
    "use it as it was before"
)
CUT = "look for codes that are looked up by argmin (straight-through: z + (q - z).detach()), rounding, sampling, detach or no_grad"


def scaled_back(trial: Any) -> Finding | None:
    """Where the loss goes through a backward of one's own: is the gradient of a multiple of the loss that multiple of its gradient? It is
    not where such a backward leaves out what comes in. Raises ValueError where two passes differ."""
    if not trial.has_own_backward:
        return None
    trained = {name: p for name, p in trial.model.named_parameters() if p.grad is not None and not p.grad.is_sparse}
    multiples = taught(trial, trial.again() * MULTIPLE, list(trained.values()))
    for (name, p), multiple in zip(trained.items(), multiples, strict=True):
        off = p.grad.float() - (0.0 if multiple is None else multiple.float() / MULTIPLE)
        if off.norm() > APART * p.grad.float().norm():
            message = f"of {MULTIPLE:g} times the loss the gradient of {name} is not {MULTIPLE:g} times its gradient"
            return Finding("starved_steps", "warning", name, message, LEAVES_OUT, MULTIPLE, APART)
    return None


def untaught_by_answer(trial: Any) -> Iterator[Finding]:
    """Where the loss has terms beside the answer's: matrices that it teaches, and whose gradient of the answer is nothing although they are in
    its graph; and inputs that the answer follows, and that no gradient of it comes back to. Raises ValueError where there is no such pass."""
    if not trial.has_other_terms:
        return
    if trial.probe.inputs is None:
        raise ValueError("the model was not called with a batch")
    args, kwargs = (
        [asking(v) for v in trial.probe.inputs[0]],
        {k: asking(v) for k, v in trial.probe.inputs[1].items()},
    )
    given = [t for t in tensors_of([args, kwargs]) if t.requires_grad]
    matrices = {
        n: p for n, p in trial.model.named_parameters() if p.ndim > 1 and p.grad is not None and not p.grad.is_sparse
    }
    answer = answer_of(trial, args, kwargs)
    if not matrices or not answer.requires_grad:
        raise ValueError("it has no gradient")
    wave = torch.arange(answer.numel(), device=answer.device).float().cos().view(answer.shape)
    wanted = [*matrices.values(), *given]
    gradients = taught(trial, (answer.float() * wave).sum(), wanted)
    mine = dict(zip(matrices, gradients, strict=False))
    if given and all(g is None or not g.any() for g in gradients[len(matrices) :]):
        yield from cut_off(trial, args, kwargs, answer, [name for name, g in mine.items() if g is None])
    # what a branch that ends in zeros holds is taught by it from the second update on
    if all(p.any() for p in matrices.values()):
        by_loss, by_answer = (shares(matrices, g) for g in ({n: p.grad for n, p in matrices.items()}, mine))
        if names := [n for n in by_answer if by_loss.get(n, 0.0) > TAUGHT and by_answer[n] < UNTAUGHT]:
            message = f"{len(names)} matrices are taught by other terms of the loss alone: of the answer itself their gradient is nothing: {several(names)}"
            yield Finding("no_gradient", "warning", names[0], message, CANCELS, round(by_answer[names[0]], 9), UNTAUGHT)


def cut_off(trial: Any, args: list, kwargs: dict, before: Tensor, names: list[str]) -> Iterator[Finding]:
    """Whether the answer follows what comes in."""
    others = (
        [disturbed(v) if is_asking(v) else v for v in args],
        {k: disturbed(v) if is_asking(v) else v for k, v in kwargs.items()},
    )
    if names and not torch.equal(answer_of(trial, *others), before):
        message = f"the answer follows what comes in, and no gradient of it comes back there: {several(names)} learn by other terms alone"
        yield Finding("no_gradient", "warning", names[0], message, CUT, len(names), 0)


def taught(trial: Any, root: Tensor, wanted: Sequence[Tensor]) -> list[Tensor | None]:
    """Their gradients by backward(), since a reentrant checkpoint gives none to torch.autograd.grad. The parameters keep what they had."""
    kept = [(p, p.grad) for p in trial.model.parameters()]
    trial.model.zero_grad(set_to_none=True)
    try:
        root.backward()
        return [t.grad for t in wanted]
    finally:
        for p, gradient in kept:
            p.grad = gradient


@torch.enable_grad()
def answer_of(trial: Any, args: list, kwargs: dict) -> Tensor:
    """In training, without dropout. Raises ValueError where there is none."""
    trial.spend()
    trial.state.put_back()
    return first_numbers(trial.training()(*args, **kwargs))


def asking(value: Any) -> Any:
    """A copy that takes a gradient, of numbers."""
    is_some = isinstance(value, Tensor) and value.is_floating_point() and value.ndim > 1
    return value.detach().clone().requires_grad_() if is_some else value


def is_asking(value: Any) -> bool:
    return isinstance(value, Tensor) and value.requires_grad


def shares(matrices: dict[str, Tensor], gradients: dict[str, Tensor | None]) -> dict[str, float]:
    """Gradient over weight of those that have one, over the median."""
    sizes = {
        n: float(g.float().norm() / matrices[n].detach().float().norm()) for n, g in gradients.items() if g is not None
    }
    usual = median(sizes.values()) if sizes else 0.0
    return {name: size / usual for name, size in sizes.items()} if usual else {}
