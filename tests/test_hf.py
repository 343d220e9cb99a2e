"""Our model and optimizers under Hugging Face, and the watch in a Trainer of anybody's model."""

from __future__ import annotations

from functools import partial
from pathlib import Path

import pytest
import tiny_run
import torch
from accelerate import Accelerator
from checks import questions_08, verdicts_08
from helpers import perturb, random_ids, refused, tiny
from torch import nn
from transformers import AutoModelForCausalLM, GPT2Config, GPT2LMHeadModel, Trainer, TrainingArguments
from transformers.trainer_callback import PrinterCallback, TrainerCallback

import moe_lab
from moe_lab import build_model, health
from moe_lab.config import Config
from moe_lab.connect import hf
from moe_lab.optim import build_optimizers

ALL = {"moe_layers": (0,), "mamba_enabled": True, "mamba_layers": (1,), "mod_enabled": True}
TEXT = torch.tensor(list(Path(torch.__file__).read_bytes()[:60_000]))  # prose and code, byte by byte


def without_printing(trainer: Trainer) -> Trainer:
    trainer.remove_callback(PrinterCallback)
    return trainer


# ---- the model -------------------------------------------------------------------------------------------------------


def test_a_model_comes_back_as_it_was_and_writes_the_same_text(tmp_path) -> None:
    ours = perturb(build_model(tiny(**ALL))).eval()
    ids = random_ids(2, 12)
    wrapped = hf.LabForCausalLM.of(ours)
    wrapped.save_pretrained(tmp_path)
    assert (tmp_path / "model.safetensors").exists()
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path)
    assert type(loaded) is hf.LabForCausalLM and loaded.model is not ours
    with torch.no_grad():
        expected = ours(ids).logits
        assert torch.equal(wrapped(ids).logits, expected) and torch.equal(loaded(ids).logits, expected)
    greedy = ours.generate(ids, 8, temperature=0)
    assert torch.equal(loaded.generate(ids, max_new_tokens=8, do_sample=False), greedy)


def test_a_new_model_has_our_start_values() -> None:
    """Mamba's among them, which a blanket init would lose."""
    config = tiny(**ALL)
    torch.manual_seed(0)
    model = hf.LabForCausalLM(hf.LabConfig(model={"vocab_size": 257, "d_model": 16, "n_heads": 4, **ALL})).model
    delta = nn.functional.softplus(model.layers[1].seq_layer.dt_proj.bias)
    assert config.mamba_layers == (1,) and delta.min() > 0.9e-3 and delta.max() < 0.11
    assert all(bool(p.any()) for name, p in model.named_parameters())


def test_a_checkpoint_with_a_hole_and_padding_on_the_left_are_refused(tmp_path) -> None:
    wrapped = hf.LabForCausalLM.of(build_model(tiny()))
    whole = wrapped.state_dict()
    wrapped.save_pretrained(tmp_path, state_dict={k: whole[k] for k in whole if k != "model.final_norm.weight"})
    with refused(ValueError, "the checkpoint lacks 1 of 22 tensors, final_norm.weight"):
        AutoModelForCausalLM.from_pretrained(tmp_path)
    mask = torch.ones(1, 6)
    wrapped.eval()(random_ids(1, 6), attention_mask=mask)
    mask[0, 0] = 0
    with refused(ValueError, "pads on the left"):
        wrapped(random_ids(1, 6), attention_mask=mask)
    with refused(ValueError, "d_modle"):
        hf.LabConfig(model={"d_modle": 8}).ours  # noqa: B018


def test_micro_batches_weigh_what_they_have_targets() -> None:
    """Two with unequal numbers of targets sum to the loss of the one batch that holds both; the number of heads apart."""
    model = hf.LabForCausalLM.of(perturb(build_model(tiny(n_pred_tokens=1, aux_loss_weights=(1.0,))))).train()
    ids = random_ids(4, 16)
    labels = ids.clone()
    labels[0, 5:] = labels[1, 9:] = -100
    whole = model(ids, labels=labels).loss
    n = (labels[:, 1:] != -100).sum()
    parts = [model(i, labels=m, num_items_in_batch=n).loss for i, m in zip(ids.split(2), labels.split(2), strict=True)]
    torch.testing.assert_close(sum(parts), whole)
    plain = [model(i, labels=m).loss for i, m in zip(ids.split(2), labels.split(2), strict=True)]
    assert abs(sum(plain) / 2 - whole) > 1e-3


# ---- the Trainer -----------------------------------------------------------------------------------------------------


@pytest.fixture
def config(tmp_path) -> Config:
    return tiny_run.tiny(tmp_path, model={"dropout": 0.0}, training={"steps": 20, "log_interval": 1})


