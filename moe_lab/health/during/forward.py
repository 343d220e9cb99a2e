"""What can be learned from forward passes: the vocabulary, the logits' variance at the start, and who has a say at all."""

from collections.abc import Callable, Iterator, Mapping
from contextlib import nullcontext
from typing import Any

import torch
from torch import Tensor, nn
from torch.func import functional_call

from ..choices import Taken
from ..random_state import RandomState
from ..torch_private import fan_ins, is_elsewhere, nearest_leaves, uncompiled
from .heard import Heard, tensors_of
from .listener import Hook, Listener

TAKERS = (nn.Linear, nn.modules.conv._ConvNd, nn.RNNBase, nn.RNNCellBase)  # whose weights are drawn for numbers about 1
VARIANCE_ROWS = 256  # logits of as many positions: the variance is good to 1 %


class Unrepeatable(Exception):
    """The model's own code may not be made for a pass of this kind."""


class ForwardProbe(Listener):
    """Listens to a model's forward passes, and can repeat the last one with a tensor changed."""

    where = "the forward pass"
    what = "forward passes are no longer listened to: the first loss and missing gradients are judged by less"

    def __init__(self, model: nn.Module, is_new: bool):
        super().__init__()
        self.model = model
        self.inputs: tuple[tuple, dict] | None = None
        self.in_training = False  # the mode in which they came
        self.precision: dict[str, Any] = {}  # the autocast under which they came
        self.logit_variance: Tensor | None = None
        # what takes a part of the batch as it came, and that part's size
        self.raw: dict[nn.Module, Tensor | float] = {}
        self.given: set[int] | None = None  # where the tensors of the present pass's input lie
        self.last: set[int] = set()  # ids of the parameters of the last layers
        self.fan_ins: dict[int, int] = {}  # which dimension of a weight the first pass sums over, by its id
        self.answers: dict[tuple[Tensor, ...], bool | None] = {}  # of `matters`: they stand when the inputs are gone
        # of those, what the repeated pass is known to be about, and nothing that it keeps
        self.told: set[Tensor] = set()
        # on the modules by the last pass that was repeated: a loss term, for somebody to add
        self.left: list[Tensor] = []
        self.unused: set[Tensor] = set()  # … and what no pass takes, or in vain
        self.untried: dict[str, str] = {}  # what was asked of repeated passes → why that cannot be told
        self.uncalled: dict[nn.Module, Any] = {}  # owners of parameters, with the hook that waits for their first call
        linears = [m for m in model.modules() if isinstance(m, nn.Linear)]
        embeddings = [m for m in model.modules() if isinstance(m, nn.Embedding)]
        # the token table has a head of its shape; a table of positions may be longer
        tables = [m for m in embeddings if m.weight.shape in {head.weight.shape for head in linears}]
        self.is_language_model = bool(tables)
        self.table = max(tables or embeddings, key=lambda m: m.num_embeddings, default=None)
        self.vocab_size = self.table and self.table.num_embeddings
        head = head_of(model, self.table)
        self.head = head if is_new else None  # a trained model's variance says nothing about a first loss
        self.heard = Heard(model, self.table, head)

    def hooks(self, hook: Callable) -> Iterator[Any]:
        yield self.model.register_forward_pre_hook(hook(self.keep_inputs), with_kwargs=True)
        if self.head is not None:
            yield self.head.register_forward_hook(hook(self.keep_variance))
        if self.table is not None:
            yield self.table.register_forward_pre_hook(hook(self.keep_ids))
            yield from self.heard.hooks(hook)
        for module in (m for m in (self.model, self.head) if m is not None):  # a compiled one may have no len()
            yield module.register_forward_hook(hook(self.keep_fan_ins))
        modules = [] if any(map(is_elsewhere, self.model.modules())) else self.model.modules()
        for module in (m for m in modules if next(m.parameters(recurse=False), None) is not None):
            self.uncalled[module] = module.register_forward_pre_hook(hook(self.note_call))
            yield self.uncalled[module]

    def note_call(self, module: nn.Module, args: tuple) -> None:
        """Of the first call of each; and the size of what a matrix is given as it came, in its largest feature."""
        self.uncalled.pop(module).remove()
        if self.inputs is None or not isinstance(module, TAKERS):
            return
        if self.given is None:
            self.given = set(map(memory, tensors_of([*self.inputs[0], *self.inputs[1].values()]))) - {0}
        for x in (x for x in tensors_of(args)[:1] if x.ndim > 1 and x.is_floating_point() and memory(x) in self.given):
            features = x.detach().float().transpose(-1, 1 if hasattr(module, "kernel_size") else -1)
            self.raw[module] = features.flatten(0, -2).square().mean(0).amax().sqrt()

    def sizes(self) -> dict[nn.Module, float]:
        """Of `raw`, fetched once."""
        self.raw = {module: float(size) for module, size in self.raw.items()}
        return self.raw

    def keep_inputs(self, module: nn.Module, args: tuple, kwargs: dict) -> None:
        self.inputs, self.given = (tuple(map(detached, args)), {k: detached(v) for k, v in kwargs.items()}), None
        self.in_training = module.training
        kind = next((p.device.type for p in self.model.parameters()), "cpu")
        self.precision = {"device_type": kind, "enabled": torch.is_autocast_enabled(kind)}
        self.precision["dtype"] = torch.get_autocast_dtype(kind)

    def keep_ids(self, module: nn.Module, args: tuple) -> None:
        """Models trained through a method of their own (`model.losses(ids)`) never run the hook above."""
        is_news = self.inputs is None or (module.training and not self.in_training)
        if is_news and args and isinstance(args[0], Tensor) and args[0].ndim == 2:
            self.inputs, self.in_training = ((args[0].detach(),), {}), module.training

    def keep_fan_ins(self, module: nn.Module, args: tuple, output: Any) -> None:
        for tensor in () if self.fan_ins else tensors_of(output):
            self.fan_ins |= fan_ins(tensor)
            self.last |= nearest_leaves(tensor)

    def keep_variance(self, module: nn.Module, args: tuple, output: Any) -> None:
        """Of the first head's first output, once, from some of its rows: all logits in float32 may not fit."""
        if self.logit_variance is None and isinstance(output, Tensor):
            rows = output.detach().reshape(-1, output.shape[-1])
            rows = rows[:: max(1, len(rows) // VARIANCE_ROWS)][:VARIANCE_ROWS]
            self.logit_variance = rows.float().var(dim=-1).mean()

    @property
    def longest(self) -> int:
        """Tokens of a sequence of the last input, 0 where none was kept."""
        args, kwargs = self.inputs or ((), {})
        return max((t.shape[1] for t in tensors_of([*args, *kwargs.values()]) if t.ndim > 1), default=0)

    def matters(self, *params: Tensor) -> bool | None:
        """Whether changing all of `params` changes the model's output for the last input; None where no pass can be repeated."""
        if self.inputs is not None and params not in self.answers:
            self.answers[params] = self.tried("whether tensors without a gradient matter", self.try_changed, params)
        return self.answers.get(params)

    def tried(self, what: str, ask: Callable, *args: Any) -> Any:
        """The answer; None where the pass could not be repeated: why is kept, to be told."""
        try:
            return ask(*args)
        except Unrepeatable as error:
            self.untried[what] = f"its pass could not be repeated: {error}"
            return None

    def try_changed(self, params: tuple[Tensor, ...]) -> bool | None:
        """A choice that is made in training alone has no say in evaluation. None, too, where two passes differ by themselves."""
        model = unwrapped(self.model)
        names = {p: name for name, p in model.named_parameters()}
        if is_sharded(model) or not names.keys() >= set(params):
            return None
        same, changed = {names[p]: p for p in params}, {names[p]: disturbed(p) for p in params}
        with Taken() as taken:
            before = tensors_of(self.repeat(same))
        left = self.left
        again, after = (tensors_of(self.repeat(values)) for values in (same, changed))
        for p in params:
            owner = model.get_submodule(names[p].rpartition(".")[0])
            # a pass of another kind may take it, if it is not known that none calls its module, or that this one does
            if owner in self.uncalled or any(id(q) in taken.ids for q in owner.parameters()):
                self.told |= {p} if not differ(left, self.left) else set()
                self.unused |= {p} if id(p) not in taken.ids else set()
        return None if differ(before, again) else differ(before, after)

    @torch.no_grad()
    def repeat(self, changed: Mapping[str, Tensor], exact: bool = False) -> Any:
        """What the model answers to the last input, with other tensors under these names: in the mode and the precision of the
        training (`exact`: without autocast), with its random numbers held, copies in place of the buffers, and what its modules
        keep put back: a backward pass that is still to come must find all as it was. Raises Unrepeatable where the model raises."""
        model = unwrapped(self.model)
        random_state = RandomState([*model.parameters(), *model.buffers()])
        kept = [(module, dict(vars(module))) for module in model.modules()]
        tensors = [t for _, held in kept for t in held.values() if isinstance(t, Tensor)]
        values = [(t, t.clone(), t._version) for t in tensors]
        copies = {key: buffer.clone() for key, buffer in model.named_buffers()}
        precision = {**self.precision, "enabled": False} if exact else self.precision
        Hook.is_repeating = True
        try:
            with torch.autocast(**precision) if self.precision else nullcontext():
                return functional_call(model, {**copies, **changed}, *self.inputs)
        except Exception as error:
            raise Unrepeatable(f"{type(error).__name__}: {' '.join(str(error).split())[:200]}") from error
        finally:
            Hook.is_repeating = False
            left = [v for module, _ in kept for v in vars(module).values()]
            left = [t for v in left for t in (v if isinstance(v, list | tuple) else [v])]  # no iterator may be begun
            self.left = [t.detach() for t in left if isinstance(t, Tensor)]
            random_state.put_back()
            for module, held in kept:
                vars(module).clear()
                vars(module).update(held)
            for tensor, value, version in values:
                if tensor._version != version:
                    tensor.copy_(value)

    def forget(self) -> None:
        self.heard.forget()
        self.inputs, self.left, self.uncalled = None, [], {}


def head_of(model: nn.Module, table: nn.Embedding | None) -> nn.Linear | None:
    """As many hidden units as tokens make no head: that is tied to the table, or the least deep, or the last; of several in a list,
    which foretell further tokens, the first."""
    of = {m: name for name, m in model.named_modules() if isinstance(m, nn.Linear) and table is not None}
    heads = [m for m in of if m.out_features == table.num_embeddings]
    last = min(reversed(heads), key=lambda m: (m.weight is not table.weight, of[m].count(".")), default=None)
    parent = "" if last is None else of[last].rpartition(".")[0]
    several = last is not None and isinstance(model.get_submodule(parent), nn.ModuleList)
    return next(m for m in heads if of[m].rpartition(".")[0] == parent) if several else last


def disturbed(param: Tensor) -> Tensor:
    """Other values: negated, turned by a place, and with a wave added, since a number added to a score changes no order."""
    wave = torch.arange(param.numel(), device=param.device, dtype=torch.float32).cos().view(param.shape)
    size = param.detach().float().square().mean().sqrt()
    return -param.detach().flatten().roll(1).view(param.shape) + (wave * (0.1 + 0.1 * size)).to(param.dtype)


def differ(some: list[Tensor], others: list[Tensor]) -> bool:
    return len(some) != len(others) or any(not torch.equal(a, b) for a, b in zip(some, others, strict=True))


def memory(tensor: Tensor) -> int:
    """Where it lies; 0 of what is sparse, spread over devices, or of another class of its own."""
    is_plain = type(tensor) in (Tensor, nn.Parameter) and tensor.layout is torch.strided
    return tensor.untyped_storage().data_ptr() if is_plain else 0


def detached(value: Any) -> Any:
    """Without its graph, which would stay in memory."""
    return value.detach() if isinstance(value, Tensor) else value


def unwrapped(model: nn.Module) -> nn.Module:
    """The model inside of what runs it on several devices, whose forward pass waits for the other processes, or compiled."""
    is_parallel = isinstance(model, nn.DataParallel | nn.parallel.DistributedDataParallel)
    inner = model.module if is_parallel else uncompiled(model)
    return model if inner is model else unwrapped(inner)


def is_sharded(model: nn.Module) -> bool:
    """Whether a forward pass gathers weights from other processes, which may not be running one now."""
    kinds = {type(module).__name__ for module in model.modules()}
    return "FullyShardedDataParallel" in kinds or any(hasattr(p, "to_local") for p in model.parameters())
