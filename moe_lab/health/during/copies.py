"""Copies that follow the weights, such as an average or a target network: do they come nearer, and do their statistics follow?"""

# Shapes: S sampled elements of a tensor, M tensors of one shape, C channels.

import weakref
from collections.abc import Callable, Sequence

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _NormBase

from ..before.structure import kind_of, lookalikes, trained_parts
from ..findings import grouped
from ..measures import ulp
from ..sampling import plain
from .forward import unwrapped
from .tracking import Tracked, storage

N_COPIES = 16  # weights whose copies are followed; whoever keeps some in 16 bits keeps all
BESIDE = 4  # copies followed of each: what an earlier run left behind looks like one
ALIKE = 0.3  # distance of a copy from the way that its weight has gone, over its size: any other tensor has about 1
AWAY = 8  # ULPs that an element of a copy lies from its weight before it is asked whether it comes nearer
ENOUGH = 500  # elements that far away, over all looks, before they are judged
LOOKS = 10  # looks at copies before one that never moves is judged
SEARCH = 10  # updates seen before norms beside the trained ones are looked for
CHANNELS = 8  # of a norm, at least: two vectors of fewer may point one way by accident
FOLLOWS = 0.7  # cosine between the way that weights go and that to the trained ones: any other's has about 0
# cosine between how far a model is behind and the way of the weights since the watch began: of averages it was 0.4 to 1, of what
# began elsewhere 0.2
ALONG = 0.3


def is_16_bit(tensor: Tensor) -> bool:
    return tensor.is_floating_point() and tensor.dtype.itemsize == 2


