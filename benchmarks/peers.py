"""What `make bench` puts side by side: a pair of calls for each work, ours and the peer's, of equal shapes and objectives.

Each maker takes the dtype to compute in and, where the work has sizes, one of them. Everything is drawn from one seed.
"""

from __future__ import annotations

import contextlib
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterator, Mapping
from functools import partial
from pathlib import Path
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from benchmarks.measure import seconds
from benchmarks.record import FIRST, tree_of
from moe_lab import build_model, load_config
from moe_lab.config import ROOT, Config, ModelConfig
from moe_lab.model.mamba import Mamba
from moe_lab.optim import build_optimizers

B, T = 8, 256  # sequences of a batch, tokens of each
MIXTRAL = ModelConfig(
    vocab_size=4096, d_model=256, n_layers=6, n_heads=8, n_kv_heads=2, max_seq_len=2 * T, moe_layers=tuple(range(6)),
    n_experts=8, moe_top_k=2, d_ff_expert=352, moe_router_hidden=0, n_pred_tokens=1, aux_loss_weights=(1.0,),
)  # fmt: skip


class Pair(NamedTuple):
    ours: Callable[[], object]
    peer: Callable[[], object]
    peer_kind: str = ""  # which of the peer's ways was the fastest


def lab() -> Config:
    return load_config(ROOT / "configs" / "lab.yaml")


def training_step(loss_of: Callable[[], Tensor], dtype: str, model: nn.Module) -> None:
    """Forward and backward, without an optimizer. Gradients are dropped, as a step does."""
    with torch.autocast("cpu", torch.bfloat16, enabled=dtype == "bfloat16"):
        loss = loss_of()
    loss.backward()
    model.zero_grad(set_to_none=True)


def fastest(calls: Mapping[str, Callable[[], object]]) -> tuple[str, Callable[[], object]]:
    """The one of the peer's ways that takes the least time here."""
    name = min(calls, key=lambda name: min(seconds(calls[name]) for _ in range(2)))
    return name, calls[name]


def mixtral_twin(experts: str) -> nn.Module:
    from transformers import MixtralConfig, MixtralForCausalLM

    ours = MIXTRAL
    sizes = {"vocab_size": ours.vocab_size, "hidden_size": ours.d_model, "intermediate_size": ours.d_ff_expert}
    sizes |= {"num_hidden_layers": ours.n_layers, "num_attention_heads": ours.n_heads, "sliding_window": None}
    sizes |= {"num_key_value_heads": ours.n_kv_heads, "max_position_embeddings": ours.max_seq_len}
    sizes |= {"num_local_experts": ours.n_experts, "num_experts_per_tok": ours.moe_top_k}
    ways = {"experts_implementation": experts, "attn_implementation": "sdpa", "output_router_logits": True}
    return MixtralForCausalLM(MixtralConfig(**sizes, **ways, bos_token_id=None, eos_token_id=None, pad_token_id=0))


def mixtral_step(dtype: str) -> Pair:
    ids = torch.randint(MIXTRAL.vocab_size, (B, T + 1))
    model = build_model(MIXTRAL)
    calls = {}
    for experts in ("eager", "grouped_mm"):  # batched_mm would gather gigabytes of weights for 2048 tokens
        twin = mixtral_twin(experts).train()
        loss_of = partial(lambda twin, ids: twin(ids, labels=ids, use_cache=False).loss, twin, ids[:, :-1])
        calls[experts] = partial(training_step, loss_of, dtype, twin)
    ours = partial(training_step, lambda: sum(model.losses(ids).values()), dtype, model)
    name, peer = fastest(calls)
    return Pair(ours, peer, name)


def generation(dtype: str) -> Pair:
    ids = torch.randint(MIXTRAL.vocab_size, (1, T))
    kind = getattr(torch, dtype)
    model = build_model(MIXTRAL).eval().to(kind)
    calls = {}
    for experts in ("eager", "grouped_mm", "batched_mm"):
        twin = mixtral_twin(experts).eval().to(kind)
        twin.config.output_router_logits = False
        greedy = {"max_new_tokens": T, "min_new_tokens": T, "do_sample": False}
        calls[experts] = partial(twin.generate, ids, attention_mask=torch.ones_like(ids), **greedy)
    name, peer = fastest(calls)
    return Pair(partial(model.generate, ids, T, temperature=0), peer, name)


def muon(dtype: str) -> Pair:
    """The tensors that the default run gives to Muon; the peer has each matrix of a stack as a parameter of its own."""
    config = lab()
    ours = build_optimizers(build_model(config.model), config.optimizer, config.training.max_lr)[0]
    params = [p for group in ours.param_groups for p in group["params"]]
    for p in params:
        p.grad = torch.randn_like(p)
    twins = []
    for p in params:
        for matrix, grad in zip(p.detach().view(-1, *p.shape[-2:]), p.grad.view(-1, *p.shape[-2:]), strict=True):
            twins.append(nn.Parameter(matrix.clone()))
            twins[-1].grad = grad.clone()
    return Pair(ours.step, torch.optim.Muon(twins, lr=config.training.max_lr).step)


