"""What notebook 08 trains: tiny models of transformers on the lab's own text, and what it reads off the runs."""

from __future__ import annotations

import logging
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch

for noisy in ("torchao", "torch.utils._pytree"):  # what libraries say of each other when they are imported
    logging.getLogger(noisy).setLevel(logging.ERROR)

from moe_lab.connect import hf  # noqa: E402
from moe_lab.course.notebook import Lab  # noqa: E402
from moe_lab.data import prepare  # noqa: E402
from moe_lab.health import HealthCallback  # noqa: E402

transformers = hf.transformers  # where it is missing, that room says what to install
transformers.logging.set_verbosity_error()
transformers.utils.logging.disable_progress_bar()


class Texts(hf.Windows):
    """Windows of the profile's own text, each 32 tokens long; item n is the n-th of a run."""

    def __init__(self, lab: Lab):
        self.dataset = prepare(lab.config.data, lab.config.model, progress=False)
        small = {"model": {"max_seq_len": 31, "vocab_size": self.dataset.vocab_size}, "training": {"steps": 200}}
        super().__init__(self.dataset.train, lab.config.with_(**small))
        self.vocab_size = self.dataset.vocab_size


def usual(lab: Lab) -> dict[str, Any]:
    """Options of every run: a hundred updates of four windows at a rate that trains, logged each, and nothing written."""
    options = {"output_dir": tempfile.mkdtemp(), "max_steps": 100, "per_device_train_batch_size": 4}
    options |= {"learning_rate": 2e-3, "warmup_steps": 10, "logging_steps": 1, "seed": lab.config.training.seed}
    options |= {"save_strategy": "no", "report_to": [], "disable_tqdm": True, "log_level": "error"}
    return options | {"train_sampling_strategy": "sequential", "use_cpu": lab.device.type == "cpu"}


def quiet(trainer: transformers.Trainer) -> transformers.Trainer:
    trainer.remove_callback(transformers.PrinterCallback)
    return trainer


SIZES = {"n_layer": 2, "n_head": 4, "n_embd": 64, "n_positions": 64, "bos_token_id": 0, "eos_token_id": 0}


def gpt2(vocab_size: int, kind: type = transformers.GPT2LMHeadModel) -> torch.nn.Module:
    """Two layers of width 64, untied, with start values of seed 0 and no dropout."""
    torch.manual_seed(0)
    off = dict.fromkeys(("resid_pdrop", "embd_pdrop", "attn_pdrop"), 0.0)
    return kind(transformers.GPT2Config(vocab_size=vocab_size, tie_word_embeddings=False, **SIZES, **off))


def mixtral(vocab_size: int) -> torch.nn.Module:
    torch.manual_seed(0)
    sizes = {"hidden_size": 32, "intermediate_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4}
    sizes |= {"num_key_value_heads": 2, "num_local_experts": 4, "num_experts_per_tok": 2, "max_position_embeddings": 64}
    return transformers.MixtralForCausalLM(
        transformers.MixtralConfig(vocab_size=vocab_size, output_router_logits=True, **sizes)
    )


def mamba(vocab_size: int, version: int = 1) -> torch.nn.Module:
    torch.manual_seed(0)
    sizes = {"vocab_size": vocab_size, "hidden_size": 32, "num_hidden_layers": 2, "state_size": 8}
    sizes |= {"tie_word_embeddings": False, "bos_token_id": 0, "eos_token_id": 0, "pad_token_id": 0}
    if version == 1:
        return transformers.MambaForCausalLM(transformers.MambaConfig(**sizes))
    more = {"num_heads": 8, "head_dim": 8, "n_groups": 1, "expand": 2}
    return transformers.Mamba2ForCausalLM(transformers.Mamba2Config(**sizes | more))


class Norms(transformers.TrainerCallback):
    """After each update, how far the furthest weight of a normalisation layer is from 1."""

    def __init__(self) -> None:
        self.furthest: list[float] = []

    def on_step_end(self, args: Any, state: Any, control: Any, model: torch.nn.Module, **others: Any) -> None:
        self.furthest.append(max((p - 1).abs().max().item() for p in norms_of(model).values()))


def norms_of(model: torch.nn.Module) -> dict[str, torch.Tensor]:
    return {n: p.detach().float() for n, p in model.named_parameters() if "ln_" in n and n.endswith("weight")}


def logged(trainer: transformers.Trainer, name: str = "loss") -> list[float]:
    return [row[name] for row in trainer.state.log_history if "loss" in row]


def first_serious(watch: HealthCallback) -> tuple[str, int]:
    """The rule of its first error or warning, and the update after which it was said; `nothing` at -1."""
    found = next((f for f in watch.findings if f.severity != "info"), None)
    return (found.rule, found.step) if found else ("nothing", -1)


@contextmanager
def heard_weights(model: torch.nn.Module, output: str) -> Iterator[list[float]]:
    """The weight with which each backward pass enters at a scalar that the model returns."""
    weights: list[float] = []

    def listen(module: torch.nn.Module, args: tuple, returned: Any) -> None:
        if returned[output].requires_grad:
            returned[output].register_hook(lambda weight: weights.append(weight.item()))

    handle = model.register_forward_hook(listen)
    try:
        yield weights
    finally:
        handle.remove()