def test_trainer_and_ours_make_the_same_run(config, tmp_path) -> None:
    ours = moe_lab.Trainer(config, tmp_path / "ours")
    reports = [{name: term.item() for name, term in report.losses.items()} for report in ours.steps()]
    theirs = without_printing(hf.LabTrainer(config, tmp_path / "theirs", callbacks=[callback := hf.HealthCallback()]))
    theirs.train()
    logged = [row for row in theirs.state.log_history if "loss" in row]
    assert len(reports) == len(logged) == 20 and config.training.gradient_accumulation_steps > 1
    for terms, row in zip(reports, logged, strict=True):
        assert row["loss"] == pytest.approx(sum(terms.values()), abs=1e-5)
        assert {name: row[name] for name in terms} == pytest.approx(terms, abs=1e-6)
    assert logged[-1]["step"] == 20 and {"moe_balance", "router_z", "mod_predictor", "future_2"} <= set(logged[0])
    for p, q in zip(ours.model.parameters(), theirs.model.model.parameters(), strict=True):
        torch.testing.assert_close(p, q)
    assert [type(o).__name__ for o in callback.watch.state.optimizers] == ["Muon", "AdamW"]
    assert callback.watch.step == 20 and callback.watch.state.losses == pytest.approx([r["loss"] for r in logged])


def test_a_resumed_run_ends_where_an_uninterrupted_one_does(config, tmp_path) -> None:
    config = config.with_(training={"steps": 6, "save_interval": 3})
    ends = []
    for again in (False, True):
        trainer = without_printing(hf.LabTrainer(config, tmp_path / "run"))
        trainer.train(resume_from_checkpoint=str(tmp_path / "run" / "checkpoint-3") if again else None)
        ends.append([p.detach().clone() for p in trainer.model.parameters()])
    for p, q in zip(*ends, strict=True):
        assert torch.equal(p, q)


def test_several_optimizers_step_as_one() -> None:
    model = build_model(tiny(**ALL))
    inner = build_optimizers(model, Config().optimizer, 0.01)
    together = Accelerator(cpu=True).prepare(hf.Together(inner))
    schedule = torch.optim.lr_scheduler.LambdaLR(together, lambda n: 0.5**n)
    sum(model.losses(random_ids(2, 17)).values()).backward()
    together.step()
    schedule.step()
    assert [group["lr"] for o in inner for group in o.param_groups] == pytest.approx([0.005, 0.0015, 0.0015])
    assert len(together.state) == len(list(model.parameters()))
    stored = together.state_dict()
    fresh = hf.Together(build_optimizers(model, Config().optimizer, 0.01))
    fresh.load_state_dict(stored)
    for one, other in zip(inner, fresh.optimizers, strict=True):
        for p, state in one.state.items():
            for key, value in state.items():
                assert torch.equal(torch.as_tensor(value), torch.as_tensor(other.state[p][key]))
    together.zero_grad()
    assert all(p.grad is None for p in model.parameters())
    assert health.Watch(model, together).state.optimizers == inner


@pytest.mark.parametrize(
    ("needs", "says"),
    [
        ({"transformers": ">=99"}, r"needs transformers>=99, which is \d+\.\d+\.\d+: pip install -e '.\[hf\]'"),
        ({"no-such-package-here": ">=1"}, "which is not installed"),
    ],
)
def test_what_is_missing_or_too_old_is_said_in_a_line(needs, says) -> None:
    hf.refuse_versions(hf.NEEDS)
    with refused(ImportError, says):
        hf.refuse_versions(needs)


# ---- the watch in a Trainer of anybody's model -----------------------------------------------------------------------


class Rows(torch.utils.data.Dataset):
    def __len__(self) -> int:
        return 800

    def __getitem__(self, n: int) -> dict[str, torch.Tensor]:
        ids = TEXT[n * 61 : n * 61 + 48]
        return {"input_ids": ids, "labels": ids}


class Unscaled(GPT2LMHeadModel):
    """Takes what Trainer hands over and ignores it: its loss stays a mean."""

    def forward(self, input_ids=None, labels=None, attention_mask=None, **others):
        output = super().forward(input_ids)
        output.loss = nn.functional.cross_entropy(output.logits[:, :-1].flatten(0, 1), labels[:, 1:].flatten())
        return output


class Twice(GPT2LMHeadModel):
    """Hands probabilities to a loss that makes a softmax."""

    def forward(self, input_ids=None, labels=None, attention_mask=None, **others):
        output = super().forward(input_ids)
        probs = output.logits[:, :-1].flatten(0, 1).softmax(-1)
        output.loss = nn.functional.cross_entropy(probs, labels[:, 1:].flatten())
        return output


class Divided(Unscaled):
    accepts_loss_kwargs = False  # so Trainer divides


def trained(folder: Path, kind=GPT2LMHeadModel, dtype=torch.float32, callbacks=None, **options) -> Trainer:
    torch.manual_seed(0)
    model = kind(GPT2Config(vocab_size=256, n_positions=64, n_embd=32, n_layer=2, n_head=4)).to(dtype)
    options = {"max_steps": 40, "learning_rate": 1e-3, "warmup_steps": 5, "logging_steps": 1, **options}
    options |= {"per_device_train_batch_size": 4, "save_strategy": "no", "use_cpu": True, "report_to": []}
    args = TrainingArguments(output_dir=str(folder), **options)
    trainer = Trainer(model, args, train_dataset=Rows(), callbacks=callbacks or [health.HealthCallback])
    without_printing(trainer).train()
    return trainer


