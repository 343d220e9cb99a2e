"""Healthy trainings that differ in the loop: precision, accumulation, averages, freezing, adapters, a teacher."""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator
from functools import cache, partial

import peft
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.optim import AdamW
from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn
from transformers import LlamaConfig, LlamaForCausalLM

from benchmarks.healthy_families import trained_on
from benchmarks.healthy_language import TinyGPT, language, next_token, schedule_free, sharpness_aware
from benchmarks.programs import Make, Program, Rows, own_loss, plain


def autocast(model: nn.Module, ids: Tensor) -> Tensor:
    with torch.autocast("cpu", torch.bfloat16):
        return next_token(model, ids)


def scaler(seed: int) -> Program:
    """A loss scaler, unscaled before clipping."""
    model, rows = TinyGPT(), Rows(seed, length=65)
    optimizer, scaling = AdamW(model.parameters(), lr=2e-3), torch.amp.GradScaler("cpu", init_scale=2.0**12)

    def step(i: int) -> Tensor:
        optimizer.zero_grad()
        loss = autocast(model, rows())
        scaling.scale(loss).backward()
        scaling.unscale_(optimizer)
        nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        scaling.step(optimizer)
        scaling.update()
        return loss.detach()

    return Program(model, [optimizer], step, (rows(), autocast))


def accumulation(seed: int, clear: str = "first") -> Program:
    """Four micro-batches an update; gradients are cleared first, or after the step, or set to None by hand."""
    model, rows = TinyGPT(), Rows(seed, batch=2, length=65)
    optimizer = AdamW(model.parameters(), lr=2e-3)

    def step(i: int) -> Tensor:
        if clear == "first":
            optimizer.zero_grad()
        losses = [next_token(model, rows()) / 4 for _ in range(4)]
        for loss in losses:
            loss.backward()
        nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        if clear == "after":
            model.zero_grad(set_to_none=False)
        if clear == "by hand":
            for p in model.parameters():
                p.grad = None
        return sum(losses).detach()

    return Program(model, [optimizer], step, (rows(), next_token))


def averaged(seed: int) -> Program:
    """An exponential average beside the model, inside of the module that is watched."""
    program = language(seed)
    both = nn.ModuleDict({"model": program.model})
    both["ema"] = AveragedModel(program.model, multi_avg_fn=get_ema_multi_avg_fn(0.99)).requires_grad_(False)

    def step(i: int) -> Tensor:
        loss = program.step(i)
        both["ema"].update_parameters(program.model)
        return loss

    frozen = tuple(name for name, p in both.named_parameters() if not p.requires_grad)
    examined = program.examined[0], lambda both, ids: next_token(both["model"], ids)
    return Program(both, program.optimizers, step, examined, {"expect_frozen": frozen})


def evaluated(seed: int) -> Program:
    """Every ten updates the loop evaluates, and goes back to training mode."""
    program, rows = language(seed, dropout=0.1), Rows(seed + 1, length=65)

    def step(i: int) -> Tensor:
        if i % 10 == 9:
            program.model.eval()
            with torch.no_grad():
                next_token(program.model, rows())
            program.model.train()
        return program.step(i)

    return program._replace(step=step)


def padded(seed: int) -> Program:
    """Texts of different lengths: the padding is masked, and the loss is a sum over the batch by the number of targets."""
    model, rows, lengths = TinyGPT(), Rows(seed, length=65), torch.Generator().manual_seed(seed)

    def batches() -> tuple[Tensor, Tensor]:
        ids = rows()
        outside = torch.arange(64) >= torch.randint(20, 65, (8, 1), generator=lengths)
        return ids[:, :-1].masked_fill(outside, 0), ids[:, 1:].masked_fill(outside, -100)

    def loss(model: nn.Module, batch: tuple[Tensor, Tensor]) -> Tensor:
        return F.cross_entropy(model(batch[0]).flatten(0, 1), batch[1].flatten())

    return plain(model, AdamW(model.parameters(), lr=2e-3), batches, loss)


def compiled(seed: int) -> Program:
    program = language(seed)
    model = torch.compile(program.model, backend="aot_eager")
    rows = Rows(seed, length=65)
    return plain(model, program.optimizers[0], rows, next_token)


def accelerated(seed: int) -> Program:
    from accelerate import Accelerator

    accelerator, rows, model = Accelerator(cpu=True), Rows(seed, length=65), TinyGPT()
    model, optimizer = accelerator.prepare(model, AdamW(model.parameters(), lr=2e-3))

    def step(i: int) -> Tensor:
        optimizer.zero_grad()
        loss = next_token(model, rows())
        accelerator.backward(loss)
        accelerator.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        return loss.detach()

    return Program(model, [optimizer], step, (rows(), next_token))


def gradual(seed: int) -> Program:
    """The head alone first; from update 20 on everything."""
    program = language(seed)
    head = [id(p) for p in (*program.model.head.parameters(), *program.model.norm.parameters())]
    frozen = [name for name, p in program.model.named_parameters() if id(p) not in head]

    def step(i: int) -> Tensor:
        for p in program.model.parameters():
            p.requires_grad_(i >= 20 or id(p) in head)
        return program.step(i)

    return Program(program.model, program.optimizers, step, options={"expect_frozen": frozen})


def double(seed: int) -> Program:
    program = language(seed)
    program.model.double()
    rows, optimizer = Rows(seed, length=65), AdamW(program.model.parameters(), lr=2e-3)
    return plain(program.model, optimizer, rows, next_token)


