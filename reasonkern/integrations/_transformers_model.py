"""A transformers model as the decoding loop's `Model`, or why it cannot be one."""

from __future__ import annotations

import inspect
import warnings
from typing import Any, NamedTuple
from weakref import WeakKeyDictionary

import torch
from torch import Tensor

from .. import _checks
from ..generation.cache import SlotCache
from ..generation.passes import Pass, prompt_pass, tree_pass
from ..generation.trees import Timings
from ..speculation import DraftTree

ATTENTION = ("eager", "sdpa")
LAYERS = ("full_attention", "sliding_attention")
MASKED = -6e4  # -inf, or the smallest number of a dtype, in the columns that are nobody's


class CausalModel:
    """Calls the model with a four-dimensional mask, positions and the loop's cache."""

    def __init__(self, model: Any) -> None:
        self.model = model
        self.config = model.config.get_text_config()
        parameter = next(model.parameters())
        self.device: torch.device = parameter.device
        self.timings: Timings = {}
        names = inspect.signature(model.forward).parameters
        # Renamed in transformers 5.
        self.cache_name = "cache" if "cache" in names else "past_key_values"
        self.keeps = "logits_to_keep" in names
        self.vocab_size = 0  # known after the first pass

    def __call__(self, given: Pass) -> Tensor:
        """Logits (B, N, V)."""
        options: dict[str, Any] = {self.cache_name: given.cache, "use_cache": True}
        if self.keeps and not given.logits:
            options["logits_to_keep"] = 1
        out = self.model(
            input_ids=given.tokens, attention_mask=self._mask(given),
            position_ids=given.positions, return_dict=True, **options,
        )  # fmt: skip
        logits: Tensor = out.logits
        return logits

    def _mask(self, given: Pass) -> Tensor | dict[str, Tensor]:
        """By kind of layer where a model has several, as its own preparation would give it."""
        window = getattr(self.config, "sliding_window", None)
        kinds = set(getattr(self.config, "layer_types", None) or ())
        if window is None or kinds == {"full_attention"}:
            return self._additive(given.seen)
        age = given.positions[:, :, None] - given.slot_positions[:, None]
        sliding = self._additive(given.seen & (age < window))
        if not kinds:
            return sliding
        return {"full_attention": self._additive(given.seen), "sliding_attention": sliding}

    def _additive(self, seen: Tensor) -> Tensor:
        """(B, 1, N, S): what SDPA takes, or what eager attention adds."""
        seen = seen.unsqueeze(1)
        if self.config._attn_implementation == "sdpa":
            return seen
        dtype = self.model.dtype
        zero = torch.zeros((), dtype=dtype, device=seen.device)
        return torch.where(seen, zero, torch.finfo(dtype).min)


class _Facts(NamedTuple):
    """What was found out about a model of one kind."""

    vocab_size: int
    timings: Timings


# By what may change of a model between calls: attention, device, dtype, training, its vocabulary.
_known: WeakKeyDictionary[Any, dict[tuple[Any, ...], _Facts]] = WeakKeyDictionary()


def causal_model(model: Any) -> CausalModel:
    """The model's side of the loop; a model is tried once per kind, see `_known`.

    Raises:
        ValueError: the model cannot decode trees; the message says what is missing.
    """
    _check_kind(model)
    found = CausalModel(model)
    config, facts = found.config, _known.setdefault(model, {})
    vocabulary = getattr(config, "vocab_size", None)
    kind = config._attn_implementation, found.device, model.dtype, model.training, vocabulary
    if kind not in facts:
        facts[kind] = _Facts(_tried(found), {})
    found.vocab_size, found.timings = facts[kind]
    return found


def check_length(found: CausalModel, prompts: list[list[int]], max_new_tokens: int) -> None:
    """Refuses texts so long that the model would change earlier positions; warns of overlong ones.

    Rotary embeddings "dynamic" and "longrope" take the frequencies of a pass from its largest
    position: those of another request, or of a draft, would reach into a text.
    """
    rope = getattr(found.config, "rope_parameters", None) or {}
    layers = [rope] if "rope_type" in rope else [x for x in rope.values() if isinstance(x, dict)]
    last = max(map(len, prompts)) + max_new_tokens - 1  # the last token is not read
    for layer in layers:
        kind, limit = str(layer.get("rope_type")), last
        if "dynamic" in kind:
            limit = found.config.max_position_embeddings
        elif kind == "longrope":
            limit = layer["original_max_position_embeddings"]
        if last > limit:
            expected = (
                f"prompts and texts of up to {limit + 1} tokens together: its rotary embedding "
                f"{kind!r} changes all positions of longer ones"
            )
            _checks.fail("model", expected, last + 1)
    longest = getattr(found.config, "max_position_embeddings", None)
    if isinstance(longest, int) and last > longest:
        warnings.warn(
            f"a prompt and max_new_tokens make {last + 1} tokens, and the model's "
            f"max_position_embeddings are {longest}: what it says beyond them it was not made for",
            stacklevel=3,
        )


