"""The code blocks of README.md and of the family READMEs run and mean what the text says."""

from __future__ import annotations

import inspect
import json
import operator
import re
from pathlib import Path
from typing import Any

import ops
import pytest
import torch
from torch.nn.functional import cross_entropy, linear, logsigmoid
from torch.testing import assert_close

import reasonkern as rk
from reasonkern import _load

ROOT = Path(__file__).parent.parent
PAGES = [
    *ROOT.glob("*.md"), *ROOT.glob("docs/*.md"), *ROOT.glob("reasonkern/*/*.md"),
    *ROOT.glob("benchmarks/results/*.md"),
]  # fmt: skip
V, D = 50, 8


def blocks(page: str, heading: str = "") -> list[str]:
    text = (ROOT / page).read_text()
    section = text.partition(heading)[2].partition("\n## ")[0] if heading else text
    return re.findall(r"```python\n(.*?)```", section, re.S)


def anchors(page: Path) -> set[str]:
    titles = re.findall(r"^#+ (.*)$", page.read_text(), re.M)
    return {re.sub(r"[^\w\- ]", "", t.strip().lower()).replace(" ", "-") for t in titles}


@pytest.mark.parametrize("page", PAGES, ids=lambda p: str(p.relative_to(ROOT)))
def test_links(page: Path) -> None:
    for link in re.findall(r"\]\(([^)\s]+)\)", page.read_text()):
        if link.startswith("http"):
            continue
        path, _, anchor = link.partition("#")
        target = page.parent / path if path else page
        assert target.exists(), link
        assert not anchor or anchor in anchors(target), link


# ---- the numbers

CPU_RESULT = "amd-epyc-zen5-2core/2026-11-26-a37cea3.json"
GPU_RESULT = "h200/2026-11-27-9f4b0a9.json"
GPU_RESULT_WITH_TRL = "h200/2026-11-27-9a9ca4f.json"
LOSS = "policy_loss/dapo-{}inplace/{}x151936/{}"


def measured(file: str, case: str) -> dict[str, dict[str, Any]]:
    content = json.loads((ROOT / "benchmarks/results" / file).read_text())
    (found,) = (c for c in content["cases"] if c["id"].startswith(case))
    return {provider["name"]: provider for provider in found["providers"]}


def milliseconds(provider: dict[str, Any]) -> str:
    return f"{provider['seconds']['median'] * 1e3:.3g}"


def test_the_numbers_are_those_of_the_committed_results() -> None:
    text = (ROOT / "README.md").read_text().partition("## Measured")[2].partition("\n## ")[0]
    assert CPU_RESULT in text and GPU_RESULT in text
    cpu, gpu, gpu_entropy = re.findall(r"^\| (?:2 cores|NVIDIA H200).*$", text, re.M)
    ran = measured(CPU_RESULT, LOSS.format("entropy-", 256, "float32/t2"))
    for name in ("eager", "compile"):
        assert f"{ran[name]['ratio']['median']:.0f} ×" in cpu
    assert 0.95 < ran["reasonkern"]["copy_share"] < 1.05
    ran = measured(GPU_RESULT, LOSS.format("", 8192, "bfloat16"))
    for name in ("ours-cuda", "liger", "compile", "eager"):
        assert milliseconds(ran[name]) in gpu
    assert f"{ran['ours-cuda']['copy_share']:.0%}".replace("%", " %") in gpu
    earlier = measured(GPU_RESULT_WITH_TRL, LOSS.format("", 8192, "bfloat16"))
    trl, ours = (milliseconds(earlier[name]) for name in ("trl", "ours-cuda"))
    assert f"{GPU_RESULT_WITH_TRL}) {trl} (reasonkern {ours})" in gpu
    ran = measured(GPU_RESULT, LOSS.format("entropy-", 8192, "bfloat16"))
    for name in ("ours-cuda", "compile", "eager"):
        assert milliseconds(ran[name]) in gpu_entropy


