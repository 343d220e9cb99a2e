"""Rules about the step that arrives: its shape and its size by kind of tensor, and what decays."""

import math
from statistics import median

from torch import nn

from .intended import keeps_lost_bits
from .rule import Ill, by_kind, rule
from .rules_loss import BY_TABLE, SEEN_FALL, change, learning_rates
from .state import State
from .steps import decay_arrives, is_adam, kind_of, law_of, matrix_shape
from .tracking import LR_ACTED, LR_STEADY, GroupState, Tracked

TALLER = 1.2  # size of a tall matrix's step over a wide one's, or the reverse, from which on an orientation is meant
SAME_NORM = 1e-3  # relative spread of a clipped norm
SMALLEST_CLIP = 0.01  # a tenth of the least that anybody clips to
LOOKS = 4  # at the gradients, 5 updates apart
LATE = 50  # updates until which lost updates would have been found
TINY, HUGE = 1e-4, 0.3  # of a matrix's size that a step changes; 1e-3 is usual, healthy SGD was seen from 3e-4 on
BLOWN_UP = 2.0  # times the first loss
TRAVEL, PLANNED = 0.1, 1000  # of its size within the budget, that is too little; updates where no budget is known
SAME = {"lr_too_low", "lr_too_high"}  # what these say themselves
LEARNED_LITTLE = 0.05  # share of the first loss
STARVED = 0.2  # share of the smallest size that any convention gives an orthogonal step


def members(state: State, group: GroupState) -> list[Tracked]:
    return [t for t in state.tracked if t.owner is group and not t.is_master]


def laws(state: State) -> list[tuple[GroupState, list[Tracked]]]:
    """Groups with orthogonal steps, whose law was found once, and their matrices; convolutions are flattened on purpose."""
    kernels = (nn.modules.conv._ConvNd,)
    convolved = {id(p) for m in state.modules.values() if isinstance(m, kernels) for p in m.parameters(recurse=False)}
    found = []
    for group in state.groups if state.n_seen else ():
        matrices = [t for t in members(state, group) if t.param.ndim in (2, 3) and id(t.param) not in convolved]
        if matrices and group.law == "untried":
            group.law = law_of(group.optimizer, group.group)
        if matrices and group.law:
            found.append((group, matrices))
    return found


@rule(
    "the steps of {n} stacks of matrices are not orthogonal matrix by matrix: {names}: the gradient of one turns the others' steps",
    "orthogonalise over the last two dimensions, each expert's matrix by itself: neither over the stack's axis nor flattened",
)
def mixed_stack(state: State) -> Ill:
    return by_kind(t for group, ts in laws(state) if group.law.mixes for t in ts if t.param.ndim == 3)


@rule(
    "the optimizer scales {names} ({n}) as if inputs and outputs were the other way round",
    "give it fan-out over fan-in as the model uses the weight: x @ W has its outputs in W's columns, a linear layer in its rows",
)
def turned_factor(state: State) -> Ill:
    """The law makes tall matrices' steps larger, so takes rows for outputs, or the reverse; the graph says what is summed over."""
    linear = {id(m.weight) for m in state.modules.values() if isinstance(m, nn.Linear)}
    ill = []
    for group, matrices in laws(state):
        for t in (t for t in matrices if t.param.shape[-1] != t.param.shape[-2]):
            tall = 1.0 if group.law.mixes and t.param.ndim == 3 else group.law.tall[t.param.ndim]
            wrong = -2 if tall > TALLER else -1 if tall < 1 / TALLER else 0
            fan_in = -1 if id(t.param) in linear else state.forward.fan_ins.get(id(t.param))
            ill += [t] if fan_in == wrong else []
    return by_kind(ill)


