"""What one pass shows to who listens: each fault in a small model beside its healthy look-alikes."""

import random

import pytest
import torch
import torch.nn.functional as F
import transformers
from helpers import MECHANISMS, model_with, random_ids
from test_examine import D, V, batch, loss_of
from torch import Tensor, nn

from moe_lab.failures.bugs import planted
from moe_lab.health import check_causality, examine
from moe_lab.model.attention import rotary


def said(model: nn.Module, loss_fn=loss_of, given=None) -> list[tuple[str, str]]:
    """Rule and place of what is at least a warning."""
    found = examine(model, batch() if given is None else given, loss_fn).findings
    return [(f.rule, f.where) for f in found if f.severity != "info"]


class GatedConvolution(nn.Module):
    """What takes a state space's place where its kernel is missing."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.conv, self.gate = nn.Conv1d(width, width, 4, padding=3, groups=width), nn.Linear(width, width)

    def forward(self, x: Tensor) -> Tensor:
        return self.conv(x.mT)[..., : x.shape[1]].mT * F.silu(self.gate(x))


class MambaNorm(nn.Module):
    """No memory, and none is promised: it has no matrix."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(width))

    def forward(self, x: Tensor) -> Tensor:
        return F.layer_norm(x, x.shape[-1:], self.weight)


class MambaBlock(nn.Module):
    def __init__(self, width: int) -> None:
        super().__init__()
        self.norm, self.mixer, self.mlp_of_mamba = (
            MambaNorm(width),
            nn.GRU(width, width, batch_first=True),
            nn.Linear(width, width),
        )

    def forward(self, x: Tensor) -> Tensor:
        x = x + self.mixer(self.norm(x))[0]
        return x + self.mlp_of_mamba(x)


class TimeFirst(nn.Module):
    def __init__(self, width: int) -> None:
        super().__init__()
        self.lstm = nn.LSTM(width, width)

    def forward(self, x: Tensor) -> Tensor:
        return self.lstm(x)[0]


class TimeFirstLSTM(TimeFirst):
    pass


class Window(nn.Module):
    """Attention to the last four tokens."""

    def forward(self, x: Tensor) -> Tensor:
        away = torch.arange(x.shape[1])[:, None] - torch.arange(x.shape[1])
        return F.scaled_dot_product_attention(x, x, x, attn_mask=(away >= 0) & (away < 4))


class Around(nn.Module):
    """A language model around one mixing layer, held under a name of one's choice."""

    def __init__(self, name: str, mixer: nn.Module) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.embedding, self.head, self.name = nn.Embedding(V, D), nn.Linear(D, V, bias=False), name
        self.add_module(name, mixer)

    def forward(self, ids: Tensor) -> Tensor:
        x, mixer = self.embedding(ids), getattr(self, self.name)
        return self.head(x + (mixer(x.transpose(0, 1)).transpose(0, 1) if isinstance(mixer, TimeFirst) else mixer(x)))


def test_a_norm_multiplies_each_token_by_a_factor_of_its_own() -> None:
    """A token without a mean comes out of a layer norm as it went in, but for its length; the text holds it in a third of its places."""
    model = Around("norm", nn.Sequential(nn.LayerNorm(D), nn.Linear(D, D, bias=False)))  # with a matrix, of no effect
    nn.init.eye_(model.norm[1].weight)
    ids = torch.where(torch.rand(3, 24) < 0.3, 0, torch.randint(1, V, (3, 24)))
    with torch.no_grad():
        model.embedding.weight[0] -= model.embedding.weight[0].mean()
    assert "scaled_copies" not in dict(said(model, given=(ids[:, :-1], ids[:, 1:])))