# ---- the table of operators


def test_the_table_of_operators_is_up_to_date() -> None:
    """After a change: python tests/ops.py."""
    (table,) = ops.TABLE.findall(ops.TARGET.read_text())
    assert table == ops.render()


def test_the_table_holds_every_operator_and_public_function() -> None:
    """A new one gets a row in tests/ops.py."""
    assert {name for row in ops.ROWS for name in row.operators} == set(_load._ops)
    named = {name for row in ops.ROWS for name in row.functions}
    public = {n for n in rk.__all__ if inspect.isfunction(getattr(rk, n))} | {"NgramTable"}
    assert public - {"info"} <= named
    for name in named - {"shaping.*", "scaling.*"}:
        assert operator.attrgetter(name)(rk)


def test_backends_of_the_table_are_those_of_this_machine() -> None:
    """Where the library is built, the sources and the dispatcher say the same."""
    if _load.reason("cpu"):
        pytest.skip(_load.reason("cpu"))
    assert {name for name in _load._ops if not _load._missing(name, "cpu")} == ops.registered(False)


# ---- the trainer


def batch() -> dict[str, Any]:
    """The names that the blocks of the trainer use, the same values each time."""
    g = torch.Generator().manual_seed(3)

    def randn(*shape: int) -> torch.Tensor:
        return torch.randn(*shape, generator=g)

    targets, hidden = torch.randint(V, (2, 5), generator=g), randn(2, 5, D).requires_grad_()
    head = torch.nn.Linear(D, V, bias=False)
    head.weight.data = randn(V, D)
    logits = linear(hidden, head.weight).detach()
    old = rk.token_stats(logits, targets, temperature=0.8).logprob + randn(2, 5) / 2
    mask = torch.tensor([[0.0, 1, 1, 1, 1], [1, 1, 1, 0, 0]])
    return {
        "torch": torch, "rk": rk, "logits": logits.requires_grad_(), "targets": targets,
        "mask": mask, "advantage": randn(2, 5), "old_logprob": old, "temperature": 0.8,
        "hidden": hidden, "lm_head": head,
    }  # fmt: skip


def test_before_and_after() -> None:
    before, after, _ = blocks("README.md", "## Your trainer, before and after")
    eager, ours = batch(), batch()
    leaf = ours["logits"]
    ours["logits"] = leaf.mul(1)  # a model's output: not a leaf, and may be overwritten
    exec(before, eager)
    exec(after.removeprefix("import reasonkern as rk\n"), ours)
    ratio = (eager["logprob"] - eager["old_logprob"]).exp()
    assert (ratio < 0.8).any() and (ratio > 1.28).any()
    assert_close(ours["out"].loss, eager["loss"])
    assert_close(leaf.grad, eager["logits"].grad)
    assert ours["metrics"]["rows_active"] == 7 and ours["metrics"]["clip_frac"] > 0


def test_targets_and_mask_of_labels() -> None:
    *_, code = blocks("README.md", "## Your trainer, before and after")
    labels = torch.tensor([[-100, -100, 3, 4, 5], [-100, 6, 7, -100, -100]])
    here: dict[str, Any] = {"F": torch.nn.functional, "labels": labels}
    exec(code, here)
    assert here["targets"].tolist() == [[-100, 3, 4, 5, -100], [6, 7, -100, -100, -100]]
    assert here["mask"].tolist() == [[False, True, True, True, False], [True, True] + 3 * [False]]
    logits, objective = batch()["logits"], rk.Objective.gpg()
    given = {"advantage": torch.ones(2), "weight": rk.token_weights(here["mask"])}
    out = rk.policy_loss(logits, here["targets"], objective=objective, **given)
    assert_close(out.loss, cross_entropy(logits.flatten(0, 1), here["targets"].flatten()))


