"""Hugging Face: our model as a `PreTrainedModel`, our optimizers and loss terms in a `transformers.Trainer`.

    trainer = hf.LabTrainer(config, "runs/hf", callbacks=[hf.HealthCallback()])  # the text, recipe and model of a config
    trainer.train()
    trainer.save_model("model")  # safetensors
    model = AutoModelForCausalLM.from_pretrained("model")  # wherever this module is imported

Importing this module registers the model with transformers' Auto classes. It raises ImportError, one line, without the extra
`hf` or with versions that it does not know.
"""

# Shapes: B windows, T tokens of a window, V vocabulary.

from collections.abc import Sequence
from dataclasses import asdict, dataclass
from importlib.metadata import PackageNotFoundError, version
from itertools import chain
from pathlib import Path
from typing import Any

import torch
from packaging.specifiers import SpecifierSet
from torch import Tensor, nn
from torch.optim import Optimizer
from torch.optim.lr_scheduler import LambdaLR

from moe_lab.config import Config, ModelConfig, OptimizerConfig, from_dict
from moe_lab.data import Batches, prepare
from moe_lab.health import HealthCallback
from moe_lab.model import LanguageModel, build_model
from moe_lab.optim import build_optimizers, groups_of, lr_share

NEEDS = {"transformers": ">=5.23,<6", "accelerate": ">=1.10,<2"}


def refuse_versions(needs: dict[str, str]) -> None:
    """Raises ImportError, one line, for a package that is missing or of another version than is known to do."""
    for name, range_ in needs.items():
        try:
            found = version(name)
        except PackageNotFoundError:
            found = None
        if found is None or found not in SpecifierSet(range_):
            has = "is not installed" if found is None else f"is {found}"
            raise ImportError(f"moe_lab.connect.hf needs {name}{range_}, which {has}: pip install -e '.[hf]'")


refuse_versions(NEEDS)

import transformers  # noqa: E402
from transformers.modeling_outputs import CausalLMOutput  # noqa: E402

__all__ = ["HealthCallback", "LabConfig", "LabForCausalLM", "LabTrainer"]


class LabConfig(transformers.PreTrainedConfig):
    """`model`: the section of that name as a YAML file of ours holds it. Raises ConfigError for a wrong one."""

    model_type = "moe_lab"
    model: dict | None = None

    @property
    def ours(self) -> ModelConfig:
        return from_dict({"model": self.model or {}}, "LabConfig").model

    vocab_size = property(lambda self: self.ours.vocab_size)
    hidden_size = property(lambda self: self.ours.d_model)
    num_hidden_layers = property(lambda self: self.ours.n_layers)
    max_position_embeddings = property(lambda self: self.ours.max_seq_len)


@dataclass
class LabOutput(CausalLMOutput):
    terms: dict[str, Tensor] | None = None  # in training: the weighted terms whose sum is the loss


class LabForCausalLM(transformers.PreTrainedModel, transformers.GenerationMixin):
    """Our LanguageModel, as `.model`, under the names and calls that Hugging Face expects. `generate` reads the whole
    text again for each token; `model.model.generate` is the same with caches."""

    config_class = LabConfig
    main_input_name = "input_ids"

    def __init__(self, config: LabConfig):
        super().__init__(config)
        self.model = LanguageModel(config.ours)
        self.post_init()

    @classmethod
    def of(cls, model: LanguageModel) -> "LabForCausalLM":
        """Around a model that is there: the weights are shared, not copied."""
        with torch.device("meta"):
            it = cls(LabConfig(model=asdict(model.config)))
        it.model = model
        return it

    @torch.no_grad()
    def initialize_weights(self) -> None:
        """Start values of a new model, all at once; a checkpoint that lacks some of the tensors is refused."""
        named = list(self.model.named_parameters())
        new = [name for name, p in named if not getattr(p, "_is_hf_initialized", False)]
        if len(new) == len(named):
            self.model.init_weights()
        elif new:
            raise ValueError(f"the checkpoint lacks {len(new)} of {len(named)} tensors, {new[0]} among them")

    def forward(
        self,
        input_ids: Tensor,
        labels: Tensor | None = None,
        attention_mask: Tensor | None = None,
        num_items_in_batch: Tensor | int | None = None,
        **others: Any,
    ) -> LabOutput:
        """input_ids (B, T) int64; `labels` are the same ids, -100 where a token is never a target. In training no logits.

        The loss is the sum of all terms, nats per token. Under accumulation (`num_items_in_batch`: the targets of all
        micro-batches) each micro-batch weighs as much as it has targets, with its auxiliary terms; the sum is the update's loss.
        Raises ValueError for padding on the left, when it is not training.
        """
        if attention_mask is not None and not self.training and not attention_mask[:, 0].all():
            raise ValueError("attention_mask pads on the left: set tokenizer.padding_side='right'")
        logits = None if self.training and labels is not None else self.model(input_ids).logits  # (B, T, V)
        if labels is None:
            return LabOutput(logits=logits)
        wanted = labels != -100
        terms = self.model.losses(input_ids, wanted)
        if num_items_in_batch is not None:
            share = wanted[:, 1:].sum() / num_items_in_batch
            terms = {name: term * share for name, term in terms.items()}
        return LabOutput(loss=sum(terms.values()), logits=logits, terms=terms if self.training else None)

    def prepare_inputs_for_generation(self, input_ids: Tensor, **others: Any) -> dict[str, Tensor | None]:
        return {"input_ids": input_ids, "attention_mask": others.get("attention_mask")}


transformers.AutoConfig.register(LabConfig.model_type, LabConfig, exist_ok=True)
transformers.AutoModelForCausalLM.register(LabConfig, LabForCausalLM, exist_ok=True)


