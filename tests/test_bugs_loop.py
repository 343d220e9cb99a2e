"""The case's bugs in the loop, the data, evaluation and the config: each shows its signature, planted, and nothing of it without."""

from collections import Counter
from pathlib import Path

import pytest
import torch
from helpers import tiny
from test_bugs import MAMBA, SMOKE, trainer

from moe_lab import Trainer, build_model, optim
from moe_lab.config import ConfigError, from_dict
from moe_lab.data import Batches
from moe_lab.failures import bugs
from moe_lab.failures.bugs import loop, moved, planted, sources
from moe_lab.failures.experiments import validation_loss
from moe_lab.health.measures import collisions
from moe_lab.optim import groups_of


def dry_run(**bug: tuple[str, ...]) -> Counter:
    heard: Counter = Counter()
    with planted(*bug.get("ids", ())):
        bugs.loop(754, 4, 10, lambda what: heard.update([what]))
    return heard


def test_b07_754_steps_are_188_updates_and_nothing_is_ever_logged() -> None:
    assert dry_run() == {"backward": 754, "update": 188, "log": 18, "evaluation": 18, "save": 18}
    assert dry_run(ids=("B07",)) == {"backward": 754, "update": 188}
    assert loop is bugs.loop


def test_b10_everything_decays() -> None:
    def decays() -> dict[str, float]:
        optimizers = optim.build_optimizers(build_model(MAMBA, 0), SMOKE.optimizer, 0.01)
        return {group["name"]: group["weight_decay"] for group in groups_of(optimizers)}

    assert decays()["adamw"] == 0
    with planted("B10"):
        assert set(decays().values()) == {SMOKE.optimizer.weight_decay}


def test_b12_loss_and_gradient_are_summed_over_the_accumulation(tmp_path) -> None:
    found = {}
    for ids in ((), ("B12",)):
        with planted(*ids):
            one = trainer(tmp_path / str(ids), training={"gradient_accumulation_steps": 4})
            report = next(one.steps())
            found[ids] = sum(report.losses.values()).item(), report.grad_norm.item()
    for plain, summed in zip(found[()], found["B12",], strict=True):
        assert summed == pytest.approx(4 * plain, rel=1e-3)


def test_b18_the_first_update_runs_at_the_full_rate() -> None:
    assert [optim.lr_share(n, 200, 100, 0.1) for n in (1, 2)] == [0.01, 0.02]
    with planted("B18"):
        assert [optim.lr_share(n, 200, 100, 0.1) for n in (1, 2, 3)] == [1.0, 0.01, 0.02]


def resumed(folder: Path, *ids: str) -> tuple[float, dict, bool]:
    """The peak of the first group, where the data stand, and whether the random state came along: resumed at twice the LR."""
    one = trainer(folder, training={"max_lr": 0.01})
    one.run_dir = folder
    list(one.steps(until=2))
    (folder / "checkpoints").mkdir(exist_ok=True)
    one.save(folder / "checkpoints" / "step_000002.pt")
    with planted(*ids):
        again = Trainer(SMOKE.with_(training={"max_lr": 0.02}), folder, resume=True)
    return next(groups_of(again.optimizers))["initial_lr"], again.batches.state_dict(), again.rng_state is not None


def test_b13_and_b25_a_resume_brings_the_old_rate_back_and_reads_the_first_texts_again(tmp_path) -> None:
    fine = resumed(tmp_path / "a")
    assert fine == (0.02, {"epoch": 0, "position": 32}, True)
    assert resumed(tmp_path / "b", "B13") == (0.01, *fine[1:])
    assert resumed(tmp_path / "c", "B25") == (0.02, {"epoch": 0, "position": 0}, False)


def test_b08_random_tokens_take_the_place_of_the_text_with_a_warning(tmp_path, capsys) -> None:
    def agree() -> float:
        one = trainer(tmp_path)
        ids = torch.cat([one.batches.next_batch() for _ in range(4)]).flatten()
        return collisions(ids, one.config.model.vocab_size)

    assert agree() > 3 and "Warning" not in capsys.readouterr().out
    with planted("B08"):
        assert agree() < 1.2 and "using random tokens" in capsys.readouterr().out


def test_b16_an_untouched_checkpoint_has_moved_everywhere() -> None:
    state = build_model(tiny(), 3).state_dict()
    assert set(moved(state, tiny(), 3).values()) == {0.0}
    with planted("B16"):
        found = bugs.moved(state, tiny(), 3)
    random = [share for name, share in found.items() if "norm" not in name]
    assert min(random) > 1.2 and max(random) < 1.6  # sqrt(2): two independent draws


def test_b20_an_unknown_key_is_read_by_nobody() -> None:
    values = {"training": {"weight_decay": 0.5}}
    with pytest.raises(ConfigError, match="unknown key training.weight_decay"):
        from_dict(values)
    with planted("B20"):
        from moe_lab import config

        assert config.from_dict(values) == config.from_dict({})


def test_b21_neighbouring_windows_of_one_document_stand_in_a_batch() -> None:
    tokens = torch.cat([torch.full((100,), n) for n in range(1, 30)])
    tokens[99::100] = 0
    with planted("B21"):
        batch = Batches(tokens.numpy(), 16, 4, 0).next_batch()
    assert (batch == 1).all()
    assert len(Batches(tokens.numpy(), 16, 4, 0).next_batch().unique()) > 2


def test_b22_the_shown_loss_is_the_heads_mixture(tmp_path) -> None:
    one = trainer(tmp_path)
    torch.nn.init.zeros_(one.model.lm_heads[1].weight)
    torch.nn.init.normal_(one.model.lm_heads[0].weight, std=0.3)
    with planted("B22"):
        mixed = evaluation(one)
    uniform = torch.tensor(one.config.model.vocab_size).log().item()
    assert mixed == pytest.approx((2 * evaluation(one) + uniform) / 3, rel=1e-2)


def evaluation(one: Trainer) -> float:
    from moe_lab.train.evaluate import evaluate

    return evaluate(one.model, one.dataset.validation[:2000], 16, one.autocast)["validation_loss"]


def test_b26_validation_is_training_text(tmp_path) -> None:
    fine = trainer(tmp_path).dataset
    with planted("B26"):
        one = trainer(tmp_path)
    assert (one.dataset.validation == fine.train[: len(fine.validation)]).all()
    assert not (fine.validation == fine.train[: len(fine.validation)]).all()
    assert validation_loss(one, 100) > 0


def test_b23_a_comment_contradicts_its_value() -> None:
    healthy, sick = sources("B23")
    assert healthy.split("#")[1] == sick.split("#")[1] and healthy != sick
