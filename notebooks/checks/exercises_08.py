"""Checks of notebook 08's exercises. Solutions: notebooks/solutions/08.md."""

from __future__ import annotations

import math
import tempfile
from collections.abc import Callable, Mapping

import torch

from checks import runs_08
from checks.exercise import exercise
from moe_lab.course import notebook

transformers = runs_08.transformers
WORDS = ("healthy", "bfloat16 weights", "a loss that is too large", "weights that are NaN")
PATIENTS = {"A": WORDS[2], "B": WORDS[0], "C": WORDS[3], "D": WORDS[1]}


class OwnMean(transformers.GPT2LMHeadModel):
    def forward(self, input_ids=None, labels=None, **others):
        output = super().forward(input_ids=input_ids)
        output.loss = torch.nn.functional.cross_entropy(output.logits[:, :-1].flatten(0, 1), labels[:, 1:].flatten())
        return output


class Poisoned(transformers.GPT2LMHeadModel):
    n_passes = 0

    def forward(self, input_ids=None, labels=None, **others):
        output = super().forward(input_ids=input_ids, labels=labels, **others)
        self.n_passes += 1
        output.loss = output.loss * (math.nan if self.n_passes == 9 else 1.0)
        return output


def patient(name: str) -> transformers.Trainer:
    """A Trainer that has made 12 updates of two micro-batches, with nothing or one thing wrong."""
    sickness = PATIENTS[name]
    lab = notebook.resolve(profile="smoke", device="cpu")
    texts = runs_08.Texts(lab)
    kind = {WORDS[2]: OwnMean, WORDS[3]: Poisoned}.get(sickness, transformers.GPT2LMHeadModel)
    model = runs_08.gpt2(texts.vocab_size, kind)
    model = model.to(torch.bfloat16) if sickness == WORDS[1] else model
    options = {"max_steps": 12, "gradient_accumulation_steps": 2, "bf16": True}
    args = transformers.TrainingArguments(**runs_08.usual(lab) | options)
    trainer = runs_08.quiet(transformers.Trainer(model, args, train_dataset=texts))
    trainer.train()
    return trainer


@exercise
def check_diagnoses(answer: Mapping[str, str]) -> None:
    """`answer`: what is wrong with each patient."""
    assert set(answer) == set(PATIENTS), f"answer with a dict of {', '.join(PATIENTS)}"
    assert set(answer.values()) <= set(WORDS), f"the words are {', '.join(map(repr, WORDS))}"
    hints = {
        WORDS[0]: "it has float32 weights, finite, and a first loss near ln V: what is left to accuse it of?",
        WORDS[1]: "ask its parameters for their dtype; the flag bf16=True is the same in all four",
        WORDS[2]: "compare its first loss with ln V of its vocabulary",
        WORDS[3]: "do not ask the log: look at the weights themselves",
    }
    for name, sickness in PATIENTS.items():
        assert answer[name] == sickness, f"{name}: {hints[sickness]}"


@exercise
def check_load(load: Callable[[str], torch.nn.Module]) -> None:
    """`load(folder)`: the model of a checkpoint, safe to be trained."""
    with tempfile.TemporaryDirectory() as folder:
        stored = runs_08.gpt2(64).to(torch.bfloat16)
        stored.save_pretrained(folder)
        model = load(folder)
    assert isinstance(model, transformers.PreTrainedModel), "return the model: `return AutoModelForCausalLM.from_…`"
    narrow = [name for name, p in model.named_parameters() if p.dtype != torch.float32]
    assert not narrow, f"{len(narrow)} tensors are {next(model.parameters()).dtype}; `from_pretrained` takes a dtype"
    same = all(torch.equal(p, q.float()) for p, q in zip(model.parameters(), stored.parameters(), strict=True))
    assert same, "these are not the checkpoint's values: a config alone makes a new model"


@exercise
def check_micro_loss(micro_loss: Callable[..., float]) -> None:
    """`micro_loss(token_sum, n_targets, balance, n_items)`: what one backward pass of an update adds, balance at weight 0.02."""
    alone = micro_loss(30.0, 10, 1.2, None)
    assert alone is not None, "return a number"
    assert math.isclose(alone, 3.0 + 0.02 * 1.2), (
        "where n_items is None the pass is alone: the mean over its own targets"
    )
    update = micro_loss(30.0, 10, 1.0, 40) + micro_loss(120.0, 30, 1.0, 40)
    assert not math.isclose(update, 7.0 + 0.04), (
        "each pass took the mean of its own targets: the update is twice the loss"
    )
    assert not math.isclose(update, 3.75 + 0.04), (
        "the tokens are right, and the balance is added twice: that is Mixtral's"
    )
    assert math.isclose(update, 3.75 + 0.02), f"two passes with 10 and 30 targets add up to {update:.3f}, not to 3.770"


@exercise
def check_options(options: Mapping[str, object]) -> None:
    """`options`: changes to the arguments of a run whose loss is NaN from its ninth update on, so that its log says so."""
    assert isinstance(options, Mapping), "a dict of TrainingArguments, such as {'logging_steps': 5}"
    lab = notebook.resolve(profile="smoke", device="cpu")
    texts = runs_08.Texts(lab)
    args = transformers.TrainingArguments(**runs_08.usual(lab) | {"max_steps": 12} | dict(options))
    trainer = transformers.Trainer(runs_08.gpt2(texts.vocab_size, Poisoned), args, train_dataset=texts)
    runs_08.quiet(trainer).train()
    assert trainer.model.n_passes >= 9, "the run ended before its loss was NaN: that is no cure"
    shown = runs_08.logged(trainer)
    assert shown, "this log shows no loss at all"
    assert any(map(math.isnan, shown)), f"the log still ends at a loss of {shown[-1]:g}: which option filters it?"
