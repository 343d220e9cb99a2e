"""The checks of the notebooks' exercises accept the printed solutions and refuse what a reader is likely to get wrong."""

import math
import tempfile
from functools import cache, partial
from importlib import import_module
from pathlib import Path

import pytest
import torch
from checks import exercises_02
from checks.exercises_07 import FAULTS, RIGHT
from checks.runs_06 import small_config
from checks.surface import shapley
from helpers import solved
from transformers import AutoConfig, AutoModelForCausalLM

from moe_lab.health.conventions import lr_original_from_match
from moe_lab.health.measures import is_lost

CONVENTIONS = {"A": "match_rms_adamw", "B": "plain", "C": "original"}
PATIENTS = {"A": "rounded away", "B": "a rate too low", "C": "random tokens", "D": "healthy"}
TRAINERS = {"A": "a loss that is too large", "B": "healthy", "C": "weights that are NaN", "D": "bfloat16 weights"}
CONFIG = """
model: {d_model: 1536, n_layers: 20, n_heads: 12, n_kv_heads: 3, d_ff: 4096, vocab_size: 50257}
training: {max_lr: 0.0003, warmup_steps: 100, steps: 1000}
optimizer: {type: muon, adjust_lr: original, adamw_lr_ratio: 0.3}
"""
LEAKS = {"A": "mask", "B": "causal", "C": "choice", "D": "chunk"}


def depth_layer(x, scores, capacity, sublayer, bug):
    """The solution, with one bug in it."""
    n_chosen = math.floor(capacity * len(x)) if bug == "floor" else math.ceil(capacity * len(x))
    best = scores.topk(n_chosen, largest=bug != "lowest").indices
    places = best if bug == "B04" else best.sort().values
    positions = torch.arange(len(places)) if bug == "B17" else places
    y = sublayer(x[places], positions)
    if bug == "softmax":
        y = scores.softmax(dim=0)[places][:, None] * y
    elif bug != "B05":
        weight = scores.detach() if bug == "detached" else scores
        y = weight[places].sigmoid()[:, None] * y
    if bug in ("B03", "chosen only"):
        return x + x.index_add(0, places, y) if bug == "B03" else x[places] + y
    if bug == "zeroed":
        return torch.zeros_like(x).index_add(0, places, x[places] + y)
    return (x.index_add_ if bug == "in place" else x.index_add)(0, places, y)


@cache
def solved_04a() -> dict:
    """Once: it trains."""
    return solved("04a")


def frozen(peak: float, n: int, reach: float = 1.165) -> int:
    return next(t for t in range(1, n + 1) if reach * peak * (1 + math.cos(math.pi * t / n)) / 2 <= 2**-9)


def untrained(folder: Path) -> torch.nn.Module:
    return AutoModelForCausalLM.from_config(AutoConfig.from_pretrained(folder)).float()