def test_a_norm_gives_tokens_of_one_length_one_factor() -> None:
    """Tokens without a mean, three of one kind of length: to one factor, and of others than that."""
    model = Around("norm", nn.LayerNorm(D))
    ids = torch.where(torch.rand(3, 25) < 0.3, torch.randint(3, (3, 25)), torch.randint(3, V, (3, 25)))
    with torch.no_grad():
        few = model.embedding.weight[:3]
        few -= few.mean(1, keepdim=True)
        few *= torch.tensor([[1.0], [1.0001], [1.0002]]) / few.norm(dim=1, keepdim=True)
    assert "scaled_copies" not in dict(said(model, given=(ids[:, :-1], ids[:, 1:])))


@pytest.mark.parametrize(
    ("name", "kind", "expected"),
    [
        ("mamba", GatedConvolution, [("short_memory", "mamba")]),
        ("conv", GatedConvolution, []),
        ("mixer", MambaBlock, []),
        ("mamba_norm", MambaNorm, []),
        ("mixer", TimeFirstLSTM, []),
        ("attention", lambda width: Window(), []),
    ],
)
def test_a_memory_that_ends_after_a_few_tokens(name: str, kind, expected: list) -> None:
    torch.manual_seed(0)
    many = tuple(x.repeat(3, 1) for x in batch())  # enough sequences to be taken for tokens
    found = [pair for pair in said(Around(name, kind(D)), given=many) if pair[0] != "repeated_data"]
    assert found == expected


class Stack(nn.Module):
    """Pre-norm blocks; `twice`: each adds its input once more, "dropped": the second one's is all that it returns, twice."""

    def __init__(self, twice: bool | str, n: int = 3) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.embedding, self.head = nn.Embedding(V, D), nn.Linear(D, V, bias=False)
        self.blocks = nn.ModuleList(Residual(twice if twice != "dropped" else n == 1 and "dropped") for n in range(n))

    def forward(self, ids: Tensor) -> Tensor:
        x = self.embedding(ids)
        for block in self.blocks:
            x = block(x)
        return self.head(F.layer_norm(x, x.shape[-1:]))


class Residual(nn.Module):
    def __init__(self, twice: bool | str) -> None:
        super().__init__()
        self.norm, self.up, self.down, self.twice = nn.LayerNorm(D), nn.Linear(D, 4 * D), nn.Linear(4 * D, D), twice

    def forward(self, x: Tensor) -> Tensor:
        inner = self.down(F.gelu(self.up(self.norm(x))))
        return x + x + 0 * inner if self.twice == "dropped" else x + inner + (x if self.twice else 0)


@pytest.mark.parametrize("twice", [False, True, "dropped"])
def test_a_residual_that_is_added_twice(twice: bool | str) -> None:
    found = [f for f in examine(Stack(twice), batch(), loss_of).findings if f.rule == "scaled_copies"]
    assert [(f.severity, f.where) for f in found] == (
        [("warning", f"blocks.{int(twice == 'dropped')}")] if twice else []
    )


