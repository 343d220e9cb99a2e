"""Each bug of the case, planted, shows its signature as CASE.md has it, and nothing of it without."""

from collections import Counter
from pathlib import Path

import pytest
import torch
from checks import sources_06
from helpers import MECHANISMS, random_ids, tiny

from moe_lab import Trainer, build_model
from moe_lab.config import ROOT, ConfigError, load_config
from moe_lab.data import Batches
from moe_lab.failures import bugs
from moe_lab.failures.bugs import BUGS, planted, sources
from moe_lab.failures.edits import Edit, edited
from moe_lab.health import choices
from moe_lab.model import attention
from moe_lab.model.depth import Depth
from moe_lab.optim import groups

DEPTH = tiny(mod_enabled=True, zero_init_output=False)
MAMBA = tiny(**MECHANISMS["mamba"])
SMOKE = load_config(ROOT / "configs" / "smoke.yaml").with_(training={"steps": 8, "device": "cpu"})


def trainer(folder: Path, **changes: dict) -> Trainer:
    return Trainer(SMOKE.with_(**changes), folder)


# ---- the machinery -------------------------------------------------------------------------------------------------------


def test_every_bug_of_the_case_is_there() -> None:
    """B01 and B02 are functions of bugs.py, and settings."""
    assert {*BUGS["edits"], *BUGS["texts"], "B01", "B02"} == {f"B{n:02d}" for n in range(1, 27)}


@pytest.mark.parametrize("id", [*BUGS["edits"], *BUGS["others"], *BUGS["texts"]])
def test_the_two_sources_differ_and_the_package_is_as_it_was(id: str, capsys) -> None:
    healthy, sick = sources(id)
    assert healthy != sick
    if id not in BUGS["texts"]:
        with planted(id):
            assert sources_now(id) == sick
        assert sources_now(id) == healthy
    sources_06.show_difference(id)


def sources_now(id: str) -> str:
    from moe_lab.failures.edits import by_function, source_of

    return "\n\n".join(source_of(getattr(*place)) for place in by_function(bugs.edits_of(id)))


def test_a_difference_shows_each_changed_line_once_under_its_sign() -> None:
    """Nothing else has a sign, and a source that is put back from the signs is the source."""
    healthy, sick = sources("B08")
    lines = sources_06.difference(healthy, sick)
    for mark, one, other in (("-", healthy, sick), ("+", sick, healthy)):
        changed = [line[2:] for line in lines if line[0] == mark]
        assert changed == [line for line in one.splitlines() if line not in other.splitlines()] != []
    page = sources_06.as_html("B08", lines)
    assert page.count(sources_06.MARKED["+"]) == sum(line[0] == "+" for line in lines) and "&quot;" in page
    far = sources_06.difference("a\n" * 9 + "b\n" * 9 + "c", "x\n" + "a\n" * 9 + "b\n" * 9)
    assert [line for line in far if line[0] in "+-"] == ["+ x", "- c"] and "  …" in far


def test_all_at_once_and_one_within_another() -> None:
    before = Depth.choose
    with planted(*BUGS["edits"]):
        assert "best, None" in sources_now("B04") and "ones_like" in sources_now("B05")
    with planted("B04"), planted("B05"):
        assert "best, None" in sources_now("B05") and "ones_like" in sources_now("B05")
    assert Depth.choose is before


def test_an_error_inside_leaves_the_package_as_it_was() -> None:
    before = Depth.choose
    with pytest.raises(RuntimeError), planted("B04"):
        raise RuntimeError
    assert Depth.choose is before


def test_an_edit_whose_place_is_gone_is_refused() -> None:
    with pytest.raises(ValueError, match="stands there 0 times"):
        edited("a = 1", [Edit(bugs, "loop", "b = 1", "c = 1")])
    with pytest.raises(ValueError, match="stands there 2 times"):
        edited("a = 1; a = 1", [Edit(bugs, "loop", "a = 1", "c = 1")])
    with pytest.raises(ConfigError, match="'B99' cannot be planted"), planted("B99"):
        pass