def test_custom_and_without_logits() -> None:
    custom, chunked = blocks("README.md", "## Your trainer: objectives")
    here = batch()
    given = {n: here[n] for n in ("targets", "old_logprob", "advantage")}
    given["weight"] = rk.token_weights(here["mask"], "token-mean")
    exec(chunked, here)
    here["out"].loss.backward()
    dense = rk.policy_loss(here["logits"], objective=rk.Objective.dapo(), **given)
    dense.loss.backward()
    assert_close(here["out"].loss, dense.loss)
    assert_close(here["hidden"].grad, here["logits"].grad @ here["lm_head"].weight)
    exec(custom, here)
    logprob = rk.token_stats(here["logits"], here["targets"]).logprob
    gain = (logprob - here["old_logprob"]).exp() * here["advantage"].clamp_min(0)
    assert_close(here["out"].loss, -(gain * given["weight"]).sum())


def test_gspo_with_its_terms() -> None:
    """k3 to the reference, and the engine's weight, e^2 in the second sequence, cut to 2."""
    (code,) = re.findall(r"`(rk\.Objective\..*importance=.*)`", (ROOT / "README.md").read_text())
    b = batch()
    old, advantage, mask = b["old_logprob"], torch.tensor([1.0, -1.0]), b["mask"]
    weight = rk.token_weights(mask, "seq-mean-token-mean")
    out = rk.policy_loss(
        b["logits"], b["targets"], old_logprob=old, advantage=advantage, weight=weight,
        ref_logprob=old, rollout_logprob=old - torch.tensor([[0.0], [2.0]]),
        objective=eval(code, {"rk": rk}),
    )  # fmt: skip
    d = old - rk.token_stats(b["logits"], b["targets"]).logprob
    ratio = (-(d * mask).sum(-1) / mask.sum(-1)).exp()
    clipped = torch.minimum(ratio * advantage, ratio.clamp(0.9997, 1.0004) * advantage)
    token = -clipped[:, None] * torch.tensor([[1.0], [2.0]]) + 0.01 * (d.exp() - d - 1)
    assert_close(out.loss, (weight * token).sum())


@pytest.mark.parametrize("own", ["dpo", "simpo"])
def test_preference_losses(own: str) -> None:
    """Two pairs of the family's page against autograd, from logits and from hidden states."""
    page = "reasonkern/policy_loss/README.md"
    (code,) = blocks(page, "## Preference losses")
    g = torch.Generator().manual_seed(3)
    hidden, head, ref = (
        torch.randn(shape, generator=g, dtype=torch.float64)
        for shape in ((4, 6, D), (V, D), (4, 6))
    )
    targets, mask = torch.randint(V, (4, 6), generator=g), torch.rand(4, 6, generator=g) < 0.7
    ours, chunked, plain = (head.clone().requires_grad_() for _ in range(3))

    logprob = linear(hidden, plain).log_softmax(-1).gather(-1, targets[..., None])[..., 0]
    if own == "dpo":
        margin = ((logprob - ref) * mask).sum(-1)
    else:
        margin = (logprob * mask).sum(-1) / mask.sum(-1) - torch.tensor([0.5, 0]).repeat(2)
        (text,) = re.findall(r"`(ctx\.sequence_sum\(.*\(1\))`", (ROOT / page).read_text())
        code = re.sub(r"margin = .*", f"margin = {text}", code).replace("1::2])", "1::2] - 0.5)")
    expected = -logsigmoid(0.1 * (margin[0::2] - margin[1::2])).mean()
    expected.backward()

    scope = {"rk": rk, "targets": targets, "mask": mask, "ref_logprob": ref}
    scope["logits"] = linear(hidden, ours)
    from_hidden = re.sub(r"\.policy_loss\(\s*logits", ".linear_policy_loss(hidden, head", code)
    from_hidden = re.sub("inplace_grad=True,", "", from_hidden)
    scope |= {"hidden": hidden, "head": chunked}
    for trained, now in ((ours, code), (chunked, from_hidden)):
        exec(now, scope)
        assert_close(scope["out"].loss, expected)
        scope["out"].loss.backward()
        assert_close(trained.grad, plain.grad)


