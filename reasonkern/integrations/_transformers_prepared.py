"""What transformers prepared for `custom_generate`: taken over exactly, or refused."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from numbers import Integral
from typing import Any

import torch
from torch import Tensor

from .. import _checks
from ._peer import import_peer

TESTED = "5.24"
_transformers = import_peer("transformers", TESTED)
_criteria = import_peer("transformers.generation.stopping_criteria", TESTED)

# In the order in which transformers applies them, which is that of `sample`.
WARPERS = {
    "TemperatureLogitsWarper": "temperature",
    "TopKLogitsWarper": "top_k",
    "TopPLogitsWarper": "top_p",
    "MinPLogitsWarper": "min_p",
}
# Results of a step that the loop does not keep.
OUTPUTS = ("output_scores", "output_logits", "output_attentions", "output_hidden_states")
WITHOUT_EFFECT = ("use_cache", "logits_to_keep")
CACHES = ("cache", "past_key_values")


def sampling(processors: Any, config: Any) -> dict[str, Any]:
    """The options behind transformers' own warpers, which are left out."""
    options: dict[str, Any] = {"temperature": 1.0 if config.do_sample else 0.0}
    kinds = {getattr(_transformers, name): name for name in WARPERS}
    for processor in processors:
        if type(processor) not in kinds:
            expected = (
                f"none but {', '.join(WARPERS)} (control= takes a Modulation; "
                "repetition_penalty=1.0 leaves a model's own penalty out)"
            )
            _checks.fail("logits_processor", expected, type(processor).__name__)
    if not config.do_sample:  # none of them moves the arg-max
        return options
    names = [kinds[type(processor)] for processor in processors]
    if names != [name for name in WARPERS if name in names]:
        expected = f"each at most once, in the order {', '.join(WARPERS)}"
        _checks.fail("logits_processor", expected, names)
    for name, processor in zip(names, processors, strict=True):
        keeps = getattr(processor, "min_tokens_to_keep", 1)
        filler = getattr(processor, "filter_value", -torch.inf)
        if (keeps, filler) != (1, -torch.inf):
            expected = f"a {name} with min_tokens_to_keep = 1 and filter_value = -inf"
            _checks.fail("logits_processor", expected, f"{keeps} and {filler}")
        options[WARPERS[name]] = getattr(processor, WARPERS[name])
    return options


def ends(criteria: Any, config: Any) -> tuple[list[int], int, list[Callable[..., Any]]]:
    """(ids that end a text, its length at most with the prompt, the other criteria).

    A user's criterion of ids or of length takes the place of the configuration's.
    """
    ids, lengths, others = [], [], []
    for criterion in criteria:
        if type(criterion) is _criteria.EosTokenCriteria:
            ids += ids_of(criterion.eos_token_id)
        elif type(criterion) is _criteria.MaxLengthCriteria:
            lengths.append(criterion.max_length)
        else:
            others.append(criterion)
    return ids, min(lengths, default=config.max_length), others


def as_list(ids: Any) -> list[int]:
    """Of an id, several, or none."""
    if ids is None:
        return []
    if isinstance(ids, Integral):
        ids = [ids]
    elif isinstance(ids, Tensor):
        ids = ids.reshape(-1).tolist()
    if isinstance(ids, str) or not isinstance(ids, Iterable):
        _checks.fail("eos", "an id or several", repr(ids))
    return list(ids)


def ids_of(eos: Any) -> list[int]:
    """As transformers takes a configuration: an id that never comes is legal, some write -1."""
    return [token for token in as_list(eos) if token >= 0]


def check_config(config: Any) -> None:
    """Refuses modes, caches and results of steps that the loop does not have."""
    mode = str(getattr(config.get_generation_mode(), "value", config.get_generation_mode()))
    _checks.check_choice("generation mode", mode, ("greedy_search", "sample"))
    for name in OUTPUTS:
        if config.return_dict_in_generate and getattr(config, name, False):
            _checks.fail(name, "False", True)
    kind = getattr(config, "cache_implementation", None)
    if kind not in (None, "dynamic"):
        _checks.fail("cache_implementation", "None: the loop has its own cache", repr(kind))


def check_inputs(model_kwargs: dict[str, Any]) -> None:
    """Refuses what says more than ids, mask and positions."""
    for name, value in model_kwargs.items():
        if value is None or name in WITHOUT_EFFECT:
            continue
        if name not in CACHES:
            _checks.fail(name, "not given: prompts are ids alone", type(value).__name__)
        if value.get_seq_length():
            _checks.fail(name, "empty: the loop has its own cache", f"{value.get_seq_length()} ids")


def check_positions(positions: Tensor | None, mask: Tensor) -> None:
    """Those that transformers makes of a (R, L) mask; of padding they may be anything."""
    if positions is None:
        return
    counted = mask.long().cumsum(-1) - 1
    if positions.shape[-1] != mask.shape[-1] or ((positions != counted) & (mask != 0)).any():
        _checks.fail("position_ids", "tokens counted from 0, padding left out", positions.tolist())