@rule("{told}", "{cure}")
def starved_steps(state: State) -> Ill:
    """Gradients that arrive with one tiny norm; Adam's eps above its gradients; orthogonal steps smaller than any convention's."""
    found = {}
    norms = [math.sqrt(square) for square in state.gradients.squares.values()][-LOOKS:]
    apart = max(norms, default=0) - min(norms, default=0)  # 0: nothing changes any more, as where LBFGS has arrived
    if len(norms) == LOOKS and 0 < apart < SAME_NORM * max(norms) and max(norms) < SMALLEST_CLIP:
        told = f"the gradients of every update arrive with a norm of {norms[-1]:.2g}, neither more nor less"
        cure = "look for clipping before GradScaler.unscale_ (it sees scaled gradients), or a max_norm far too small"
        found["gradients"] = {"told": told, "cure": cure, "value": norms[-1], "limit": SMALLEST_CLIP}
    for group in state.groups if state.n_seen >= LR_STEADY else ():
        mine = members(state, group)
        sizes = [t.grad_norm / math.sqrt(t.param.numel()) for t in mine if t.grad_norm]
        eps = group.group.get("eps")
        if sizes and isinstance(eps, float) and median(sizes) < eps and is_adam(group.optimizer, group.group):
            told = f"{group.name}'s gradients have an RMS of {median(sizes):.1g}, below Adam's eps: steps are far below the LR"
            cure = "look for a loss that is divided or unscaled twice, a clip before unscale_, or an eps meant for another scale"
            found[group.name] = {"told": told, "cure": cure, "value": median(sizes), "limit": eps}
        kind, seen = kind_of(mine)
        # over the smallest factor of an orthogonal step that is in use: 1, or sqrt(A / B)
        steps = [(step.rms, *matrix_shape(t.param.shape)) for t, step in seen]
        shares = [rms * math.sqrt(max(a, b)) / min(1.0, math.sqrt(a / b)) for rms, a, b in steps]
        if kind == "orthogonal" and median(shares) < STARVED:
            told = f"{group.name}'s orthogonal steps are {1 / median(shares):.1f} times smaller than any convention makes them"
            cure = "a clip over all gradients after orthogonalisation shrinks what has a norm by construction: clip before it"
            found[group.name] = {"told": told, "cure": cure, "value": median(shares), "limit": STARVED}
    return found


def moved_by(state: State) -> float:
    """The largest step of a kind of matrix, relative to its weights at the start: RMS over RMS, by an update at the peak LR."""
    mine = [t for t in state.readings if t.owner and t.steps and t.weight_square and t.param.ndim > 1]
    sizes = [median(s.rms for s in t.steps) * t.owner.peak / math.sqrt(t.weight_square / t.n_elements) for t in mine]
    return max(sizes, default=math.nan)


@rule(
    "no kind of matrix moves by more than {value:.1e} of its size an update, and the loss has lost {fell:.1%}: usual is 1e-3",
    "raise the learning rate: one of Adam's is 10 to 1000 times too low for SGD; three short runs a factor of 10 apart tell",
    severity="warning",
)
def lr_too_low(state: State) -> Ill:
    """Whatever the optimizer and the model: steps so small that nothing gets anywhere within the budget, in a new model that has
    learned nothing, where nothing else is said that would explain it."""
    first, last, _ = change(state)
    moved, fell = moved_by(state), 1 - last / first if first > 0 else 1.0
    limit = min(TINY, TRAVEL / (state.budget or PLANNED))
    steady = bool(state.groups) and all(g.is_steady for g in state.groups)
    slow = moved < limit and fell < LEARNED_LITTLE and steady and state.is_whole and state.is_fresh
    return {"steps": {"value": moved, "limit": limit, "fell": fell}} if slow and not explained(state) else {}


@rule(
    "a step changes a kind of matrix by {value:.0%} of its size at the start, and the loss does not fall: usual is 0.1 %",
    "lower the learning rate by a factor of ten and more, or warm up",
    severity="warning",
)
def lr_too_high(state: State) -> Ill:
    """Where the loss does not fall, however much it jumps: of steps that large, it is they that are told. Nor is it a fall to come
    back from a blow-up to where an untrained model was."""
    (first, last, noise), moved, untrained = change(state), moved_by(state), next(iter(state.losses), 0.0)
    back = max(state.losses[:LR_STEADY], default=0.0) > BLOWN_UP * untrained and last > (1 - SEEN_FALL) * untrained > 0
    stopped = moved > HUGE and state.n_seen >= LR_ACTED and (back or last - first > -noise)
    return {"steps": {"value": moved, "limit": HUGE}} if stopped and not explained(state) else {}


def explained(state: State) -> bool:
    """Whether something else was said that would explain the size of steps, or the table of usual learning rates will say it."""
    by_table = any(learning_rates(state, name) for name in BY_TABLE)
    return by_table or any(f.severity != "info" and f.rule not in SAME for f in state.findings)


@rule(
    "weight decay never arrives in {n} tensors of 16 bits: each step of it is below half a unit in the last place: {names}",
    "let it be part of the update that is rounded stochastically or kept in masters, or keep the parameters in float32",
)
def lost_decay(state: State) -> Ill:
    """Where updates are lost as well, that is the finding: this is asked first only of what says that it keeps lost bits."""
    ill, lost = [], "lost_updates" in {f.rule for f in state.findings}
    for group in (g for g in state.groups if g.n >= LR_STEADY and g.is_steady):
        narrow = [t for t in members(state, group) if t.is_narrow]
        late = group.n >= LATE
        if narrow and group.decays == "untried":
            group.decays = decay_arrives(group.optimizer, group.group, narrow[0].param.dtype, group.peak)
        ill += narrow if group.decays is False and (keeps_lost_bits(group.optimizer) or (late and not lost)) else []
    return by_kind(ill)


RULES = (mixed_stack, turned_factor, starved_steps)
SIZES = (lr_too_low, lr_too_high)  # asked when nothing else explains them
