"""What a watch knows of a training, and what its rules see."""

from collections import Counter
from collections.abc import Sequence

from torch import Tensor, nn
from torch.optim import Optimizer

from ..before.structure import copied
from ..findings import Finding, grouped
from ..measures import expected_start
from ..sampling import Waiting, number_of
from .bank import Bank, Gradients, banks_of
from .events import Events, attend
from .forward import ForwardProbe
from .intended import Replays
from .outside import Outside
from .ranks import Ranks
from .steps import Steps
from .tracking import HISTORY, GroupState, Tracked, held_by, lr_of, track

READ_EVERY = 5  # updates between looks at the gradients
MODES = 3  # such looks in a row that tell a mode
WINDOW = 200  # updates over which intended and realised displacement are compared, at most
PRETRAINED = 1.0  # nats below an untrained model's loss from which on a model has been trained before


class State:
    """The tensors and groups of a training with what was read of them, its losses, and what listens to it."""

    def __init__(
        self,
        model: nn.Module,
        optimizers: Sequence[Optimizer],
        budget: int | None,
        frozen_on_purpose: set[str],
        start_step: int,
        n_matrices: int,
        findings: Sequence[Finding],
    ):
        self.model, self.optimizers, self.budget = model, optimizers, budget
        self.frozen_on_purpose, self.start_step = frozen_on_purpose, start_step
        self.findings = findings  # made so far, by the watch
        self.tracked: list[Tracked] = []
        self.waiting, self.ranks = Waiting(), Ranks(model)
        self.events = Events(model, self.tracked, self.waiting)
        self.losses: list[float] = []  # the first HISTORY and at least as many of the last
        self.counts = Counter({id(o): start_step for o in optimizers})  # of the run's updates
        self.window_start = self.last_read = start_step
        self.gradients, self.steps = Gradients(self.waiting), Steps(self.waiting)
        self.replays = Replays(n_matrices, self.waiting)
        self.modes: list[bool] = []  # the last few times: whether any module was in training mode
        self.has_trained = False  # … it ever was
        # one of each kind that had gradients, and none at the last look: now each update is looked at
        self.quiet: list[Tracked] = []
        self.banks: list[Bank] = []
        self.groups: list[GroupState] = []
        self.signature: tuple = ()  # of what is trained: as long as it stays, so do the next four
        self.named: dict[str, nn.Parameter] = {}
        self.modules: dict[str, nn.Module] = {}
        self.n_parameters, self.is_whole = 0, True  # whether all of them train
        self.is_changed = False  # since the check before
        self.copied = copied(model, optimizers)
        self.follow()
        self.forward = ForwardProbe(model, not start_step)
        self.outside = Outside(model, self.waiting)

    # ---- what happens ------------------------------------------------------------------------------------------------

    def observe(self, loss: Tensor | float) -> None:
        self.waiting.add(number_of(loss), self.losses.append)
        self.events.observe()
        self.outside.reached.observe(loss)

    def before_update(self, optimizer: Optimizer, has_gradients: bool) -> Exception | None:
        """Returns why this optimizer's steps cannot be replayed, where that was found out now."""
        if not self.n_seen:  # weights may have been loaded since the watch was made: what moves counts from here
            self.banks = banks_of(self.tracked)
        self.counts[id(optimizer)] += 1
        self.events.before_update(optimizer, has_gradients)
        if optimizer is self.optimizers[0]:
            self.outside.before_update(self.counts[id(optimizer)] - self.start_step)
        for group in self.groups:
            if group.optimizer is optimizer:
                self.waiting.add(number_of(lr_of(group.group)), group.note_lr)
        for t in (t for t in self.quiet if t.optimizer is optimizer and t.param.grad is not None):
            t.note_gradient(self.waiting, self.counts[id(optimizer)])
        if self.counts[id(optimizer)] % READ_EVERY == 1:
            self.modes = [*self.modes[-MODES + 1 :], any(module.training for module in self.model.modules())]
            self.has_trained |= self.modes[-1]
        if not has_gradients:
            return None
        self.read_gradients(optimizer)
        error = self.replays.add(optimizer)
        self.steps.begin(optimizer, self.counts[id(optimizer)], self.replays.last)
        return error

    def after_update(self, optimizer: Optimizer, made_gradients: bool) -> None:
        attend()
        self.steps.end(optimizer)
        self.waiting.update = self.forward.heard.update = self.n_seen + 1
        if made_gradients:
            self.read_gradients(optimizer)

    def note_loaded(self, optimizer: Optimizer) -> None:
        """Called after a state was loaded: it may bring an old LR back."""
        for group in (g for g in self.groups if g.optimizer is optimizer):
            group.loaded |= not self.n_seen
            group.loaded_at = self.counts[id(optimizer)] - self.start_step

    def read_gradients(self, optimizer: Optimizer) -> None:
        n = self.counts[id(optimizer)]
        if n % READ_EVERY == 1:
            owners = (optimizer, None) if optimizer is self.optimizers[0] else (optimizer,)
            mine = [t for t in self.tracked if t.optimizer in owners]
            self.gradients.read(mine, optimizer, n)
            self.events.miss([t for t in mine if t.no_gradient == 1 and not t.with_gradient])

    def read(self) -> None:
        """Take in what is new, fetch what waits on the devices, and read the samples."""
        self.follow()
        self.waiting.fetch()
        self.forward.heard.fetch()
        if self.replays.was_wrong:
            self.restart_window()
        for bank in self.banks:
            bank.read(self.step)
        if self.n_seen:
            self.outside.look(self.tracked, self.step, self.n_seen, self.forward.longest)
        self.last_read = self.step
        mine = [t for t in self.tracked if t.owner and t.param.numel() > 1]
        silent = [t for t in mine if 0 < t.last_gradient <= self.counts[id(t.optimizer)] - READ_EVERY]
        self.quiet = [min(ts, key=lambda t: t.param.numel()) for ts in grouped(silent, lambda t: t.kind).values()]
        if len(self.losses) > 3 * HISTORY:
            del self.losses[HISTORY:-HISTORY]

    def follow(self) -> None:
        """Take in what is new: parameters that were unfrozen or given to an optimizer, and their groups."""
        named = dict(self.model.named_parameters())
        signature = (*map(id, held_by(self.optimizers)), *((id(p), p.requires_grad) for p in named.values()))
        self.is_changed = signature != self.signature
        if not self.is_changed:
            return
        self.signature, self.named, self.modules = signature, named, dict(self.model.named_modules())
        self.n_parameters = sum(p.numel() for p in named.values())
        self.is_whole = all(p.requires_grad for p in named.values())
        known = {(id(g.optimizer), g.number): g for g in self.groups}
        numbered = [(o, n) for o in self.optimizers for n in range(len(o.param_groups))]
        self.groups = [known.get((id(o), n)) or GroupState(o, n) for o, n in numbered]
        new = track(self.model, self.groups, self.tracked)
        for t in new:
            t.is_late = self.n_seen > 0
        self.tracked += new
        self.banks += banks_of(new)
        self.replays.choose(self.tracked)
        self.steps.choose(self.tracked)
        self.restart_window()

    def restart_window(self) -> None:
        self.window_start, self.replays.was_wrong = self.step, False
        for bank in self.banks:
            bank.restart_window()

    # ---- what is known -----------------------------------------------------------------------------------------------

    @property
    def step(self) -> int:
        """Updates of the run done."""
        return max(self.counts.values())

    @property
    def slowest(self) -> int:
        """The same of the optimizer with the fewest; one that has not stepped yet is not waited for."""
        return min((count for count in self.counts.values() if count > self.start_step), default=self.start_step)

    @property
    def n_seen(self) -> int:
        """Updates under this watch."""
        return self.step - self.start_step

    def is_passed_by(self, t: Tracked) -> bool:
        """Whether the optimizer holds another object than the model uses, in the same memory, and gradients reach the model's alone."""
        used = self.named.get(t.name, t.param)
        return used is not t.param and used.grad is not None and t.param.grad is None and not t.is_master

    @property
    def readings(self) -> list[Tracked]:
        return [t for bank in self.banks if bank.read_at is not None for t in bank.tensors]

    @property
    def expected_start(self) -> float | None:
        """Expected first loss of a language model whose head and embedding were found."""
        if self.forward.vocab_size is None or self.forward.logit_variance is None:
            return None
        return expected_start(self.forward.vocab_size, float(self.forward.logit_variance))

    @property
    def is_fresh(self) -> bool:
        """Whether the model looks newly initialised: its first loss is not far below an untrained model's. Where neither is
        known: its norms are."""
        if self.start_step:
            return False
        first = self.forward.heard.first_loss or next(iter(self.losses), None)  # the model's own, or as it is reported
        if first is not None and self.expected_start:
            return first > self.expected_start - PRETRAINED
        return self.has_new_norms is not False

    @property
    def has_new_norms(self) -> bool | None:
        """Whether most norms were constant when the watch began; None without norms."""
        owners = {f"{name}.weight" for name, module in self.modules.items() if "Norm" in type(module).__name__}
        norms = [t.constant for t in self.readings if t.name in owners]
        return sum(norms) > len(norms) / 2 if norms else None