# of each check: wrong answers, and what the reader is told
WRONG = {
    "02.edits": [
        ({"n_layer": 12}, "no key of the model"),
        ({"n_layers": 12}, "moe_layers: layer"),
        ({"d_ff_expert": 1024}, "the whole model now has"),
        ({"n_experts": 4}, "the whole model now has"),
        ({"moe_top_k": 9}, "moe_top_k=9"),
        ({"moe_top_k": 3}, "K of E times"),
        ({"mod_capacity_factor": 0.1}, "K of E times"),
        ({}, "edits is a dict"),
    ],
    "02.depth_layer": [
        (partial(depth_layer, bug=bug), hint)
        for bug, hint in {
            "floor": "ceil",
            "lowest": "highest scores",
            "B04": "(B04)",
            "B17": "(B17)",
            "chosen only": "all T tokens",
            "B03": "(B03)",
            "zeroed": "(B03)",
            "B05": "does not multiply",
            "softmax": "sigmoid(score)",
            "detached": "no gradient",
            "in place": "writes into x",
        }.items()
    ],
    "02.verdicts": [
        (LEAKS | {"A": "causal"}, "A: change each token"),
        (LEAKS | {"B": "chunk"}, "B: no logit"),
        (LEAKS | {"C": "mask"}, "C: earlier logits move"),
        (LEAKS | {"D": "choice"}, "D: a choice leaves no gradient"),
        (LEAKS | {"D": "mask"}, "D: how far back"),
        (LEAKS | {"A": "leak"}, "use these words"),
        ({"A": "mask"}, "name all four"),
    ],
    "03.lr_to_move": [
        (lambda w: 2.0 ** (math.floor(math.log2(w)) - 7), "no whole gap"),
        (lambda w: 2.0 ** (math.floor(math.log2(w)) - 8), "at a power of two"),
        (lambda w: w / 512, "at 1.5 the gap"),
        (lambda w: 2.0**-8 if w > 1 else 2.0**-9, "right near 1"),
    ],
    "03a.frozen_from": [
        (lambda peak, n: 1 if peak < 2e-3 else frozen(peak, n, 1.0), "1.165"),
        (lambda peak, n: 101 if peak < 2e-3 else frozen(peak, n), "frozen from the first"),
        (lambda peak, n: 1 if peak < 1.6e-3 else n // 2, "half of the cosine"),
        (lambda peak, n: 1 if peak < 1.6e-3 else frozen(peak, n) + 1, "a little later"),
        (lambda peak, n: 1 if peak < 1.6e-3 else 147, "right for one cosine"),
    ],
    "04.to_original": [
        (lambda lr, rows, columns: lr, "two different steps"),
        (lambda lr, rows, columns: lr / (0.2 * math.sqrt(columns)), "the other way round"),
        (lambda lr, rows, columns: lr * math.sqrt(columns), "about 7.8"),
        (lambda lr, rows, columns: 0.2 * math.sqrt(max(rows, columns)) * lr, "a tall matrix"),
        (lambda lr, rows, columns: 0.2 * math.sqrt(min(rows, columns)) * lr, "a fan-in of 4096"),
    ],
    "04.conventions": [
        (CONVENTIONS | {"B": "original", "C": "plain"}, "tall matrices alone"),
        (CONVENTIONS | {"A": "original"}, "A: measure the RMS"),
        (CONVENTIONS | {"A": "muon"}, "the words are"),
        ({"A": "plain"}, "answer with a dict"),
    ],
    "04.config": [
        (CONFIG, "still short"),
        (CONFIG.replace("original", "match_rms_adamw"), "preflight still says lr_too_low"),
        (CONFIG.replace("0.0003", "0.02"), "more than twice"),
        (CONFIG.replace("0.0003", "0.00235").replace("0.3", "1.0"), "its rate hangs on the same line"),
        (CONFIG.replace("1536", "192"), "not the model"),
        (CONFIG.replace("muon", "adamw"), "stays Muon"),
    ],
    "04a.diagnoses": [
        (PATIENTS | {"B": "random tokens", "C": "a rate too low"}, "count how often"),
        (PATIENTS | {"A": "healthy"}, "look at the dtype"),
        (PATIENTS | {"D": "a rate too low"}, "before you call it sick"),
        (PATIENTS | {"C": "healthy"}, "which measurement"),
        (PATIENTS | {"A": "frozen"}, "the words are"),
        ({"A": "healthy"}, "answer with a dict"),
    ],
    "04a.cure": [
        (lambda config: config, "nothing has changed"),
        (lambda config: config.with_(training={"max_lr": 1.0}), "leave it"),
        (lambda config: config.with_(optimizer={"adamw_lr_ratio": 2.0}), "which group gains most"),
        (lambda config: config.with_(model={"d_model": 128}), "the optimizer alone"),
        (lambda config: {"embedding_lr_ratio": 1.0}, "return a config"),
    ],
    "06.diagnoses": [
        ({"A": set()}, "answer with a dict of A, B, C, D"),
        ({"A": "B05", "B": "", "C": "", "D": ""}, "give a set of ids each"),
        ({"A": {"B05"}, "B": {"B17"}, "C": set(), "D": set()}, "only B03 to B06"),
        ({"A": {"B05"}, "B": {"B03"}, "C": {"B04"}, "D": {"B06"}}, "B: B03 is not there"),
        ({"A": {"B05"}, "B": set(), "C": {"B04"}, "D": {"B06"}}, "D: something is missing"),
    ],
    "06.settings": [
        (small_config(), "leave the accumulation at 4"),
        (small_config().with_(training={"gradient_accumulation_steps": 4, "log_interval": 1}), "an interval of 1"),
        (small_config().with_(training={"gradient_accumulation_steps": 4, "log_interval": 10}), "it logs nothing"),
        (small_config().with_(training={"gradient_accumulation_steps": 4, "log_interval": 21}), "find an interval"),
        ({"log_interval": 9}, "give a config"),
    ],
    "06.worth": [
        (lambda losses, bug: (0.7, 0.1), "in the wrong order"),
        (lambda losses, bug: (-0.1, -0.7), "the loss before the repair"),
        (lambda losses, bug: (0.1, 0.7), "read all of them off"),
        (lambda losses, bug: (0.4, 0.4), "first: from all bugs"),
        (lambda losses, bug: (0.4,), "return two numbers"),
    ],
    "04a.shares": [
        (lambda none, muon, adamw, both: (muon - none, adamw - none), "positive"),
        (lambda none, muon, adamw, both: (none - muon, none - adamw), "leave 0.1 to nobody"),
        (lambda none, muon, adamw, both: (none - muon, muon - both), "one order of fixing"),
        (lambda none, muon, adamw, both: (adamw - both, none - adamw), "one order of fixing"),
        (lambda none, muon, adamw, both: (adamw - both, muon - both), "sum to what both"),
        (lambda none, muon, adamw, both: ((none - both) / 2,) * 2, "if it comes last"),
    ],
    "08.diagnoses": [
        (TRAINERS | {"D": "healthy"}, "ask its parameters"),
        (TRAINERS | {"A": "healthy"}, "ln V of its vocabulary"),
        (TRAINERS | {"C": "healthy"}, "do not ask the log"),
        (TRAINERS | {"B": "bfloat16 weights"}, "what is left to accuse"),
        ({"A": "healthy"}, "answer with a dict"),
        (TRAINERS | {"A": "ill"}, "the words are"),
    ],
    "08.load": [
        (lambda folder: AutoModelForCausalLM.from_pretrained(folder), "takes a dtype"),
        (untrained, "not the checkpoint's"),
        (lambda folder: None, "return the model"),
    ],
    "08.micro_loss": [
        (lambda token_sum, n, balance, items: None, "return a number"),
        (lambda token_sum, n, balance, items: token_sum / (items or n), "the pass is alone"),
        (lambda token_sum, n, balance, items: token_sum / n + 0.02 * balance, "twice the loss"),
        (lambda token_sum, n, balance, items: token_sum / (items or n) + 0.02 * balance, "Mixtral's"),
        (lambda token_sum, n, balance, items: token_sum / (items or n) + balance / (200 if items else 50), "add up to"),
    ],
    "09.settings": [
        ("precision.parameters=float32", "a list of texts"),
        (["model.d_ff=1024", "precision.parameters=float32"], "the model must stay"),
        (["training.activation_checkpointing=true"], "that is the sickness"),
        (["precision.parameters=float32"], "can be computed again"),
    ],
    "09.tokens": [(100_000, "a power of two"), (65_536, "Muon still makes"), (262_144, "would do")],
    "05.diagnosis": [
        ("not_in_optimizer", "a pair"),
        (("no_gradient", "4.weight"), "gradients do arrive"),
        (("loss_not_falling", "loss"), "the first finding is the cause"),
        (("lr_too_low", "4.weight"), "rule id of the first error"),
        (("not_in_optimizer", "2.weight"), "as in model.named_parameters"),
    ],
    "05.edits": [
        ({"precision.parameters": "float32"}, "muon_convention"),
        ({"training.max_lr": 0.001}, "bf16_parameters"),
        ({"precision.parameters": "float32", "training.max_lr": 0.02}, "lr_too_high"),
        ({"max_lr": 0.001}, "is no key"),
        ({"model.d_model": 64, "precision.parameters": "float32", "training.max_lr": 0.001}, "stay as they are"),
        ("float32", "a mapping"),
    ],
    "05.still": [
        ({"seq_norm.weight"}, "more kind of norm"),
        ({"seq_norm.weight", "q_proj.weight"}, "is no norm"),
        ({"ffn_norm.weight", "seq_norm.weight", "moved_norm.weight"}, "has moved"),
        ("seq_norm.weight", "a set"),
    ],
    "07.verdicts": [
        (RIGHT | {"W": "does not hold"}, "smaller than the spread"),
        (RIGHT | {"W": "holds"}, "smaller than the spread"),
        (RIGHT | {"X": "open"}, "each of them is far above"),
        (RIGHT | {"Y": "holds only if"}, "is it slower anywhere"),
        (RIGHT | {"Z": "holds"}, "at which is the opposite true"),
        (RIGHT | {"Z": "false"}, "'false' is no outcome"),
        ({"W": "open"}, "a verdict for each of W, X, Y, Z"),
    ],
    "07.faults": [
        (FAULTS | {"P": FAULTS["R"]}, "judge it again from its own numbers"),
        (FAULTS | {"Q": FAULTS["S"]}, "says about the config"),
        (FAULTS | {"R": FAULTS["P"]}, "makes you suspicious"),
        (FAULTS | {"S": FAULTS["R"]}, "a plus sign behind a commit"),
        (FAULTS | {"S": "dirty"}, "'dirty' is none of"),
    ],
    "07.settings": [
        (["training.max_lr=0.1"], "the parameters must stay bf16"),
        (["precision.parameters=bfloat16"], "every norm weight is exactly 1"),
        (["precision.parameter=bfloat16"], "did you mean parameters?"),
    ],
}


def accepts(check: str, answer: object) -> bool:
    number, _, name = check.partition(".")
    given = (checkpoint_of_norms(),) if name == "still" else ()
    return getattr(import_module(f"checks.exercises_{number}"), f"check_{name}")(answer, *given)


def checkpoint_of_norms() -> Path:
    """One in which a kind of norm has moved, and the others stand."""
    names = ("layers.0.seq_norm.weight", "layers.1.seq_norm.weight", "layers.0.ffn_norm.weight", "final_norm.weight")
    state = {name: torch.ones(4) for name in names} | {"layers.0.seq_layer.q_proj.weight": torch.zeros(2, 2)}
    state["layers.0.moved_norm.weight"] = torch.tensor([1.0, 1.5])
    path = Path(tempfile.mkdtemp()) / "norms.pt"
    torch.save({"model_state_dict": state}, path)
    return path


@pytest.mark.parametrize("check", WRONG)
def test_the_solutions_pass(check: str) -> None:
    number, _, name = check.partition(".")
    answers = solved_04a() if number == "04a" else solved(number)
    assert accepts(check, answers[{"shares": "shares_of_two", "config": "repaired"}.get(name, name)])


@pytest.mark.parametrize(("check", "wrong", "hint"), [(check, *row) for check, rows in WRONG.items() for row in rows])
def test_what_a_reader_is_likely_to_get_wrong_is_refused(check: str, wrong: object, hint: str, capsys) -> None:
    assert not accepts(check, wrong)
    assert hint in capsys.readouterr().out


# ---- the solutions and the package say the same ----------------------------------------------------------------------


@pytest.mark.parametrize("weight", [0.02001953125, 0.1, 0.25, 1.0, 1.0078125, 1.5, 3.0, 6.0])
def test_the_limit_of_a_weight_is_that_of_the_package(weight: float) -> None:
    kept = torch.tensor(weight).bfloat16()
    limit = solved("03")["lr_to_move"](kept.item())
    just_below, just_above = torch.tensor(-limit * (1 - 2**-10)), torch.tensor(-limit * (1 + 2**-10))
    assert is_lost(kept, just_below, torch.bfloat16) and not is_lost(kept, just_above, torch.bfloat16)


def test_learning_rates_and_shares_are_those_of_the_package() -> None:
    answers = solved("04")
    for shape in ((96, 96), (4096, 1536), (512, 1536), (1536, 4096)):
        assert math.isclose(answers["to_original"](3e-4, *shape), lr_original_from_match(3e-4, shape))
    losses = {frozenset(): 6.8, frozenset("m"): 6.7, frozenset("a"): 6.2, frozenset("ma"): 6.0}
    shares = shapley({fixed: -loss for fixed, loss in losses.items()}, "ma")
    assert solved_04a()["shares_of_two"](6.8, 6.7, 6.2, 6.0) == pytest.approx((shares["m"], shares["a"]))


def test_each_suspect_leaks_as_its_verdict_says() -> None:
    """Told apart by the two tests of the notebook, not by how they are made."""
    ids, found = torch.arange(24), {}
    for letter, network in exercises_02.suspects().items():
        rows = ids.expand(24, 24)
        changed = rows + torch.eye(24, dtype=torch.int64)
        with torch.no_grad():
            back = (network(changed).logits - network(rows).logits).abs().amax(dim=-1).tril(-1) > 1e-6
        captured = []
        network.embedding.register_forward_hook(lambda module, args, output, into=captured: into.append(output))
        (grad,) = torch.autograd.grad(network(ids[None]).logits[0, :12].square().sum(), captured)
        reach = [int(row.nonzero()[0]) for row in back if row.any()]
        known = "mask" if max(reach, default=0) == 0 else "chunk"
        found[letter] = "causal" if not reach else known if grad[0, 12:].any() else "choice"
    assert found == LEAKS