class Together(Optimizer):
    """Several optimizers that step as one, for Trainer, accelerate and schedulers: as accelerate's wrapper it leaves the base's
    constructor alone, and groups and state are those of its `optimizers`."""

    def __init__(self, optimizers: Sequence[Optimizer]):
        self.optimizers, self.defaults = list(optimizers), {}

    @property
    def param_groups(self) -> list[dict]:
        return list(groups_of(self.optimizers))

    @property
    def state(self) -> dict:
        return dict(chain.from_iterable(optimizer.state.items() for optimizer in self.optimizers))

    def step(self, closure: Any = None) -> None:
        assert closure is None, "each optimizer would call it"
        for optimizer in self.optimizers:
            optimizer.step()

    def zero_grad(self, set_to_none: bool = True) -> None:
        for optimizer in self.optimizers:
            optimizer.zero_grad(set_to_none)

    def state_dict(self) -> dict[str, Any]:
        return {"optimizers": [optimizer.state_dict() for optimizer in self.optimizers]}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        for optimizer, state in zip(self.optimizers, state_dict["optimizers"], strict=True):
            optimizer.load_state_dict(state)


class Hybrid:
    """The factory for `Trainer(..., optimizer_cls_and_kwargs=(Hybrid, {"config": …, "max_lr": …}))`: Muon beside AdamW, as
    `build_optimizers` splits them, for a model that holds our LanguageModel."""

    def __call__(self, model: nn.Module, config: OptimizerConfig, max_lr: float) -> Together:
        ours = next(module for module in model.modules() if isinstance(module, LanguageModel))
        return Together(build_optimizers(ours, config, max_lr))


class Windows(torch.utils.data.Dataset):
    """The windows of a config's text in the order in which our trainer takes them; item n is the run's n-th."""

    def __init__(self, tokens: Any, config: Config):
        self.batches = Batches(tokens, config.model.max_seq_len, 1, config.training.seed)
        self.length = config.n_steps * config.training.batch_size * config.training.gradient_accumulation_steps

    def __len__(self) -> int:
        return self.length

    def __getitem__(self, n: int) -> dict[str, Tensor]:
        place = divmod(n, len(self.batches.windows))
        if place != (self.batches.epoch, self.batches.position):
            self.batches.go_to(*place)
        ids = self.batches.next_batch()[0]
        return {"input_ids": ids, "labels": ids}


def arguments(config: Config, output_dir: str | Path, **changes: Any) -> transformers.TrainingArguments:
    """What a config says of a run, for a Trainer; its windows come in their own order."""
    training = config.training
    options: dict[str, Any] = {"max_steps": config.n_steps, "per_device_train_batch_size": training.batch_size}
    options |= {"gradient_accumulation_steps": training.gradient_accumulation_steps, "seed": training.seed}
    options |= {"learning_rate": training.max_lr, "warmup_steps": training.warmup_steps}
    options |= {"max_grad_norm": training.max_grad_norm, "logging_steps": training.log_interval}
    options |= {"save_steps": training.save_interval, "save_total_limit": training.keep_checkpoints}
    options |= {"bf16": config.precision.compute == "bfloat16", "use_cpu": training.device == "cpu"}
    options |= {"train_sampling_strategy": "sequential", "report_to": [], "output_dir": str(output_dir)}
    return transformers.TrainingArguments(**options | changes)


class LabTrainer(transformers.Trainer):
    """A Trainer of a config's text, model, optimizers and schedule, as `moe_lab.Trainer` has them; its log has every
    loss term. `precision.compute: auto` counts as float32 here. Other options are Trainer's."""

    summed_from = 0  # updates done when the sums began

    def __init__(self, config: Config, output_dir: str | Path, model: LanguageModel | None = None, **options: Any):
        dataset = prepare(config.data, config.model)
        self.lab = config.with_(model={"vocab_size": dataset.vocab_size})
        self.sums: dict[str, Tensor] = {}  # of the loss terms since the last log of a loss
        options.setdefault("args", arguments(self.lab, output_dir))
        options.setdefault("train_dataset", Windows(dataset.train, self.lab))
        made = {"config": config.optimizer, "max_lr": config.training.max_lr}
        model = LabForCausalLM.of(model or build_model(self.lab.model, config.training.seed))
        super().__init__(model, optimizer_cls_and_kwargs=(Hybrid, made), **options)

    def create_scheduler(self, num_training_steps: int, optimizer: Optimizer | None = None) -> LambdaLR:
        """Ours: update n of a warm-up runs at n / warmup_steps, where transformers' first update has a learning rate of 0."""
        if self.lr_scheduler is None:
            training, n_steps = self.lab.training, num_training_steps
            share = lambda done: lr_share(done + 1, n_steps, training.warmup_steps, training.min_lr_ratio)  # noqa: E731
            self.lr_scheduler = LambdaLR(optimizer or self.optimizer, share)
            self._created_lr_scheduler = True
        return self.lr_scheduler

    def compute_loss(self, model: nn.Module, inputs: dict, return_outputs: bool = False, **counts: Any) -> Any:
        loss, outputs = super().compute_loss(model, inputs, return_outputs=True, **counts)
        self.summed_from = self.summed_from if self.sums else self.state.global_step
        for name, term in (outputs.get("terms") or {}).items():
            self.sums[name] = self.sums.get(name, 0.0) + term.detach()
        return (loss, outputs) if return_outputs else loss

    def log(self, logs: dict[str, float], *args: Any, **options: Any) -> None:
        if "loss" in logs:
            n = self.state.global_step - self.summed_from
            logs |= {name: (total / n).item() for name, total in self.sums.items()}
            self.sums = {}
        super().log(logs, *args, **options)