def mamba(dtype: str, length: int) -> Pair:
    """A block over 4096 tokens, forward and backward, in windows of `length`. The peer's slow path is what a CPU gets."""
    from transformers import MambaConfig
    from transformers.models.mamba.modeling_mamba import MambaMixer

    x = torch.randn(4096 // length, length, 192, requires_grad=True)
    block = Mamba(ModelConfig(d_model=192, ssm_state_dim=8))
    twin = MambaMixer(MambaConfig(hidden_size=192, state_size=8, num_hidden_layers=1), 0)
    for p in [*block.parameters(), *twin.parameters()]:
        nn.init.normal_(p, std=0.02)
    ours = partial(training_step, lambda: block(x)[0].float().sum(), dtype, block)
    return Pair(ours, partial(training_step, lambda: twin(x).float().sum(), dtype, twin))


def heads(dtype: str) -> Pair:
    """Four heads over a wide vocabulary, 1024 tokens, on a trunk of one small layer, which both have."""
    config = ModelConfig(
        vocab_size=50257, d_model=256, n_layers=1, n_heads=4, n_kv_heads=4, d_ff=256, max_seq_len=T,
        n_pred_tokens=4, aux_loss_weights=(1.0, 1.0, 1.0, 1.0),
    )  # fmt: skip
    model, ids = build_model(config), torch.randint(config.vocab_size, (4, T + 1))

    def plain() -> Tensor:
        hidden = model.trunk(ids[:, :-1]).hidden
        total: Tensor | float = 0.0
        for k, head in enumerate(model.lm_heads):
            logits = head(hidden[:, : T - k]).float()
            total = total + F.cross_entropy(logits.flatten(0, 1), ids[:, 1 + k :].flatten()) / 4
        return total

    ours = partial(training_step, lambda: sum(model.losses(ids).values()), dtype, model)
    return Pair(ours, partial(training_step, plain, dtype, model))


# ---- against an older commit, whose moe_lab lives in this process beside the present one ----


def taken_out() -> dict[str, object]:
    """The modules of the moe_lab that is active, no longer so."""
    names = [name for name in sys.modules if name.split(".")[0] == "moe_lab"]
    return {name: sys.modules.pop(name) for name in names}


class Tree:
    """A checkout's own moe_lab: within its context, `import moe_lab` means that one."""

    def __init__(self, folder: Path):
        self.folder, self.modules = folder, {}

    @contextlib.contextmanager
    def active(self) -> Iterator[None]:
        present = taken_out()
        sys.modules.update(self.modules)
        sys.path.insert(0, str(self.folder))
        try:
            yield
        finally:
            sys.path.remove(str(self.folder))
            self.modules = taken_out()
            sys.modules.update(present)

    def call(self, function: Callable[[], object]) -> Callable[[], object]:
        def within() -> None:
            with self.active():
                function()

        return within


def begun_trainer(folder: Path, dtype: str):
    """A trainer of the checkout's own configs/lab.yaml that has begun."""
    from moe_lab import Trainer, load_config

    config = load_config(folder / "configs" / "lab.yaml", overrides=[f"precision.compute={dtype}"])
    trainer = Trainer(config, tempfile.mkdtemp(prefix="moe_lab_bench_"))
    trainer.start() if hasattr(trainer, "start") else trainer.opened().__enter__()
    trainer.model.train()
    return trainer


def with_older(dtype: str, work: Callable) -> Pair:
    """`work` of a trainer of this checkout, and of one of the first commit's."""
    old = Tree(tree_of(ROOT, FIRST))
    with old.active():
        trainer = begun_trainer(old.folder, dtype)
    return Pair(partial(work, begun_trainer(ROOT, dtype)), old.call(partial(work, trainer)))


def default_step(dtype: str) -> Pair:
    return with_older(dtype, lambda trainer: trainer.update())


def evaluation(dtype: str) -> Pair:
    """The whole validation split, as at step 0."""

    def again(trainer) -> None:
        trainer.evaluated = set() if isinstance(trainer.evaluated, set) else -1
        trainer.evaluate_if_due()

    return with_older(dtype, again)


def imports(dtype: str) -> Pair:
    """Health imports what it is asked for when it is asked, torch too: the name alone would cost less than torch."""

    def process(statement: str) -> None:
        subprocess.run([sys.executable, "-c", statement], check=True, cwd=ROOT)

    return Pair(
        partial(process, "from moe_lab import health; health.Watch, health.preflight"), partial(process, "import torch")
    )