def _check_kind(model: Any) -> None:
    config = getattr(model, "config", None)
    if config is None or not hasattr(config, "get_text_config"):
        _checks.fail("model", "a causal language model of transformers", type(model).__name__)
    name = type(model).__name__
    if config.is_encoder_decoder or not hasattr(model, "generation_config"):
        _checks.fail("model", "a causal (decoder-only) language model", name)
    places = {str(p.device) for p in model.parameters()}
    if len(places) != 1:
        _checks.fail("model", "all parameters on one device", ", ".join(sorted(places)))
    text = config.get_text_config()
    if text._attn_implementation not in ATTENTION:
        expected = "attn_implementation 'sdpa' or 'eager': others take no mask of a tree"
        _checks.fail("model", expected, repr(text._attn_implementation))
    kinds = set(getattr(text, "layer_types", None) or ()) - set(LAYERS)
    if kinds or getattr(model, "_is_stateful", False):
        expected = "a key-value cache in every layer, from which drafts can be taken back"
        _checks.fail("model", expected, f"{name} ({', '.join(sorted(kinds)) or 'recurrent'})")


@torch.no_grad()
def _tried(found: CausalModel) -> int:
    """Columns of the logits, if tokens 0, 1, 2 give the same ones in a row and among branches.

    All ways make five nodes, so that the same kernels serve them, of two requests: some models
    take the cache's keys only as those of one. A model that is left to its own mask must be causal.
    """
    name = type(found.model).__name__
    row = torch.tensor([[0, 1, 2, 0, 0]] * 2, device=found.device)
    branches = torch.tensor([[0, 0, 1, 0, 2]] * 2, device=found.device)
    tree = DraftTree([-1, 0, 0, 1, 2])
    first, second = (SlotCache(2, found.device) for _ in range(2))
    try:
        straight = found(prompt_pass(row, first, 0, True))
        branched = found(tree_pass(branches, tree, second, 0))
        own = found.model(
            input_ids=row, attention_mask=torch.ones_like(row), use_cache=False, return_dict=True,
            position_ids=torch.arange(5, device=found.device).expand_as(row),
        ).logits  # fmt: skip
    except (
        TypeError, ValueError, AttributeError, RuntimeError, IndexError, AssertionError
    ) as error:  # fmt: skip
        reason = f"{type(error).__name__}: {(str(error).strip().splitlines() or [''])[0]}"
        message = f"model: {name} does not take a tree's mask, positions or cache ({reason})"
        raise ValueError(message) from error
    worst = _difference(*(x.float() for x in (straight[:, [0, 1, 2]], branched[:, [0, 2, 4]])))
    # A model that ignores the mask or the positions is off by as much as its logits differ.
    most = 0.05 if found.model.dtype in (torch.bfloat16, torch.float16) else 1e-3
    if not worst <= most:
        expected_of = "the same logits for a branch of a tree as for a row of tokens"
        dropout = " in training mode (model.eval() switches dropout off)"
        given_as = name + (dropout if found.model.training else "")
        _checks.fail("model", expected_of, f"{given_as}, which is off by {worst:.1%}")
    if not _difference(*(x[:, :3].float() for x in (straight, own))) <= most:
        expected = "a causal language model (config.is_decoder=True makes those like BERT causal)"
        _checks.fail("model", expected, f"{name}, whose tokens see later ones")
    return straight.shape[-1]


def _difference(expected: Tensor, given: Tensor) -> float:
    """The largest one, relative to the largest logit; ids that a model has masked are left out."""
    if expected.isnan().any():
        _checks.fail("model", "logits without NaN", "NaN after tokens 0, 1, 2")
    used = expected > MASKED
    if not torch.equal(used, given > MASKED) or not used.any():
        return torch.inf
    return (
        (expected - given)[used].abs().max() / expected[used].abs().max().clamp_min(1e-6)
    ).item()