class Copies:
    """16-bit tensors beside trained ones, among all of the process: do they come nearer where they are written to?

    An average of decay d moves an element only where it lies more than ULP / 2(1 - d) away. So the elements that lie farthest
    are compared with those that lie less far: in exact numbers, or rounded stochastically, both come nearer by the same share.
    """

    def __init__(self) -> None:
        self.followed: list[tuple[weakref.ref, Tracked]] = []
        # by the weight, of each copy: itself, its sample and version, and the update of the last look
        self.before: dict[int, list[tuple]] = {}
        self.search_at = 1  # updates seen
        self.pairs: list[Tensor] = []  # (n, 2): ULPs away, and the share of the way made until the next look
        self.n_still = 0  # looks at copies that stood still altogether, though they were written to in each update

    def look(self, tracked: Sequence[Tracked], step: int, n_seen: int, living: Callable[[], list]) -> None:
        # or others are put in their place
        if n_seen >= self.search_at or any(copy() is None for copy, _ in self.followed):
            self.search_at = max(self.search_at, 10 * n_seen)
            # of subclasses nothing is known: they may have no memory
            near = [t for t in living() if type(t) in (Tensor, nn.Parameter) and is_16_bit(t)]
            self.followed = [(weakref.ref(copy), t) for copy, t in copies_of(tracked, near)]
        before, self.before = self.before, {}
        for reference, t in self.followed:
            copy = reference()
            here = sampled(copy, t)
            self.before.setdefault(id(t), []).append((reference, here, copy._version, step))
            earlier = before.get(id(t), [])
            # its own look, or that of one that is no more: it was put in its place
            last = [one for one in earlier if one[0] is reference] or [one for one in earlier if one[0]() is None]
            if last:
                was_in, was, version, then = last[0]
                gap = t.sample(t.param).float().cpu() - was
                away = gap.abs() / ulp(was, copy.dtype)
                far = away >= AWAY
                if (here != was).any():
                    self.pairs.append(torch.stack([away, (here - was) / gap], 1)[far])
                elif far.any():
                    self.n_still += was_in is not reference or copy._version - version >= step - then > 0

    def slowed(self) -> float | None:
        """By which factor what lies less far comes nearer than what lies farthest; None where too little is known."""
        if not self.pairs:
            return 0.0 if self.n_still >= LOOKS else None
        away, came = torch.cat(self.pairs).unbind(1)
        if len(away) < ENOUGH:
            return None
        order = came[away.argsort(descending=True)]
        fast, slow = order[: len(order) // 4].mean(), order[len(order) // 2 :].mean()
        return float(slow / fast) if fast > 0 else None


def copies_of(tracked: Sequence[Tracked], tensors: Sequence[Tensor]) -> list[tuple[Tensor, Tracked]]:
    """Those that lie on the way from where a trained matrix was to where it is, and are not its own memory: the nearest."""
    matrices = [t for t in tracked if t.owner and t.bank and t.param.ndim > 1 and not t.constant]
    by_shape = grouped(matrices, lambda t: tuple(t.param.shape))
    own, found = {storage(t.param) for t in tracked if t.owner}, []
    for tensor in (t for t in tensors if tuple(t.shape) in by_shape and t.layout is torch.strided and not t.is_meta):
        if tensor.untyped_storage().nbytes() and storage(tensor) not in own:
            found.append((*nearest_of(tensor, by_shape[tuple(tensor.shape)]), tensor))
    near = sorted((one for one in found if one[0] < ALIKE), key=lambda one: one[0])
    of_each = list(grouped(near, lambda one: id(one[1])).values())
    return [(tensor, t) for some in of_each[:N_COPIES] for _, t, tensor in some[:BESIDE]]


def nearest_of(copy: Tensor, candidates: Sequence[Tracked]) -> tuple[float, Tracked]:
    """How far it is from the way that a weight has gone, over its size, and which weight."""
    here = sampled(copy, candidates[0])  # (S,)
    places = [(t.bank(), t.bank().places[id(t)]) for t in candidates]
    start = torch.stack([bank.start[place] for bank, place in places]).float().cpu()  # (M, S)
    way = torch.stack([bank.last[place] for bank, place in places]).float().cpu() - start
    gone = ((here - start) * way).sum(1) / way.square().sum(1).clamp(min=1e-30)
    rest = (here - start - gone.clamp(0, 1).unsqueeze(1) * way).norm(dim=1) / here.norm().clamp(min=1e-30)
    least = int(rest.argmin())
    return float(rest[least]), candidates[least]


class Statistics:
    """Batch norms beside trained ones, among all of the process, whose weights follow theirs: do their means follow, too?"""

    def __init__(self, model: nn.Module) -> None:
        self.norms = [m for m in model.modules() if is_kept(m)]
        self.beside: list[weakref.ref] = []
        # by a norm's id, at the last look: its weight and mean, (C,)
        self.before: dict[int, tuple[Tensor, Tensor]] = {}
        self.search_at = SEARCH  # updates seen
        # by a norm's id: looks before which its weights had followed, and its mean had not
        self.left: dict[int, int] = {}

    def look(self, tracked: Sequence[Tracked], n_seen: int, living: Callable[[], list]) -> None:
        held = {id(t.param) for t in tracked if t.owner}
        trained = [m for m in self.norms if id(m.weight) in held]
        if trained and n_seen >= self.search_at:
            self.search_at = 10 * n_seen
            found = [m for m in living() if is_kept(m) and id(m.weight) not in held]
            self.beside = [weakref.ref(m) for m in found[:N_COPIES]]
        beside = [norm for norm in (reference() for reference in self.beside) if norm is not None]
        before = self.before
        self.before = now = {
            id(m): (here(m.weight), here(m.running_mean)) for m in (trained if beside else []) + beside
        }
        of = [id(m) for m in trained if id(m) in before and not torch.equal(before[id(m)][1], now[id(m)][1])]
        for key in (id(m) for m in beside if id(m) in before):
            (weight, mean), (now_at, now_mean) = before[key], now[key]
            goals = [now[m][0] - weight for m in of if now[m][0].shape == weight.shape]
            follows = max((float(torch.cosine_similarity(now_at - weight, goal, 0)) for goal in goals), default=0.0)
            if not torch.equal(mean, now_mean):
                self.left.pop(key, None)
            elif follows > FOLLOWS:
                self.left[key] = self.left.get(key, 0) + 1


class Followers:
    """Models beside the trained one, or beside the part of it that trains, of its class and shapes, whose weights go after its own: do they
    come from somewhere else?

    An average that began as the model's copy is behind along the way that the model goes. One that was made before a checkpoint was
    loaded into the model comes from another side.
    """

    def __init__(self, model: nn.Module) -> None:
        self.model, self.search_at = model, SEARCH
        self.beside: list[tuple[weakref.ref, nn.Module]] = []  # with what they look like
        # by a follower's id, at the last look: which matrices, and their samples beside the model's
        self.before: dict[int, tuple[list[int], list[tuple[Tensor, Tensor]]]] = {}
        # by its id, at each look: how far it is, over the weights' size, and which share of the way it made
        self.far: dict[int, list[tuple[float, float]]] = {}

    def look(self, tracked: Sequence[Tracked], n_seen: int, living: Callable[[], list]) -> None:
        if n_seen < self.search_at and not self.beside:
            return
        by_id = {id(t.param): t for t in tracked if t.owner and t.bank and t.param.ndim > 1 and not t.constant}
        if by_id and n_seen >= self.search_at:
            self.search_at = 10 * n_seen
            trained = {id(t.param) for t in tracked if t.owner and t.param.requires_grad}
            parts = trained_parts(unwrapped(self.model), trained)
            others = lookalikes(parts, living(), trained)
            self.beside = [(weakref.ref(m), parts[kind_of(m)]) for m in others[:BESIDE]]
        before, self.before = self.before, {}
        for other, part in ((other, part) for reference, part in self.beside if (other := reference()) is not None):
            mine = list(part.parameters())
            places = [n for n, p in enumerate(mine) if id(p) in by_id][:N_COPIES]
            ours = [by_id[id(mine[n])] for n in places]
            theirs = list(other.parameters())
            now = [(sampled(theirs[n], t), sampled(t.param, t)) for n, t in zip(places, ours, strict=True)]
            self.before[id(other)] = places, now
            earlier, samples = before.get(id(other), ([], []))
            if places and earlier == places:
                was = [torch.cat(side) for side in zip(*samples, strict=True)]
                here, there = (torch.cat(side) for side in zip(*now, strict=True))
                begun = torch.cat([t.bank().start[t.bank().places[id(t)]].float().cpu() for t in ours])
                gone, goal, away, way = here - was[0], was[1] - was[0], there - here, there - begun
                follows = torch.cosine_similarity(gone, goal, 0) > FOLLOWS
                if follows and torch.cosine_similarity(away, way, 0) < ALONG:
                    share = float(gone.norm() / goal.norm())
                    self.far.setdefault(id(other), []).append((float(away.norm() / there.norm()), share))


def sampled(p: Tensor, as_of: Tracked) -> Tensor:
    return plain(p.detach()).flatten()[as_of.index.to(p.device)].float().cpu()


def is_kept(module: object) -> bool:
    """Whether it keeps statistics, and has weights."""
    is_norm = isinstance(module, _NormBase) and module.running_mean is not None and module.weight is not None
    return is_norm and module.num_features >= CHANNELS and not module.weight.is_meta


def here(tensor: Tensor) -> Tensor:
    return plain(tensor.detach()).float().cpu().clone()