# ---- the decoder


class Toy:
    """A model whose logits depend on the last two tokens."""

    def __init__(self) -> None:
        g = torch.Generator().manual_seed(5)
        self.embedding = torch.randn(V, 16, generator=g)
        self.head = torch.randn(16, V, generator=g)

    def __call__(self, text: list[int]) -> torch.Tensor:
        state = self.embedding[text[-1]] + self.embedding[text[-2]] / 2
        return state.tanh() @ self.head

    def tree(self, texts: list[list[int]], tokens: torch.Tensor, tree: rk.DraftTree) -> Any:
        """(B, nodes, V), each node after the tokens that the attention mask shows it."""
        seen = tree.attention_mask()
        rows = [
            [self(text[:-1] + draft[row].tolist()) for row in seen]
            for text, draft in zip(texts, tokens, strict=True)
        ]
        return torch.stack([torch.stack(r) for r in rows])


def cache(texts: list[list[int]], drafted: torch.Tensor) -> torch.Tensor:
    """(B, 1, S, 1): each token's entry is the token; the nodes lie behind what is committed."""
    rows = [text[:-1] + tokens for text, tokens in zip(texts, drafted.tolist(), strict=True)]
    size = max(map(len, rows))
    return torch.tensor([row + [-1] * (size - len(row)) for row in rows]).double()[:, None, :, None]


def decode(code: str, scope: dict[str, Any], texts: list[list[int]], length: int) -> int:
    """Runs the block's first part once and its loop until every text is long enough."""
    once, step = re.split("# every step.*\n", code)
    exec(once, scope)
    scope["model_of_tree"] = lambda tokens: Toy().tree(texts, tokens, scope["tree"])
    steps = 0
    while min(map(len, texts)) < length:
        lengths = torch.tensor([len(text) for text in texts])
        now = {"context": torch.tensor([text[-4:] for text in texts]), "position": lengths}
        for name in now if steps and "context, position =" in step else ():
            assert torch.equal(scope[name], now[name])
        scope |= now | {"lengths": lengths}
        exec(step, scope)
        out, key = scope.get("step") or scope["verified"], cache(texts, scope["draft"].tokens)
        call = re.search(r"^# (rk\.compact_kv_\(.*\))$", step, re.M)
        if call:
            exec(call[1], scope | now | {"keys": [key], "values": [key.clone()]})
        for text, tokens, n in zip(texts, out.tokens.tolist(), out.length.tolist(), strict=True):
            text += tokens[:n]
        for text, entries in zip(texts, key[:, 0, :, 0].tolist(), strict=True):
            assert not call or entries[: len(text) - 1] == text[:-1]
        steps += 1
    return steps