# ---- the model -----------------------------------------------------------------------------------------------------------


@torch.no_grad()
def through_first_layer(seed: int = 0) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """x, the first layer's output, and which tokens (B, T) both of its sublayers skip, in training."""
    block = build_model(DEPTH, seed).train().layers[0]
    x = torch.randn(2, 16, DEPTH.d_model, generator=torch.Generator().manual_seed(seed))
    y, _, reports = block(x)
    return x, y, ~(reports[0].chosen | reports[1].chosen)


def test_b03_doubles_a_skipped_token_at_every_sublayer() -> None:
    for ids, factor in (((), 1), (("B03",), 4)):
        with planted(*ids):
            x, y, skipped = next(found for seed in range(9) if (found := through_first_layer(seed))[2].any())
        torch.testing.assert_close(y[skipped], factor * x[skipped])
        assert not torch.allclose(y[~skipped], factor * x[~skipped])


def test_b03_leaves_chosen_tokens_as_they_were() -> None:
    x, healthy, _ = through_first_layer()
    block = build_model(DEPTH, 0).layers[0]
    chosen = block(x)[2][0].chosen  # of the first sublayer
    with planted("B03"):
        rows = block.seq_depth.choose(x, False)
        y = torch.ones_like(rows.x)
        doubled = block.seq_depth.put_back(x, y, rows)
    torch.testing.assert_close(doubled[chosen], block.seq_depth.put_back(x, y, rows)[chosen])


@torch.no_grad()
def largest_before(model, at: int = 20, n: int = 30) -> float:
    """With the choice of tokens held: how far logits before `at` move when the tokens from it on change."""
    ids = random_ids(1, n, seed=1)
    other = ids.clone()
    other[:, at:] = (other[:, at:] + 1) % DEPTH.vocab_size
    made: list[torch.Tensor] = []
    with choices.recorded(made):
        before = model(ids).logits
    with choices.held(made):
        after = model(other).logits
    return (after - before)[:, :at].abs().max().item() / before.std().item()


def test_b04_shows_a_token_its_future_though_the_choice_is_held() -> None:
    assert largest_before(build_model(DEPTH, 0).train()) == 0
    with planted("B04"):
        assert largest_before(build_model(DEPTH, 0).train()) > 0.01


def router_gradients() -> list[bool]:
    model = build_model(DEPTH, 0).train()
    sum(model.losses(random_ids(2, 17)).values()).backward()
    return [bool(p.grad is not None and p.grad.any()) for n, p in model.named_parameters() if ".router." in n]


def test_b05_leaves_routers_without_a_gradient_and_shows_a_constant() -> None:
    assert all(router_gradients())
    with planted("B05"):
        assert not any(router_gradients())
        model = build_model(DEPTH, 0).train()
        terms = [model.losses(random_ids(2, 17, seed=s))["mod_balance"] for s in (1, 2)]
    assert terms[0] == terms[1] and not terms[0].requires_grad


@torch.no_grad()
def modes_apart() -> float:
    """Share of the layers' Mixture-of-Depths modules that compute in training and not in evaluation."""
    model, calls = build_model(DEPTH, 0), Counter()
    for module in model.modules():
        if isinstance(module, Depth):
            module.router.register_forward_hook(lambda *_: calls.update([model.training]))
    for mode in (True, False):
        model.train(mode)(random_ids(1, 9))
    return 1 - calls[False] / calls[True]


def test_b06_runs_another_network_in_evaluation() -> None:
    assert modes_apart() == 0
    ids = random_ids(1, 30)
    with planted("B06"), torch.no_grad():
        assert modes_apart() == 1
        model = build_model(DEPTH, 0)
        assert not torch.allclose(model.train()(ids).logits, model.eval()(ids).logits, atol=1e-3)