def callback_of(trainer: Trainer) -> health.HealthCallback:
    return next(c for c in trainer.callback_handler.callbacks if isinstance(c, health.HealthCallback))


def serious(trainer: Trainer) -> list[tuple[str, int]]:
    return [(f.rule, f.step) for f in callback_of(trainer).findings if f.severity != "info"]


def test_the_callback_is_one_object_and_a_callback_of_transformers() -> None:
    assert hf.HealthCallback is health.HealthCallback
    assert isinstance(hf.HealthCallback(), TrainerCallback) and hf.HealthCallback().findings == []


@pytest.mark.parametrize("options", [{"bf16": True, "weight_decay": 0.1}, {"gradient_accumulation_steps": 4}])
def test_a_healthy_run_is_silent_and_runs_as_it_would_without(tmp_path, options) -> None:
    watched = trained(tmp_path, **options)
    assert serious(watched) == []
    alone = trained(tmp_path, callbacks=[TrainerCallback()], **options)
    losses, plain = ([row["loss"] for row in t.state.log_history if "loss" in row] for t in (watched, alone))
    assert losses == plain
    assert callback_of(watched).watch.state.losses == pytest.approx(losses, abs=1e-5)


def test_bfloat16_weights_are_named_whatever_the_flag_says(tmp_path) -> None:
    rule, step = serious(trained(tmp_path, dtype=torch.bfloat16, bf16=True))[0]
    assert rule == "lost_updates" and step <= 20


def test_a_loss_that_is_n_times_too_large_is_named(tmp_path) -> None:
    trainer = trained(tmp_path, Unscaled, gradient_accumulation_steps=4, logging_steps=10, max_steps=20)
    assert serious(trainer)[0] == ("initial_loss", 10)
    assert "4 times too large" in callback_of(trainer).findings[0].message
    assert serious(trained(tmp_path, Unscaled, max_steps=20)) == []  # nothing accumulates: the same model is right
    divided = trained(tmp_path, Divided, gradient_accumulation_steps=4, max_steps=20)
    losses = [row["loss"] for row in divided.state.log_history if "loss" in row]
    assert serious(divided) == [] and callback_of(divided).watch.state.losses == pytest.approx(losses, abs=1e-5)


def test_how_a_model_makes_its_loss_is_read_off_its_graph(tmp_path) -> None:
    assert serious(trained(tmp_path, Twice, max_steps=12))[0] == ("squashed_twice", 10)


def test_a_loss_made_outside_of_the_model_is_taken_from_a_log_of_every_step(tmp_path, monkeypatch) -> None:
    def outside(self, model, inputs, return_outputs=False, num_items_in_batch=None):
        logits = model(inputs["input_ids"]).logits
        return nn.functional.cross_entropy(logits[:, :-1].flatten(0, 1), inputs["labels"][:, 1:].flatten())

    monkeypatch.setattr(Trainer, "compute_loss", outside)
    run = partial(trained, tmp_path, max_steps=12)
    assert len(callback_of(run()).watch.state.losses) == 12
    assert callback_of(run(logging_steps=4)).watch.state.losses == []


# ---- what notebook 08 makes of its numbers ---------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("default", "asked", "still", "outcome"),
    [(29, 0, 5, "does not hold"), (0, 0, 0, "holds"), (29, 29, 5, "does not hold"), (29, 0, 0, "open")],
)
def test_the_verdict_about_bfloat16_follows_from_formats_and_norms(default, asked, still, outcome) -> None:
    assert verdicts_08.C18(29, default, asked, still, 100)[0] == outcome


@pytest.mark.parametrize(
    ("runs", "takes", "apart", "outcome"),
    [(False, False, 1e-7, "holds only if"), (True, True, 1e-7, "holds"), (False, False, 0.01, "does not hold")],
)
def test_the_verdict_about_the_offer_follows_from_what_ran(runs, takes, apart, outcome) -> None:
    assert verdicts_08.C19(runs, takes, apart, 1e-7, 20)[0] == outcome


@pytest.mark.parametrize(
    ("question", "measured"),
    [
        (questions_08.form, [{"narrow": n, "tensors": 9} for n in (0, 4, 9)]),
        (questions_08.accumulated, [{"ratio": r} for r in (1.05, 0.25, 4.1)]),
        (
            questions_08.hidden,
            [
                {"nan": n, "updates": u, "planned": 40, "last": last}
                for n, u, last in ((9, 40, 0), (0, 13, 5), (0, 40, 5), (0, 40, 0))
            ],
        ),
    ],
)
def test_each_option_of_a_question_could_be_the_answer(question, measured) -> None:
    assert {question.answer(m) for m in measured} == set(question.options)
