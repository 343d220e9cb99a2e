"""What happens between two updates, and to which gradients: do they arrive, pile up, go before the step, or serve twice?"""

import weakref
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from functools import partial
from typing import Any

from torch import Tensor, nn
from torch.optim import Optimizer
from torch.optim.optimizer import register_optimizer_step_pre_hook

from ..findings import grouped
from ..sampling import WHOLE, Waiting, plain
from ..torch_private import is_step_under_way
from .heard import tensors_of
from .listener import Listener
from .tracking import Tracked, held_by

KEPT, LOOKS = 20, 8  # updates of an optimizer that are looked back at, at most and at least
N_HEARD = 8  # optimizers that are listened to
OUTSIDE = "outside of the model"  # the name of what an optimizer holds and the model does not
ROUGH = 0.01  # relative: 16 bits round by less
Truth = bool | Tensor  # one bool, on its device until `fetch`


def part(tensor: Tensor) -> Tensor:
    values = plain(tensor)
    return values if values.numel() <= WHOLE else values.flatten()[:WHOLE]


def is_heard(t: Tracked) -> bool:
    """A trained leaf; of a sharded one another gets the gradient."""
    is_trained = t.owner and t.param.requires_grad and not t.is_master
    return bool(is_trained and t.param.is_leaf and not hasattr(t.param, "to_local"))


def is_smaller(gradient: Tensor, before: Tensor) -> Tensor:
    """Whether it is what it was, times a number below 1 and above 0."""
    size, was = gradient.abs().sum(), before.abs().sum()
    same = (gradient * was - before * size).abs().max() <= ROUGH * size * before.abs().max()
    return same & (size > 0) & (size < (1 - ROUGH) * was)


class Ear:
    """One small tensor, and what was heard there since the last update of its optimizer."""

    def __init__(self, t: Tracked):
        self.t, self.last, self.n = t, None, 2  # last: the gradient that the last pass left
        self.n_passes = 0  # backward, in all
        self.marks: dict[Optimizer, int] = {}  # those of other optimizers, at the last update of its own
        self.begin(is_heard=True)

    def begin(self, is_heard: bool) -> None:
        self.is_heard = is_heard  # up to the next update of its optimizer; else passes are counted alone
        self.several = self.n > 1  # in the last update: weights are kept only then
        self.n = self.n_others = 0  # backward passes, and updates of other optimizers
        self.clean: Truth = False  # whether a pass found nothing before it
        self.thrown: Truth = True  # … each but the first did, although one had come before, to the same weights
        self.some: Truth = False  # whether the last pass left something
        self.shrunk: Truth = False  # … found what had come before smaller, by one factor
        self.mixed: Truth = False  # a pass added to what one at other weights had left
        self.foreign: Truth = False  # a pass added to what was there before another optimizer stepped
        self.kept: tuple[Tensor, Tensor] | None = None  # of the weights and the gradient then
        self.is_told = False  # whether the present pass tells
        self.at = 0  # how many steps there had been before the last pass

    @property
    def nothing(self) -> Truth:
        """Whether no gradient is there now."""
        gradient = self.t.param.grad
        return gradient is None or ~part(gradient).any()