class AdaptedNorm(nn.Module):
    """Brings small tokens to one size, times what two small matrices make of them."""

    def __init__(self) -> None:
        super().__init__()
        self.down, self.up = nn.Linear(D, 2, bias=False), nn.Linear(2, D, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        return F.layer_norm(x, (D,)) * (1 + 0.01 * self.up(self.down(x)))


class SmallTokens(nn.Module):
    """A table of small numbers, and two such norms behind each other's residual."""

    def __init__(self) -> None:
        super().__init__()
        self.embedding, self.head = nn.Embedding(V, D), nn.Linear(D, V)
        self.norms = nn.ModuleList([AdaptedNorm(), AdaptedNorm()])
        nn.init.normal_(self.embedding.weight, std=0.02)

    def forward(self, ids: Tensor) -> Tensor:
        x = self.embedding(ids)
        for norm in self.norms:
            x = x + 0.02 * norm(x)
        return self.head(x)


class Weighed(nn.Module):
    """Each token times a number of its own."""

    def __init__(self) -> None:
        super().__init__()
        self.down, self.up = nn.Linear(D, 4), nn.Linear(4, 1)

    def forward(self, x: Tensor) -> Tensor:
        return x * (20 * self.up(self.down(x))).exp().clamp(max=20)


def test_tokens_that_are_weighed_one_by_one_are_no_stream_that_grows() -> None:
    torch.manual_seed(0)
    model = SmallTokens()
    nn.init.normal_(model.embedding.weight)
    model.norms = nn.ModuleList([Weighed(), Weighed()])
    found = examine(model, batch(), loss_of).findings
    assert [f for f in found if f.rule == "scaled_copies"] == []


def test_a_norm_that_holds_matrices_is_no_block() -> None:
    torch.manual_seed(0)
    assert [f for f in examine(SmallTokens(), batch(), loss_of).findings if f.rule == "scaled_copies"] == []


@pytest.mark.parametrize("family", ["GPT2", "Llama", "OPT", "GPTNeoX"])
def test_blocks_that_add_their_input_once(family: str) -> None:
    sizes = {
        "vocab_size": V,
        "hidden_size": 16,
        "intermediate_size": 32,
        "num_hidden_layers": 3,
        "num_attention_heads": 2,
    }
    sizes |= {"n_embd": 16, "n_layer": 3, "n_head": 2, "ffn_dim": 32, "word_embed_proj_dim": 16}
    torch.manual_seed(0)
    model = transformers.AutoModelForCausalLM.from_config(getattr(transformers, f"{family}Config")(**sizes))
    ids = batch()[0]
    assert "scaled_copies" not in {f.rule for f in examine(model, {"input_ids": ids, "labels": ids}).findings}


def losses_of(model: nn.Module, ids: Tensor) -> Tensor:
    return sum(model.losses(ids).values())


@pytest.mark.parametrize("bug", [None, "B03", "B05", "B06", "B09", "B17"])
def test_the_cases_bugs_one_by_one(bug: str | None) -> None:
    """On the lab's model with every mechanism, off its start values."""
    wanted = {
        "B03": "scaled_copies",
        "B05": "no_gradient",
        "B06": "mode_mismatch",
        "B09": "short_memory",
        "B17": "rank_positions",
    }
    with planted(*([bug] if bug else [])):
        found = said(model_with("all"), losses_of, random_ids(2, 33))
    assert {rule for rule, _ in found} == ({wanted[bug]} if bug else set())


@pytest.mark.parametrize("all_places", [True, False])
def test_positions_of_a_model_that_makes_its_own_table(all_places: bool) -> None:
    """A mixture of depths whose attention cuts a table to its input's length, or takes all tokens."""

    class Chosen(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.score, self.proj = nn.Linear(D, 1), nn.Linear(D, D)
            self.cos, self.sin = (t[0, 0] for t in rotary(torch.arange(64).unsqueeze(0), D, 1e4))

        def attend(self, x: Tensor) -> Tensor:
            cos, sin = self.cos[: x.shape[1]], self.sin[: x.shape[1]]
            a, b = self.proj(x).chunk(2, -1)
            q = torch.cat([a * cos - b * sin, b * cos + a * sin], -1)
            return F.scaled_dot_product_attention(q, q, x, is_causal=True)

        def forward(self, x: Tensor) -> Tensor:
            scores = self.score(x)
            best = scores.squeeze(-1).topk(3 * x.shape[1] // 4, dim=1).indices.sort(dim=1).values.unsqueeze(-1)
            gate = scores.sigmoid()
            if all_places:
                return gate * self.attend(x)
            index = best.expand(-1, -1, D)
            return torch.zeros_like(x).scatter(1, index, gate.gather(1, best) * self.attend(x.gather(1, index)))

    found = [pair for pair in said(Around("depth", Chosen())) if pair[0] == "rank_positions"]
    assert found == ([] if all_places else [("rank_positions", "positions")])


def test_a_text_that_reads_otherwise_alone_than_as_the_start_of_a_longer_one() -> None:
    model = model_with("attention").eval()

    def grows(ids: Tensor) -> Tensor:
        return model(ids).logits * ids.shape[1] ** 0.5

    finding = check_causality(grows, 257, 12)
    assert (finding.rule, finding.severity, finding.where) == ("future_leak", "warning", "length")
    assert "the first 6 tokens" in finding.message


@torch.no_grad()
@pytest.mark.parametrize("length", [2, 40])
@pytest.mark.parametrize("name", MECHANISMS)
def test_lengths_beside_the_number_of_sequences_in_a_pass(name: str, length: int) -> None:
    model = model_with(name).eval()
    assert check_causality(lambda ids: model(ids).logits, 257, length) is None


def test_a_loss_that_differs_by_itself_says_nothing_of_a_tensor() -> None:
    """The part draws from another source than torch's."""

    class Drawing(Around):
        def forward(self, ids: Tensor) -> Tensor:
            return super().forward(ids) * float(1 + 0.01 * random.random())

    model = Drawing("conv", GatedConvolution(D))
    model.unused = nn.Linear(3, 3)
    examination = examine(model, batch(), loss_of)
    assert [f.rule for f in examination.findings if f.severity != "info"] == []
    assert examination.not_checked["gradients"] == "two passes with torch's random numbers held give two losses"


def llama() -> nn.Module:
    sizes = {"vocab_size": V, "hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 2}
    return transformers.LlamaForCausalLM(transformers.LlamaConfig(**sizes, num_attention_heads=2))


class CutOff(Around):
    """With many kinds of tensors that matter and get no gradient."""

    def __init__(self) -> None:
        super().__init__("mamba", GatedConvolution(D))
        self.parts = nn.ModuleDict({f"part_{letter}": nn.Linear(3, 3) for letter in "abcdefghi"})

    def forward(self, ids: Tensor) -> Tensor:
        return super().forward(ids) * (1 + sum(p.square().mean() for p in self.parts.parameters()).detach())


class ModesApart(Around):
    """`how` training differs from evaluation."""

    def __init__(self, how: str) -> None:
        super().__init__("mixer", GatedConvolution(D))
        self.how, self.generator = how, torch.Generator()
        # in no loss: asking about it takes passes
        self.part = nn.Linear(D, V) if how in ("left out", "noise") else None

    def forward(self, ids: Tensor) -> Tensor:
        scores = super().forward(ids)
        if not self.training:
            return scores + (self.part(self.embedding.weight[ids]) if self.how == "left out" else 0)
        if self.how == "noise":
            return scores + torch.rand_like(scores)
        if self.how == "own generator":  # it draws less than the modes are apart, and more than a leak may be
            return scores + 1 + 3e-4 * torch.randn(scores.shape, generator=self.generator)
        return scores + (scores.mean(1, keepdim=True) if self.how == "leak" else 0)


APART = {
    "leak": {"future_leak": "error", "mode_mismatch": "info"},
    "left out": {"mode_mismatch": "warning"},
    "noise": {},
    "own generator": {"mode_mismatch": "info"},
}


def counted(model: nn.Module, size: tuple) -> tuple[Tensor, list[int]]:
    """Ids of that size and one more a row, and a list that grows by the tokens of each pass."""
    seen: list[int] = []
    table = next(m for m in model.modules() if isinstance(m, nn.Embedding))
    table.register_forward_hook(lambda module, args, output: seen.append(args[0].numel()))
    return torch.arange(size[0] * (size[1] + 1)).view(size[0], -1) ** 2 % 31, seen


@pytest.mark.parametrize("size", [(32, 32), (4, 64)])
@pytest.mark.parametrize("how", APART)
def test_it_costs_no_more_where_the_modes_are_apart(how: str, size: tuple) -> None:
    model = ModesApart(how)
    ids, seen = counted(model, size)
    examination = examine(model, (ids[:, :-1], ids[:, 1:]), loss_of)
    assert sum(seen) <= 10 * size[0] * size[1]
    found = {f.rule: f.severity for f in examination.findings if f.rule in ("future_leak", "mode_mismatch")}
    assert found == APART[how]


@pytest.mark.parametrize("size", [(32, 32), (4, 64)])
@pytest.mark.parametrize("kind", ["own", "cut off", "llama"])
def test_it_costs_no_more_than_ten_forward_passes_and_one_backward_pass(kind: str, size: tuple) -> None:
    """In tokens."""
    model = {"own": lambda: Around("mamba", GatedConvolution(D)), "cut off": CutOff, "llama": llama}[kind]()
    ids, seen = counted(model, size)
    given = {"input_ids": ids, "labels": ids} if kind == "llama" else (ids[:, :-1], ids[:, 1:])
    not_checked = examine(model, given, None if kind == "llama" else loss_of).not_checked
    assert 4 * size[0] * size[1] < sum(seen) <= 10 * size[0] * size[1]
    assert set(not_checked) == {"config", "optimizers"} | (
        {"gradients", "arguments without effect"} if kind == "cut off" else set()
    )
    assert "not tried, to save forward passes" in not_checked.get("gradients", "not tried, to save forward passes")


class Unrolled(nn.Module):
    """A cell that is called token by token; `how` it gets its state."""

    def __init__(self, how: str, kind: type = nn.GRUCell) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.how, self.embedding, self.cell, self.head = how, nn.Embedding(V, D), kind(D, D), nn.Linear(D, V)

    def forward(self, ids: Tensor) -> Tensor:
        h, states = None, []
        for t, x in enumerate(self.embedding(ids).unbind(1)):
            if h is not None and (self.how == "detached" or (self.how == "by windows" and t % 4 == 0)):
                h = tuple(part.detach() for part in h) if isinstance(h, tuple) else h.detach()
            h = self.cell(x) if self.how == "lost" else self.cell(x, h)
            states.append(h[0] if isinstance(h, tuple) else h)
        return self.head(torch.stack(states, 1))


@pytest.mark.parametrize("kind", [nn.GRUCell, nn.LSTMCell])
@pytest.mark.parametrize("how", ["detached", "lost", "by windows", "handed on"])
def test_a_cell_whose_state_nothing_learns_through(how: str, kind: type) -> None:
    assert said(Unrolled(how, kind)) == ([("short_memory", "cell")] if how in ("detached", "lost") else [])


class Gate(nn.Module):
    """A cell that mixes two streams, part by part."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.embedding, self.cell, self.head = nn.Embedding(V, D), nn.GRUCell(D, D), nn.Linear(D, V)

    def forward(self, ids: Tensor) -> Tensor:
        x = self.embedding(ids)
        return self.head(torch.stack([self.cell(part, torch.ones_like(part)) for part in x.unbind(1)], 1))


def test_a_cell_that_is_a_gate_remembers_nothing_and_need_not() -> None:
    assert said(Gate()) == []


class Reader(nn.Module):
    """A sentence's class, read out at its first token; torch's mask is True where nothing is to be read."""

    def __init__(self, first: bool = True) -> None:
        super().__init__()
        self.first, self.tokens = first, nn.Embedding(V, D)
        self.layer = nn.TransformerEncoderLayer(D, 2, 2 * D, dropout=0.0, batch_first=True, norm_first=True)
        self.head = nn.Linear(D, 4)

    def forward(self, ids: Tensor, mask: Tensor | None) -> Tensor:
        y = self.layer(self.tokens(ids), src_key_padding_mask=mask)
        return self.head(y[:, 0] if self.first else y.mean(1))


@pytest.mark.parametrize(
    ("kind", "told"),
    [("reversed", True), ("right", False), ("none", False), ("no padding", False), ("mean", False), ("last", False)],
)
def test_a_mask_that_is_the_wrong_way_round(kind: str, told: bool) -> None:
    torch.manual_seed(0)
    ids = torch.randint(1, V, (16, 20))
    is_padding = (torch.arange(20) >= torch.randint(8, 16, (16, 1))) & (kind not in ("no padding", "last"))
    ids[is_padding] = 0
    masks = {"reversed": ~is_padding, "right": is_padding, "no padding": torch.arange(20).expand(16, -1) > 0}

    def loss(model: nn.Module, batch: tuple) -> Tensor:
        return F.cross_entropy(model(batch[0], masks.get(kind)), batch[1])

    if kind == "last":  # that alone is read, and in a row or two it is the one before it, too
        ids[:, -1] = 1 + torch.arange(16) % 2
        ids[0, -2:] = 1

        def loss(model: nn.Module, batch: tuple) -> Tensor:
            return F.cross_entropy(model.head(model.tokens(batch[0])[:, -1]), batch[1])

    found = said(Reader(first=kind != "mean"), loss, (ids, torch.arange(16) % 4))
    assert found == ([("no_effect", "mask")] if told else [])


# ---- rows that get no gradient, and classes that are left out --------------------------------------------------------


class Related(nn.Module):
    """Numbers (B, 8) and one id, (B,), or several, (B, T), whose vectors are added up."""

    def __init__(self, padding_idx: int | None, zeros: bool) -> None:
        super().__init__()
        self.table, self.head = nn.Embedding(4, 8, padding_idx=padding_idx), nn.Linear(8, 3)
        if not zeros:
            nn.init.normal_(self.table.weight)

    def forward(self, x: Tensor, ids: Tensor) -> Tensor:
        vectors = self.table(ids)
        return self.head(x + (vectors.sum(1) if vectors.ndim == 3 else vectors))


def ending(n_rows: int, length: int, at_start: bool = False) -> Tensor:
    """Ids from 1 on, with zeros at the end of rows, or at their start."""
    ids, n = torch.randint(1, 4, (n_rows, length)), torch.randint(1, length, (n_rows, 1))
    padded = ids.masked_fill(torch.arange(length) >= n, 0)
    return padded.flip(1) if at_start else padded


ROWS = {  # padding_idx, whether its row is zeros, the ids, and what is said
    "one of four": (0, False, lambda: torch.randint(4, (64,)), ["warning"]),
    "within rows": (0, False, lambda: torch.randint(4, (64, 6)), ["warning"]),
    "nothing known": (0, True, lambda: torch.randint(4, (64,)), ["info"]),
    "no row of padding": (None, False, lambda: torch.randint(4, (64,)), []),
    "padding": (0, False, lambda: ending(64, 6), []),
    "padding before": (0, False, lambda: ending(64, 6, at_start=True), []),
    "from one on": (0, False, lambda: torch.randint(1, 4, (64,)), []),
}


@pytest.mark.parametrize("kind", ROWS)
def test_a_row_without_a_gradient_that_stands_for_something(kind: str) -> None:
    torch.manual_seed(0)
    padding_idx, zeros, ids, wanted = ROWS[kind]
    batch = torch.randn(64, 8), ids(), torch.randint(3, (64,))
    loss_fn = lambda model, batch: F.cross_entropy(model(batch[0], batch[1]), batch[2])  # noqa: E731
    found = examine(Related(padding_idx, zeros), batch, loss_fn).findings
    assert [f.severity for f in found if f.where == "table"] == wanted


class Tagger(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.table, self.cell, self.head = nn.Embedding(30, 16), nn.GRU(16, 16, batch_first=True), nn.Linear(16, 5)

    def forward(self, ids: Tensor) -> Tensor:
        return self.head(self.cell(self.table(ids))[0])


def tags(ids: Tensor) -> Tensor:
    return (ids - 15).clamp(min=0) % 5


LEFT_OUT = {  # the targets of ids, ignore_index, and whether it is told
    "the commonest tag": (tags, 0, True),
    "padding": (lambda ids: torch.where(ids == 0, 0, 1 + tags(ids) % 4), 0, False),
    "nothing": (tags, -100, False),
    "a class that does not come": (lambda ids: tags(ids).clamp(max=3), 4, False),
}


@pytest.mark.parametrize("kind", LEFT_OUT)
@pytest.mark.parametrize("time_first", [False, True])
def test_a_class_that_the_loss_leaves_out(kind: str, time_first: bool) -> None:
    torch.manual_seed(0)
    target, left_out, told = LEFT_OUT[kind]
    ids = torch.randint(1, 30, (32, 12)).masked_fill(torch.arange(12) >= torch.randint(4, 13, (32, 1)), 0)

    def loss_fn(model: nn.Module, batch: tuple[Tensor, Tensor]) -> Tensor:
        given = batch[0].T if time_first else batch[0]
        logits = model(given).transpose(0, 1) if time_first else model(given)
        return F.cross_entropy(logits.flatten(0, 1), batch[1].flatten(), ignore_index=left_out)

    batch = tuple(t.T.contiguous() if time_first else t for t in (ids, target(ids)))
    found = examine(Tagger(), batch, loss_fn).findings
    assert [f.where for f in found if f.rule == "never_a_target"] == ["loss"] * told


class Moved(nn.Module):
    """Factors that were a parameter, until they were moved to another format."""

    def __init__(self) -> None:
        super().__init__()
        self.linear, self.factors = nn.Linear(8, 3), nn.Parameter(torch.randn(8).double()).float()

    def forward(self, x: Tensor) -> Tensor:
        return self.linear(x * self.factors)


def test_a_parameter_that_was_moved_is_told_and_stops_nothing() -> None:
    model = Moved()
    batch, loss_fn = (torch.randn(64, 8), torch.randint(3, (64,))), lambda m, b: F.cross_entropy(m(b[0]), b[1])
    told = examine(model, batch, loss_fn, torch.optim.Adam(model.parameters()))
    (found,) = [f for f in told.findings if f.rule == "not_in_optimizer"]
    assert "Moved.factors (8,)" in found.message and model.factors.grad_fn is not None


class Recurrent(nn.Module):
    """A sentence's class, from what a GRU says at each token."""

    def __init__(self, reads: str, batch_first: bool) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.reads, self.tokens, self.head = reads, nn.Embedding(V, D, padding_idx=0), nn.Linear(D, 4)
        self.cell = nn.GRU(D, D, batch_first=batch_first)

    def forward(self, ids: Tensor) -> Tensor:
        y, x = self.cell(self.tokens(ids))[0], ids
        if not self.cell.batch_first:
            y, x = y.transpose(0, 1), ids.T
        ends = {"behind": -1, "at the end": (x > 0).sum(1) - 1}
        return self.head(y.mean(1) if self.reads == "of all" else y[torch.arange(len(x)), ends[self.reads]])


@pytest.mark.parametrize("batch_first", [True, False])
@pytest.mark.parametrize(("reads", "told"), [("behind", True), ("at the end", False), ("of all", False)])
def test_an_answer_that_is_read_behind_the_padding(reads: str, told: bool, batch_first: bool) -> None:
    """A mean over all places weighs padding as much as text; the last of all places has forgotten the text."""
    torch.manual_seed(0)
    ids = torch.randint(1, V, (16, 32))
    ids[torch.arange(32) >= torch.randint(4, 24, (16, 1))] = 0
    loss, classes = lambda model, x: F.cross_entropy(model(x), classes), torch.randint(4, (16,))
    found = examine(Recurrent(reads, batch_first), ids if batch_first else ids.T, loss).findings
    assert [f.rule for f in found if "padding" in f.where] == ["no_effect"] * told