LOOPS: dict[str, Make] = {
    "autocast": partial(language, loss=autocast),
    "scaler": scaler,
    **{f"accumulation, cleared {when}": partial(accumulation, clear=when) for when in ("first", "after", "by hand")},
    "average beside the model": averaged,
    "dropout, evaluated every ten": evaluated,
    "padded texts": padded,
    "compiled": compiled,
    "accelerate": accelerated,
    "gradual unfreezing": gradual,
    "tied": partial(language, tied=True),
    "dropout": partial(language, dropout=0.1),
    "recomputed": partial(language, recomputed=True),
    "label smoothing": partial(language, loss=partial(next_token, label_smoothing=0.1)),
    "float64": double,
    "schedule-free": schedule_free,
    "sharpness-aware": sharpness_aware,
}


@cache
def base() -> LlamaForCausalLM:
    """A tiny Llama that has seen 150 batches of text."""
    torch.manual_seed(0)
    sizes = {"hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 2, "num_attention_heads": 4}
    model = LlamaForCausalLM(LlamaConfig(vocab_size=256, max_position_embeddings=128, **sizes, pad_token_id=0))
    rows = Rows(0)
    warm = trained_on(model, lambda: dict.fromkeys(("input_ids", "labels"), rows()), 4e-3)
    for i in range(150):
        warm.step(i)
    return model


def capitals(ids: Tensor) -> Tensor:
    """The same text in capitals: another domain, as fine-tuning has it."""
    return ids.where((ids < ord("a")) | (ids > ord("z")), ids - 32)


def adapted(config: Callable[[], peft.PeftConfig], lr: float, seed: int) -> Program:
    """The base under one of peft's adapters."""
    start, rows = copy.deepcopy(base()), Rows(seed)
    torch.manual_seed(seed)
    model = peft.get_peft_model(start, config()).train()
    optimizer = AdamW([p for p in model.parameters() if p.requires_grad], lr=lr)
    frozen = tuple(name for name, p in model.named_parameters() if not p.requires_grad)
    batches = lambda: dict.fromkeys(("input_ids", "labels"), capitals(rows()))  # noqa: E731
    return plain(model, optimizer, batches, own_loss, expect_frozen=frozen)


LINEARS = ["q_proj", "v_proj"]
ADAPTERS: dict[str, tuple[Callable[[], peft.PeftConfig], float]] = {
    "lora": (lambda: peft.LoraConfig(r=4, target_modules=LINEARS, task_type="CAUSAL_LM"), 1e-3),
    "lora, rank-stabilised": (lambda: peft.LoraConfig(r=8, use_rslora=True, target_modules=LINEARS), 1e-3),
    "lora, pissa": (lambda: peft.LoraConfig(r=4, init_lora_weights="pissa", target_modules=LINEARS), 1e-3),
    "lora and a saved head": (lambda: peft.LoraConfig(r=4, target_modules=LINEARS, modules_to_save=["lm_head"]), 1e-3),
    "dora": (lambda: peft.LoraConfig(r=4, use_dora=True, target_modules=LINEARS), 1e-3),
    "adalora": (lambda: peft.AdaLoraConfig(target_modules=LINEARS, total_step=100, init_r=6, target_r=4), 2e-3),
    "ia3": (lambda: peft.IA3Config(target_modules=["k_proj", "v_proj"], feedforward_modules=[]), 1e-2),
    "loha": (lambda: peft.LoHaConfig(r=4, target_modules=LINEARS), 1e-3),
    "lokr": (lambda: peft.LoKrConfig(r=4, target_modules=LINEARS), 1e-3),
    "oft": (lambda: peft.OFTConfig(oft_block_size=8, r=0, target_modules=LINEARS), 1e-3),
    "boft": (lambda: peft.BOFTConfig(boft_block_size=8, target_modules=LINEARS), 1e-3),
    "vera": (lambda: peft.VeraConfig(r=8, target_modules=LINEARS), 1e-2),
    "fourier": (lambda: peft.FourierFTConfig(n_frequency=100, target_modules=LINEARS), 1e-2),
    "layer norms": (lambda: peft.LNTuningConfig(task_type="CAUSAL_LM"), 1e-3),
    "prompt": (lambda: peft.PromptTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=8), 1e-2),
    "prefix": (lambda: peft.PrefixTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=8), 1e-2),
}


def fine_tuned(seed: int) -> Program:
    """The whole base, at a tenth of the rate that it was trained with."""
    rows = Rows(seed)
    return trained_on(copy.deepcopy(base()), lambda: dict.fromkeys(("input_ids", "labels"), capitals(rows())), 4e-4)


def distilled(seed: int) -> Program:
    """A student beside its frozen teacher, in one module."""
    teacher = language(seed)
    for i in range(100):
        teacher.step(i)
    both, rows = (
        nn.ModuleDict({"teacher": teacher.model.requires_grad_(False), "student": TinyGPT(32)}),
        Rows(seed, length=64),
    )

    def loss(both: nn.Module, ids: Tensor) -> Tensor:
        wanted, shown = (both[name](ids).log_softmax(-1).flatten(0, 1) for name in ("teacher", "student"))
        return F.kl_div(shown, wanted, log_target=True, reduction="batchmean")

    return plain(both, AdamW(both["student"].parameters(), lr=2e-3), rows, loss, expect_frozen=("teacher.",))


def programs() -> Iterator[tuple[str, Make]]:
    yield from ((f"loop {name}", make) for name, make in LOOPS.items())
    yield from ((f"adapter {name}", partial(adapted, *how)) for name, how in ADAPTERS.items())
    yield "fine-tuned", fine_tuned
    yield "distilled", distilled