class Events(Listener):
    """Listens to the backward passes at two small tensors of each optimizer, and to all steps; what needs a look at numbers stays
    on its device until a check."""

    where, what = "gradients", "the order of backward passes and updates is not looked at"

    def __init__(self, model: nn.Module, tensors: Sequence[Tracked], waiting: Waiting) -> None:
        super().__init__()
        self.model, self.tensors, self.waiting = model, tensors, waiting
        self.n_losses = self.n_observed = 0  # since the last update, and in all: losses may come in bunches
        self.ears: list[Ear] = []
        # at tensors that had no gradient at the first step: does one come, and go before it?
        self.missed: list[Ear] = []
        self.watched: set[int] = set()  # ids of optimizers
        self.held: list[Callable] = []  # hooks
        self.for_all: Callable = ignore
        self.hook: Callable = ignore  # makes a hook of a function
        self.n_steps = 0  # of any optimizer
        # cleared gradients had a use: an optimizer that is not watched steps, or inputs get some, to be attacked by
        self.had_use = False
        self.by_turns = False  # a watched one stepped between another's passes, as a generator's
        # is it the model's own pass, or a child's → passes in training mode without and with gradients
        self.passes = {True: [0, 0], False: [0, 0]}
        self.looks: dict[int, deque[dict[str, list[bool]]]] = {}  # by optimizer, what its last updates were like

    def hooks(self, hook: Callable) -> Iterator[Any]:
        self.hook = hook
        mine = list(grouped(filter(is_heard, self.tensors), lambda t: id(t.optimizer)).values())[:N_HEARD]
        mine += [[t] for t in map(self.smallest_outside, [ts[0] for ts in mine]) if t]
        halves = [half for ts in mine for half in (ts[: len(ts) // 2], ts[len(ts) // 2 :]) if half]
        self.ears = [Ear(min(half, key=lambda t: t.param.numel())) for half in halves]
        yield from self.hung(self.ears)
        self.watched = {id(t.optimizer) for t in self.tensors}
        self.for_all = hook(self.any_step)
        LISTENING.add(self)
        attend()
        yield self.model.register_forward_pre_hook(hook(self.enters), with_kwargs=True)
        for module in (self.model, *self.model.children()):
            if any(p.requires_grad for p in module.parameters()):
                yield module.register_forward_hook(hook(partial(self.answers, module is self.model)))

    def smallest_outside(self, t: Tracked) -> Tracked | None:
        """Of its optimizer, what is none of the model's, such as a loss's own weights."""
        known = {id(of.param) for of in self.tensors}
        others = sorted((p for p in held_by([t.optimizer]) if id(p) not in known and p.numel()), key=Tensor.numel)
        return next(filter(is_heard, (Tracked(OUTSIDE, p, t.owner) for p in others)), None)

    def hung(self, ears: Sequence[Ear]) -> Iterator[Any]:
        for ear in ears:
            yield ear.t.param.register_hook(self.weakly(self.hook(partial(self.arrives, ear))))
            yield ear.t.param.register_post_accumulate_grad_hook(self.weakly(self.hook(partial(self.accumulated, ear))))

    def miss(self, tensors: Sequence[Tracked]) -> None:
        """Listen to some that had no gradient at a step, unless the listening has ended."""
        smallest = sorted(filter(is_heard, tensors), key=lambda t: t.param.numel())
        new = [Ear(t) for t in smallest[: N_HEARD - len(self.missed)]] if self.handles else []
        self.missed += new
        self.handles += self.hung(new)

    def weakly(self, hook: Callable) -> Callable:
        """What torch keeps outside of any garbage collector's reach must not keep a watch that was never closed, and its model."""
        self.held.append(hook)
        reference = weakref.ref(hook)
        return lambda *args: (hook := reference()) and hook(*args)

    def any_step(self, optimizer: Optimizer, args: tuple, kwargs: dict) -> None:
        self.n_steps += 1
        if id(optimizer) not in self.watched:
            self.had_use = True
            firsts = [group["params"][0] for group in optimizer.param_groups if group["params"]]
            # inside of one that is watched, as SAM's, or in its place
            if any(p is t.param for p in firsts for t in self.tensors):
                self.n_losses = 0

    def enters(self, module: nn.Module, args: tuple, kwargs: dict) -> None:
        self.had_use |= any(t.requires_grad for t in tensors_of([args, kwargs]))

    def answers(self, is_whole: bool, module: nn.Module, args: tuple, output: Any) -> None:
        learns = any(t.requires_grad for t in tensors_of([output]))
        self.passes[is_whole][learns] += module.training

    def arrives(self, ear: Ear, gradient: Tensor | None) -> None:
        """None comes of an autograd.Function that returns it; of sparse gradients nothing is told."""
        ear.is_told = gradient is not None and not gradient.is_sparse
        if not (ear.is_told and ear.is_heard):
            return
        nothing = ear.nothing
        ear.clean = ear.clean | nothing
        if ear.n and (ear.at != self.n_steps or ear.kept is None):  # a step came between: of another optimizer
            ear.thrown = False
            self.by_turns |= ear.at != self.n_steps
            ear.foreign = ear.foreign | (nothing ^ True) if ear.at != self.n_steps else ear.foreign
        elif ear.n and ear.thrown is not False:  # where the weights have moved, the gradient had its use, as in SAM
            ear.thrown = ear.thrown & ear.some & nothing & (part(ear.t.param) == ear.kept[0]).all()
        if ear.n and ear.at == self.n_steps and ear.kept and ear.t.param.grad is not None:
            ear.shrunk = ear.shrunk | is_smaller(part(ear.t.param.grad), ear.kept[1])
            ear.mixed = ear.mixed | ((nothing ^ True) & (part(ear.t.param) != ear.kept[0]).any())

    def accumulated(self, ear: Ear, p: Tensor) -> None:
        ear.n_passes += 1
        if ear.is_told:
            ear.n, ear.at, ear.last = ear.n + 1, self.n_steps, p.grad
        if ear.is_told and ear.is_heard:
            ear.some = p.grad is not None and part(p.grad).any()
            ear.kept = (part(p).clone(), part(p.grad).clone()) if ear.several and p.grad is not None else None

    @property
    def targets_move(self) -> bool:
        """Whether the loss need not fall: where something else may be trained against, or by, what is watched; and where the model's answers, made without gradients in training mode for half
        of its passes or more, may be its next data or targets, as an agent's."""
        without, learning = self.passes[any(self.passes[True])]
        return self.had_use or self.by_turns or (without > 0 and without >= learning / 2)

    def observe(self) -> None:
        self.n_losses, self.n_observed = self.n_losses + 1, self.n_observed + 1

    def before_update(self, optimizer: Optimizer, has_gradients: bool) -> None:
        """`has_gradients`: now, and not made in the step."""
        self.n_losses = 0
        mine, missed = ([e for e in ears if e.t.optimizer is optimizer] for ears in (self.ears, self.missed))
        if any(ear.is_heard for ear in mine):
            look = self.look(mine, missed, has_gradients)
            told: dict[str, list[bool]] = {kind: [] for kind in look}
            self.looks.setdefault(id(optimizer), deque(maxlen=KEPT)).append(told)
            for kind, truth in ((kind, truth) for kind, many in look.items() for truth in many):
                self.waiting.add(truth, told[kind].append)
        n_passes = self.n_passes()
        for ear in self.ears:
            ear.n_others += 1
        for ear in (*mine, *missed):
            ear.begin(self.waiting.is_heard)
            ear.marks = n_passes

    def n_passes(self) -> dict[Optimizer, int]:
        return {ear.t.optimizer: ear.n_passes for ear in self.ears}

    def has_own_passes(self, ear: Ear) -> bool:
        """Whether its optimizer had passes since its last update that another one, which had some, did not have."""
        others = [n - ear.marks.get(o, n) for o, n in self.n_passes().items() if o is not ear.t.optimizer]
        return any(0 < n < ear.n for n in others)

    def look(self, mine: Sequence[Ear], missed: Sequence[Ear], has_gradients: bool) -> dict[str, list[Truth]]:
        """What an update is like, by kind, at each ear that can tell."""
        heard = [ear for ear in mine if ear.n]
        look: dict[str, list[Truth]] = {
            "stale": [ear.clean ^ True for ear in heard if ear.t.name != OUTSIDE],
            "stale outside": [ear.clean ^ True for ear in heard if ear.t.name == OUTSIDE],
            "mixed": [ear.mixed for ear in heard],
            "foreign": [ear.foreign is not False and self.has_own_passes(ear) and ear.foreign for ear in heard],
        }
        if has_gradients and heard:
            look["gone"] = [ear.nothing & (ear.some if ear.n else True) for ear in mine]
            # a gradient that somebody put there may be made of all of them
            look["thrown"] = [ear.n > 1 and ear.t.param.grad is ear.last and ear.thrown for ear in heard]
            look["shrunk"] = [ear.shrunk for ear in heard]
        elif has_gradients:
            left = [ear for ear in mine if ear.t.param.grad is not None]
            look["twice"] = [ear.t.param.grad is ear.last and ear.nothing ^ True for ear in left]
        if missed:
            some: Truth = False
            for ear in (ear for ear in missed if ear.n):
                some = some | (ear.some & ear.nothing)
            look["some gone"] = [some]
        return look

    def share(self, kind: str, last: int = KEPT) -> list[float]:
        """Of each optimizer's last updates, the share that were of this kind; none before there are a few."""
        recent = [list(looks)[-last:] for looks in self.looks.values()]
        shares = [[bool(told := look.get(kind)) and all(told) for look in looks] for looks in recent]
        return [sum(share) / len(share) for share in shares if len(share) >= LOOKS]

    def forget(self) -> None:
        self.ears, self.missed, self.held = [], [], []
        self.for_all = self.hook = ignore
        LISTENING.discard(self)
        attend()


def ignore(*args: Any) -> None:
    """What a step calls before and after there is anybody to hear it."""


LISTENING: weakref.WeakSet[Events] = weakref.WeakSet()
HANDLES: list[Any] = []  # of the one hook for all optimizers' steps


def attend() -> None:
    """Hang that hook up with the first that listens, and take it down with the last; after a step that is under way, since torch
    may be going through such hooks."""
    if bool(LISTENING) != bool(HANDLES) and not is_step_under_way():
        if LISTENING:
            tell_all = lambda *args: any(events.for_all(*args) for events in list(LISTENING)) or None  # noqa: E731
            HANDLES.append(register_optimizer_step_pre_hook(tell_all))
        else:
            HANDLES.pop().remove()
