"""The plan against reality: parameters against transformers' models, operations and memory against updates that run here."""

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.flop_counter import flop_registry

from moe_lab import build_model, load_config, plan
from moe_lab.__main__ import main
from moe_lab.config import ROOT, Config, ModelConfig
from moe_lab.model import count_parameters, heads, scan
from moe_lab.optim import build_optimizers, muon

SMOKE, LAB, CASE = (ROOT / "configs" / f"{name}.yaml" for name in ("smoke", "lab", "training_1.5b"))
CHANGES = {
    "lab under autocast": ["precision.compute=bfloat16"],
    "float32": ["precision.compute=float32", "model.d_model=96", "model.d_ff=256", "model.d_ff_expert=128"],
    "pure bf16, recomputed": [
        *("precision.parameters=bfloat16", "precision.compute=bfloat16"),
        "training.activation_checkpointing=true",
    ],
    "dense, AdamW alone": [
        *("precision.compute=float32", "optimizer.type=adamw", "model.moe_layers=[]", "model.mod_enabled=false"),
        *("model.mamba_enabled=false", "model.mamba_layers=[]", "model.vocab_size=512"),
    ],
}

# As published in each model's config.json on the hub; what they call active parameters beside it
QWEN = {"d_model": 2048, "n_heads": 32, "n_kv_heads": 4, "head_dim": 128, "n_experts": 128, "moe_top_k": 8}
OLMOE = {"d_model": 2048, "n_heads": 16, "n_kv_heads": 16, "n_experts": 64, "moe_top_k": 8}
MIXTRAL = {"d_model": 4096, "n_heads": 32, "n_kv_heads": 8, "n_experts": 8, "moe_top_k": 2}
PUBLIC = {
    "Mixtral": (MIXTRAL | {"vocab_size": 32000, "n_layers": 32, "d_ff_expert": 14336}, 46.7e9, 12.9e9),
    "Olmoe": (OLMOE | {"vocab_size": 50304, "n_layers": 16, "d_ff_expert": 1024}, 6.92e9, 1.28e9),
    "Qwen3Moe": (QWEN | {"vocab_size": 151936, "n_layers": 48, "d_ff_expert": 768}, 30.5e9, 3.35e9),
}


class Counted(TorchDispatchMode):
    """Operations of matrix products by torch's own table, which lacks grouped ones; convolutions are depthwise here, which
    it counts as if they were not."""

    flops = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out, name = func(*args, **(kwargs or {})), func.overloadpacket
        if name is torch.ops.aten._grouped_mm:
            self.flops += 2 * args[0].shape[0] * args[0].shape[1] * args[1].shape[-1]
        elif name in flop_registry and "convolution" not in str(name):
            self.flops += flop_registry[name](*args, **(kwargs or {}), out_val=out)
        return out


class Update:
    """A model that has made one update, as the trainer makes it."""

    def __init__(self, config: Config):
        self.config, self.model = config, build_model(config.model)
        if config.precision.parameters == "bfloat16":
            self.model.to(torch.bfloat16)
        self.model.recompute_blocks = config.training.activation_checkpointing
        self.optimizers = build_optimizers(self.model, config.optimizer, config.training.max_lr)
        batch = config.training.batch_size, config.model.max_seq_len + 1
        self.ids = torch.randint(config.model.vocab_size, batch, generator=torch.Generator().manual_seed(0))
        self.passes()
        self.step()

    def passes(self) -> None:
        with torch.autocast("cpu", torch.bfloat16, enabled=self.config.precision.compute == "bfloat16"):
            loss = sum(self.model.report(self.ids).terms.values())
        loss.backward()

    def step(self) -> None:
        for optimizer in self.optimizers:
            optimizer.step()

    def peak(self) -> int:
        """What the profiler sees allocated at most during the passes, beside what there was before."""
        cpu = [torch.profiler.ProfilerActivity.CPU]
        with torch.profiler.profile(activities=cpu, profile_memory=True) as profile:
            self.passes()
        events = [e for e in profile.profiler.kineto_results.events() if e.name() == "[memory]"]
        now = most = 0
        for event in sorted(events, key=lambda e: e.start_ns()):
            now += event.nbytes()
            most = max(most, now)
        return most


@pytest.fixture(scope="module", params=CHANGES)
def update(request: pytest.FixtureRequest) -> Update:
    return Update(load_config(LAB, ["training.batch_size=2", *CHANGES[request.param]]))


def test_memory_is_what_is_allocated(update: Update) -> None:
    states = [t for o in update.optimizers for kept in update_states(o) for t in kept.values()]
    held = sum(p.nbytes + p.grad.nbytes for p in update.model.parameters()) + sum(t.nbytes for t in states)
    planned = plan.memory(update.config)
    peak = update.peak()
    working = planned.activations + planned.logits + planned.recomputed
    assert working == pytest.approx(peak, rel=0.1)
    assert sum(planned) == pytest.approx(held + peak, rel=0.1)
    assert sum(planned) - working == pytest.approx(held, rel=0.001)


