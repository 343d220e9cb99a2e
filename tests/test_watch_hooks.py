"""What a watch hangs on a model, its optimizers and torch: it comes, goes, and is not copied or saved with them."""

import copy
import gc
import pickle
import weakref

import pytest
import torch
from torch.optim import AdamW
from torch.optim.optimizer import (
    _global_optimizer_pre_hooks,
    register_optimizer_step_post_hook,
    register_optimizer_step_pre_hook,
)
from toy import adamw, loss_of, toy, train

from moe_lab.health import Watch
from moe_lab.health.during import events


def update(model, optimizer) -> None:
    loss_of(model, 0).backward()
    optimizer.step()


def test_attached_again_it_hears_whole_passes_only_if_it_is_early() -> None:
    model = toy()
    optimizer = AdamW(model.parameters())
    watch = Watch(model, optimizer)

    def heard_again() -> set[str]:
        watch.close()
        watch.attach()
        return {name for name in ("forward", "events", "outside") if getattr(watch.state, name).handles}

    train(watch, model, [optimizer], 10)
    assert heard_again() == {"forward", "events", "outside"}
    train(watch, model, [optimizer], 10)
    assert heard_again() == {"events", "outside"}
    watch.attach()
    train(watch, model, [optimizer], 10)
    assert watch.step == 30


def test_no_hook_is_copied_or_saved(tmp_path) -> None:
    model = toy()
    optimizer = AdamW(model.parameters())
    watch = Watch(model, optimizer)
    train(watch, model, [optimizer], 3)
    torch.save(model, tmp_path / "model.pt")
    assert b"moe_lab" not in (tmp_path / "model.pt").read_bytes()
    for saved in (pickle.dumps(optimizer), pickle.dumps(optimizer.state_dict())):
        assert b"moe_lab" not in saved
    twin = copy.deepcopy(model)
    twin_optimizer = copy.deepcopy(optimizer)
    inputs = watch.state.forward.inputs
    loss_of(twin, 9).backward()
    twin_optimizer.step()
    assert watch.step == 3 and watch.state.forward.inputs is inputs
    loaded = torch.load(tmp_path / "model.pt", weights_only=False)
    assert torch.equal(loaded(torch.zeros(1, 4, dtype=torch.long)), model(torch.zeros(1, 4, dtype=torch.long)))


def test_after_closing_nothing_is_left() -> None:
    model = toy(dtype=torch.bfloat16)
    optimizer = AdamW(model.parameters(), lr=0.01)
    watch = Watch(model, optimizer)
    watch.close()
    watch.close()
    assert not optimizer._optimizer_step_pre_hooks and not optimizer._optimizer_step_post_hooks
    assert not any(m._forward_pre_hooks or m._forward_hooks for m in model.modules())
    train(watch, model, [optimizer], 5)
    assert watch.step == 0


@pytest.fixture
def alone() -> None:
    """No other test's watch, which may not have been closed, listens."""
    events.LISTENING.clear()
    events.attend()


def test_nothing_stays_behind(alone: None) -> None:
    model = toy()
    (optimizer,) = adamw(model)
    with Watch(model, optimizer):
        update(model, optimizer)
        assert len(events.HANDLES) == len(_global_optimizer_pre_hooks) == 1
    assert not any(p._backward_hooks or p._post_accumulate_grad_hooks for p in model.parameters())
    assert not _global_optimizer_pre_hooks


@pytest.mark.parametrize("when", ["before", "after"])
def test_a_watch_may_be_made_and_closed_in_a_step(alone: None, when: str) -> None:
    """Torch goes through the hooks for all optimizers then, and more of them must not come or go."""
    model, watches = toy(), []
    (optimizer,) = adamw(model)

    def begin_or_end(*_: object) -> None:
        watches.append(Watch(model, optimizer)) if not watches else watches[0].close()

    register = {"before": register_optimizer_step_pre_hook, "after": register_optimizer_step_post_hook}[when]
    handle, listened = register(begin_or_end), []
    for _ in range(3):
        update(model, optimizer)
        listened.append(len(events.HANDLES))
    handle.remove()
    assert listened == [1, when == "before", when == "before"]
    with Watch(model, optimizer):
        pass
    assert not _global_optimizer_pre_hooks


def test_a_watch_that_was_never_closed_keeps_nothing_alive() -> None:
    model = toy()
    watch, gone = Watch(model, adamw(model)), weakref.ref(model)
    del model, watch
    gc.collect()
    assert gone() is None