@torch.no_grad()
def hears_from(model, distance: int) -> bool:
    """Whether the last output of the first layer's Mamba depends on the input so many tokens before."""
    x = torch.randn(1, 30, MAMBA.d_model, generator=torch.Generator().manual_seed(0))
    other, mamba = x.clone(), model.layers[0].seq_layer
    other[:, -1 - distance] += 1
    return not torch.equal(mamba(x)[0][:, -1], mamba(other)[0][:, -1])


def test_b09_remembers_nothing_beyond_the_convolution() -> None:
    taps = MAMBA.mamba_d_conv
    assert hears_from(build_model(MAMBA, 0), taps + 5)
    with planted("B09"):
        model = build_model(MAMBA, 0)
        assert hears_from(model, taps - 1) and not hears_from(model, taps)
        assert not [n for n, _ in model.named_parameters() if n.endswith(("A_log", "dt_proj.bias"))]


def test_b11_a_mask_that_is_dropped_changes_nothing_and_padding_is_learned() -> None:
    model, ids = build_model(tiny(), 0), random_ids(2, 17)
    mask = torch.arange(17).expand(2, -1) < 9
    assert not torch.equal(model.losses(ids, mask)["next_token"], model.losses(ids)["next_token"])
    tokens = random_ids(1, 4000).flatten().numpy() + 1
    with planted("B11"):
        assert torch.equal(model.losses(ids, mask)["next_token"], model.losses(ids)["next_token"])
        padded = Batches(tokens, 32, 8, 0).next_batch()
    assert (Batches(tokens, 32, 8, 0).next_batch() != 0).all() and (padded[:, -8:] == 0).all()


def test_b15_experts_collapse(tmp_path) -> None:
    shares = {}
    for ids in ((), ("B15",)):
        with planted(*ids):
            one = trainer(tmp_path / str(ids), training={"steps": 60, "max_lr": 0.02})
            for _ in one.steps():
                pass
            loads = [r.load() for r in one.model.report(one.batches.next_batch()).routing]
        shares[ids] = min(load.min().item() * len(load) for load in loads)  # the idlest expert over the even share
    assert shares[()] > 0.5 and shares["B15",] < 0.1


def test_b17_positions_are_ranks() -> None:
    seen = {}
    for ids in ((), ("B17",)):
        with planted(*ids), torch.no_grad():
            block = build_model(DEPTH, 0).train().layers[0]
            block.seq_layer.register_forward_hook(lambda _, given, __, ids=ids: seen.update({ids: given[1]}))
            block(torch.randn(1, 16, DEPTH.d_model, generator=torch.Generator().manual_seed(0)))
    n = seen[()].shape[1]
    assert seen["B17",].tolist() == [list(range(n))] and seen[()].tolist() != [list(range(n))]


def test_b19_mamba_forgets_at_once_and_a_vector_is_orthogonalised() -> None:
    def steps() -> torch.Tensor:
        return torch.nn.functional.softplus(build_model(MAMBA, 0).layers[0].seq_layer.dt_proj.bias)

    assert steps().min() >= 0.001 and steps().max() <= 0.1 and groups.group_of("layers.0.seq_layer.A_log") == "adamw"
    with planted("B19"):
        assert (
            torch.allclose(steps(), torch.tensor(2.0).log()) and groups.group_of("layers.0.seq_layer.A_log") == "muon"
        )


def test_b24_tables_in_bf16_are_off_by_up_to_two_thousandths() -> None:
    places = torch.arange(1024).unsqueeze(0)
    exact = attention.rotary(places, 32, 10000.0)[0]
    with planted("B24"):
        layer = build_model(tiny(), 0).layers[0].seq_layer
        layer(torch.zeros(1, 4, 16), torch.arange(4).unsqueeze(0))
        assert [buffer.dtype for buffer in layer.buffers()] == [torch.bfloat16]
    assert 1e-3 < (exact.bfloat16().float() - exact).abs().max() <= 2e-3