def test_a_loop_that_is_counted_once_takes_what_all_its_rounds_take(monkeypatch: pytest.MonkeyPatch) -> None:
    """Eight rounds of logits, of which the first fills autocast's cache, and blocks of Mamba's scan."""
    monkeypatch.setattr(heads, "LOGITS", 32 * 1024)
    monkeypatch.setattr(scan, "ELEMENTS", {})
    monkeypatch.setattr(scan, "ON_GPUS", 1)
    sizes = ["model.n_layers=3", "model.moe_layers=[1]", "model.mamba_layers=[2]", "model.vocab_size=1024"]
    changes = ["precision.compute=bfloat16", "training.activation_checkpointing=true", *sizes]
    config = load_config(LAB, ["training.batch_size=2", "model.max_seq_len=128", *changes])
    quick = plan.passes_bytes(config)
    monkeypatch.setattr(plan, "LOOPS", ())
    assert quick == plan.passes_bytes(config)


def update_states(optimizer: torch.optim.Optimizer) -> list[dict[str, torch.Tensor]]:
    return list(optimizer.state.values())


def test_operations_are_those_of_an_update(update: Update, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(muon, "fast_dtype", lambda device: torch.bfloat16)  # elsewhere fewer products are made
    planned = plan.flops(update.config)
    with Counted() as passes:
        update.passes()
    with Counted() as step:
        update.step()
    n_micro = update.config.training.gradient_accumulation_steps
    assert planned.passes == pytest.approx(passes.flops * n_micro, rel=0.1)
    assert planned.optimizer == pytest.approx(step.flops, rel=0.1)
    assert bool(step.flops) == (update.config.optimizer.type == "muon")


@pytest.mark.parametrize("name", PUBLIC)
def test_parameters_of_public_models(name: str) -> None:
    """Against transformers' model of the same sizes, and against what its authors say."""
    import transformers

    sizes, total, active = PUBLIC[name]
    common = {"moe_router_hidden": 0, "n_pred_tokens": 1, "aux_loss_weights": (1.0,)}
    count = count_parameters(ModelConfig(**sizes, **common, moe_layers=tuple(range(sizes["n_layers"]))))
    names = {"d_model": "hidden_size", "n_layers": "num_hidden_layers", "n_heads": "num_attention_heads"}
    names |= {"n_kv_heads": "num_key_value_heads", "vocab_size": "vocab_size", "moe_top_k": "num_experts_per_tok"}
    given = {names[key]: value for key, value in sizes.items() if key in names}
    given |= {"tie_word_embeddings": False, "head_dim": sizes.get("head_dim", 128), "num_experts": sizes["n_experts"]}
    given |= {"num_local_experts": sizes["n_experts"], "intermediate_size": sizes["d_ff_expert"]}
    given |= {"moe_intermediate_size": sizes["d_ff_expert"]}
    with torch.device("meta"):
        theirs = getattr(transformers, f"{name}ForCausalLM")(getattr(transformers, f"{name}Config")(**given))
    experts = sum(p.numel() for key, p in theirs.named_parameters() if ".experts." in key)
    whole = sum(p.numel() for p in theirs.parameters())
    assert count.total == pytest.approx(whole, rel=0.01)
    assert count.active == pytest.approx(whole - experts * (1 - sizes["moe_top_k"] / sizes["n_experts"]), rel=0.01)
    assert (count.total, count.active) == pytest.approx((total, active), rel=0.01)


def test_ranks_share_what_fsdp_shards() -> None:
    config = load_config(SMOKE, ["precision.compute=bfloat16"])
    one, four = plan.memory(config), plan.memory(config, ranks=4)
    assert four[:3] == tuple(size / 4 for size in one[:3])
    assert four[3:6] == one[3:6]  # each rank has its own batch
    assert four.gathered > 0 == one.gathered


def test_cost_by_hand() -> None:
    config = load_config(LAB, ["training.steps=1000"])
    found = plan.cost(config, tflops=100, utilisation=0.5, price=2, ranks=4)
    assert found.hours == pytest.approx(1000 * sum(plan.flops(config)) / (4 * 100e12 * 0.5) / 3600)
    assert found.money == pytest.approx(found.hours * 8)
    assert plan.batch_lr(4 * 4096) == pytest.approx(2 * plan.batch_lr(4096))
    with pytest.raises(ValueError, match="utilisation=1.5"):
        plan.cost(config, tflops=100, utilisation=1.5, price=2)


def test_the_case_is_planned_without_memory() -> None:
    """Its rough figures by hand: 2 bytes a bf16 weight and gradient, two moments of 2 bytes for a quarter, one for the rest."""
    config = load_config(CASE, ["precision.parameters=bfloat16", "training.activation_checkpointing=true"])
    planned, n = plan.memory(config), count_parameters(config.model).total
    assert planned.weights == planned.gradients == 2 * n
    assert 2 * n < planned.optimizer < 4 * n
    assert (
        planned.activations
        < 1.5e9
        < plan.memory(config.with_(training={"activation_checkpointing": False})).activations
    )
    muon_share = plan.flops(config).optimizer / sum(plan.flops(config))
    assert 0.6 < muon_share < 0.75  # 4,096 tokens an update: two thirds of the work is Muon's


def test_the_command_prints_the_plan(capsys: pytest.CaptureFixture) -> None:
    assert main(["plan", str(SMOKE), "precision.compute=bfloat16", "--ranks", "2", "--price", "2.5"]) == 0
    printed = capsys.readouterr().out
    assert "parameters: " in printed and "pure bf16, recomputed" in printed and "days" in printed
    assert main(["plan", str(SMOKE), "--utilisation", "2"]) == 2
    assert "utilisation=2" in capsys.readouterr().err