@pytest.mark.parametrize("page", ["README.md", "reasonkern/speculation/README.md"])
def test_decoder(page: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The text is the plain sampler's, in fewer passes than tokens."""
    monkeypatch.chdir(tmp_path)
    rk.DraftTree.default(16).save("tree.json")
    plain = "token = rk.sample(logits, temperature=0.6, seed=seed, position=position)"
    if page == "README.md":
        plain, after = blocks(page, "## Your decoder")
    else:
        (after,) = blocks(page)
    prompts, length, scope = [[1, 2, 3, 4], [9, 8, 7, 6, 5]], 90, {"rk": rk, "batch": 2}
    seeds = scope["seed"] = rk.request_seeds(0, 2)
    texts = [list(prompt) for prompt in prompts]
    steps = decode(after, scope, texts, length)
    for text, prompt, seed in zip(texts, prompts, seeds, strict=True):
        expected = list(prompt)
        while len(expected) < length:
            here = {"rk": rk, "logits": Toy()(expected)[None], "seed": seed[None]}
            exec(plain, here | {"position": len(expected)}, here)
            expected.append(here["token"].item())
        assert text[:length] == expected
    assert steps < length - 4


class Tokenizer:
    """Of a vocabulary of a few pieces."""

    pieces = ("<pad>", "wait", "Wait", "but", "But", "\n", "</think>")

    def get_vocab(self) -> dict[str, int]:
        return {piece: index for index, piece in enumerate(self.pieces)}

    def convert_tokens_to_ids(self, piece: str) -> int:
        return self.pieces.index(piece)

    def encode(self, text: str, add_special_tokens: bool = True) -> list[int]:
        beginning = [0] if add_special_tokens else []  # which must not get into a phrase
        return beginning + [self.pieces.index(piece) for piece in re.findall(r"\n|\S+", text)]


def test_control() -> None:
    """The wave is at its top after a quarter of the period; the budget's phrase is forced."""
    (code,) = blocks("README.md", "## Your decoder: reflection")
    begin, step = code.split("# every step")
    here: dict[str, Any] = {"torch": torch, "rk": rk, "tokenizer": Tokenizer(), "prompt": [0]}
    exec(begin.replace("1200", "8").replace("4096", "5"), here)
    here |= {"slot": torch.tensor([0]), "seed": rk.request_seeds(0, 1)}
    text, raised = [], []
    for t in range(8):
        here |= {"logits": torch.zeros(1, V), "position": t}
        exec("#" + step, here)
        text.append(here["token"].item())
        raised.append(here["logits"][0, 2].item())
    assert raised[:5] == [0.0, 2.5, 5.0, 2.5, 0.0] and text[5:7] == [5, 6]
    assert raised[7] == 0  # thinking is over


# ---- transformers


@pytest.fixture(scope="module")
def user() -> dict[str, Any]:
    """What a user has: a model and its tokenizer, and the ids of left-padded prompts."""
    transformers = pytest.importorskip("transformers", reason="needs transformers")
    torch.manual_seed(0)
    config = transformers.Qwen3Config(
        vocab_size=V, hidden_size=32, intermediate_size=48, num_hidden_layers=2, head_dim=8,
        num_attention_heads=4, num_key_value_heads=2, pad_token_id=0, eos_token_id=None,
    )  # fmt: skip
    model = transformers.Qwen3ForCausalLM(config).double().eval()
    for parameter in model.parameters():
        if parameter.ndim > 1:
            torch.nn.init.normal_(parameter, std=0.3)

    class Tokenizer:
        def batch_decode(self, rows: torch.Tensor) -> list[str]:
            return [" ".join(map(str, row.tolist())) for row in rows]

    mask = (torch.arange(6) >= torch.tensor([[0], [2]])).long()
    ids = torch.randint(1, V, (2, 6), generator=torch.Generator().manual_seed(2)) * mask
    return {
        "rk": rk, "torch": torch, "model": model, "tokenizer": Tokenizer(), "input_ids": ids,
        "attention_mask": mask,
    }  # fmt: skip


def shorter(code: str) -> str:
    return re.sub(r"max_new_tokens=\d+", "max_new_tokens=40", code)


@pytest.mark.peers
def test_transformers(user: dict[str, Any], capsys: pytest.CaptureFixture[str]) -> None:
    """The README's section alone: a call before and a call after."""
    before, after = blocks("README.md", "## Your transformers model")
    exec(shorter(before), user)
    assert user["out"].shape == (2, 46)
    exec(shorter(after), user)
    found = user["out"]
    assert found.sequences.shape == (8, 46) and len(user["table"]) > 100
    assert "tokens in" in capsys.readouterr().out
    plain = re.sub(r",? table=table", "", shorter(after))
    exec(plain, user)
    assert torch.equal(user["out"].sequences, found.sequences)


class Layer(torch.nn.Module):
    """Two heads, and positions that are added to what they look for."""

    def __init__(self) -> None:
        super().__init__()
        self.project = torch.nn.Linear(16, 48)
        self.place = torch.nn.Embedding(64, 16)

    def qkv(self, x: torch.Tensor, positions: torch.Tensor) -> Any:
        three = self.project(x + self.place(positions)).unflatten(-1, (3, 2, 8))
        return three.permute(2, 0, 3, 1, 4)

    def out(self, x: torch.Tensor, mixed: torch.Tensor) -> torch.Tensor:
        return x + mixed.transpose(1, 2).flatten(2)


def test_a_model_of_your_own() -> None:
    """The loop around it gives the text of its logits over whole texts."""
    torch.manual_seed(0)
    network = torch.nn.Module()
    network.embed, network.head = torch.nn.Embedding(V, 16), torch.nn.Linear(16, V)
    network.layers = torch.nn.ModuleList([Layer(), Layer()])
    prompts, table = [[1, 2, 3], [4, 5]], rk.NgramTable(1024, vocab_size=V)
    here: dict[str, Any] = {"network": network.double(), "prompts": prompts, "table": table}
    code = shorter(blocks("reasonkern/generation/README.md")[-1])
    for _ in range(2):  # the second time the table has seen the texts
        exec(code, here)
    for prompt, text, seed in zip(
        prompts, here["found"].texts, rk.request_seeds(0, 2), strict=True
    ):
        every = torch.tensor([prompt + text])
        x = network.embed(every)
        for layer in network.layers:
            q, k, v = layer.qkv(x, torch.arange(every.shape[1])[None])
            mixed = torch.nn.functional.scaled_dot_product_attention(q, k, v, is_causal=True)
            x = layer.out(x, mixed)
        for at in range(len(prompt), every.shape[1]):
            token = rk.sample(
                network.head(x)[:, at - 1], temperature=0.6, seed=seed[None], position=at
            )
            assert token.item() == every[0, at]
    assert len(here["found"].texts[0]) == 40 and len(table) > 50


@pytest.mark.peers
def test_generation(user: dict[str, Any]) -> None:
    """Both calls of the family's page, and prompt lookup as a drafter."""
    direct, custom, drafter, _ = map(shorter, blocks("reasonkern/generation/README.md"))
    exec(direct, user)
    assert user["out"].sequences.shape == (8, 46)
    exec(custom, user)
    assert user["sequences"].shape == (8, 46)
    exec(drafter, user)
    lookup = user["out"]
    plain = re.sub(r", drafter=drafter", "", drafter.rpartition("\n\n")[2])
    exec(plain, user)
    assert torch.equal(user["out"].sequences, lookup.sequences)


# ---- the other families


def test_shaping() -> None:
    (code,) = blocks("reasonkern/shaping/README.md")
    here = {
        "length": torch.tensor([100, 2000, 3000, 15000, 900, 800]),
        "correct": torch.tensor([True, False, True, True, False, True]),
        "group": torch.tensor([0, 0, 0, 1, 1, 1]),
    }
    exec(code, here)
    total = torch.zeros(2).index_add(0, here["group"], here["advantage"])
    assert_close(total, torch.zeros(2), atol=1e-6, rtol=0)
    assert here["advantage"][0] > here["advantage"][1] and here["keep"].all()


def test_scaling() -> None:
    (code,) = blocks("reasonkern/scaling/README.md")
    here: dict[str, Any] = {
        "answers": ["4", "5", "5"], "correct": torch.tensor([0, 4096]),
        "features": torch.randn(20, 6, generator=torch.Generator().manual_seed(0)),
    }  # fmt: skip
    lines = re.sub(r"^(scaling\.)", r"results += [\1", code, flags=re.M)
    here["results"] = []
    exec(re.sub(r"^(results .*?\S)(  #.*)$", r"\1]\2", lines, flags=re.M), here)
    vote, rates, chosen = here["results"]
    assert vote == "5" and rates.tolist() == [0, 1] and len(set(chosen.tolist())) == 8
