"""Speculative generation with a transformers model, without a draft model and without loss.

One call changes::

    # Keep the table: it learns from every call.
    table = rk.NgramTable(vocab_size=model.config.vocab_size, device=model.device)
    out = generate(model, input_ids, temperature=0.6, max_new_tokens=2048, table=table)

or, with transformers' own preparation of prompts, options and stopping criteria::

    model.generate(**inputs, do_sample=True, custom_generate=custom_generate, table=table)

The loop is ``reasonkern.generation``; this module is the model's side: masks, positions, cache.
Causal models with plain key-value caches (Llama, Qwen2, Qwen3, Mistral and the like, sliding
windows included), eager or SDPA attention, on one device. A model is tried once: one that does not
follow a tree's mask and positions, or whose own mask shows a token later ones, is refused.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from .. import _checks, generation
from .._fields import documented
from ..generation import Drafter, Statistics
from ..generation.loop import Emit, Stop
from ..modulation import ModulationState
from ..speculation import DraftTree, NgramTable
from . import _transformers_prepared as _prepared
from ._peer import import_peer
from ._transformers_model import causal_model, check_length
from ._transformers_prepared import as_list
from ._transformers_processor import ModulationLogitsProcessor
from ._transformers_stop import Criteria, StopStrings

TESTED = "5.24"
_transformers = import_peer("transformers", TESTED)

__all__ = ["Generation", "ModulationLogitsProcessor", "custom_generate", "generate"]

# transformers' names for arguments of `generate` that have another one here.
RENAMED = {
    "num_return_sequences": "num_trajectories",
    "max_length": "max_new_tokens, without the prompt",
    "eos_token_id": "eos",
    "pad_token_id": "pad",
    "do_sample": "temperature, 0 = greedy",
}


@documented
class Generation(NamedTuple):
    """What `generate` returns; R is the number of requests, prompts x trajectories.

    Attributes:
        sequences: (R, L) int64: the prompts as given, then the new tokens, padded on the right.
        lengths: (R,) int64 number of new tokens, an end-of-sequence id included.
        statistics: accepted lengths, hits of the table by order, time by phase.
    """

    sequences: Tensor
    lengths: Tensor
    statistics: Statistics


def generate(
    model: Any,
    input_ids: Tensor,
    *,
    temperature: float | Tensor,
    max_new_tokens: int,
    attention_mask: Tensor | None = None,
    table: NgramTable | None = None,
    tree: DraftTree | str = "auto",
    drafter: Drafter | None = None,
    control: tuple[ModulationState, Tensor] | None = None,
    seed: int | Tensor = 0,
    top_k: int | Tensor | None = None,
    top_p: float | Tensor | None = None,
    min_p: float | Tensor | None = None,
    eos: int | Sequence[int] | None = None,
    pad: int | None = None,
    stop_strings: str | Sequence[str] | None = None,
    tokenizer: Any = None,
    stopping_criteria: Sequence[Callable[..., Any]] = (),
    streamer: Any = None,
    num_trajectories: int = 1,
    scope: int | Tensor | None = None,
    **others: Any,
) -> Generation:
    """Generates from a transformers model; the text is that of plain seeded sampling.

    Without table and drafter it is plain seeded decoding: the same text, a token per pass. Equal
    means equal logits: a model in bfloat16 may give a tree other last bits than a single token.

    Args:
        model: a causal model of transformers, on one device.
        input_ids: (B, L) int64 prompts on the model's device, padded on the left.
        temperature: a number or one per request; above 0 samples, 0 is greedy: there is no
            ``do_sample``.
        max_new_tokens: at most so many new tokens per request, without those of the prompt.
        attention_mask: (B, L), 0 = padding. None = as transformers infers it: padding is where
            ``model.generation_config.pad_token_id`` stands, unless it also begins or ends texts.
        table: learns from the logits of prompts and steps, and drafts. Keep it between calls: the
            trajectories of a prompt share what they taught it. None = no table.
        tree: the `DraftTree` that is filled, or "auto": the size that gives most tokens per second
            on this machine, by the times of the steps so far, plain decoding included.
        drafter: a function that proposes in the table's place, see `generation.Drafter`. None = no
            drafter.
        control: a `ModulationState` and the (R,) int64 slots of the requests in it, one for each
            trajectory and put there anew for each call, as in `generation.generate`. None = no
            control.
        seed: of the run; the requests' seeds are hashed from it (`request_seeds`); or (R,) seeds.
            The same one, 0 as here, gives the same text in every call: torch's generator is not
            used, nor ``torch.manual_seed``. Other texts take another seed.
        top_k: as in `sample`, a number or one per request. None = off.
        top_p: as in `sample`. None = off.
        min_p: as in `sample`. None = off.
        eos: id or ids that end a request; () = none. None = those of ``model.generation_config``,
            of which nothing else is read but its ``pad_token_id``.
        pad: id that fills ``sequences``. None = that of ``model.generation_config``, or the first
            of ``eos``, or 0.
        stop_strings: a request ends with the token that completes one of them in its new text.
            None = no strings.
        tokenizer: decodes for ``stop_strings``. None = not needed.
        stopping_criteria: transformers' criteria, called as (ids (1, length), None) after every new
            token of a request; True ends the request.
        streamer: of transformers, for a single request: put gets the prompt, then the tokens of
            each step. None = no streamer.
        num_trajectories: requests per prompt, transformers' ``num_return_sequences``; they follow
            each other in the result.
        scope: of the table, a number or one per request. None = one scope per distinct prompt, the
            same in every call.
        others: none; an argument by transformers' name is refused with the name it has here.

    Returns:
        `Generation`.

    Raises:
        ValueError: a model, cache or attention that cannot decode trees; ids or a tokenizer that
            are not the model's; padding that is not on the left; a table of a smaller vocabulary;
            something on another device; an option of another type or out of its range.
    """
    _check_names(others)
    _checks.check_integer("num_trajectories", num_trajectories, 1)
    _checks.check_integer("max_new_tokens", max_new_tokens, 1)
    found = causal_model(model)
    prompts = _prompts(found, input_ids, attention_mask)
    check_length(found, prompts, int(max_new_tokens))
    if eos is None:
        ids = _prepared.ids_of(model.generation_config.eos_token_id)
    else:
        ids = as_list(eos)
        _checks.check_ids("eos", ids, found.vocab_size, ", the columns of the model's logits")
    filler = _pad(model, pad, ids)
    requests = len(prompts) * num_trajectories
    stop = _stop(found, prompts, num_trajectories, stop_strings, tokenizer, stopping_criteria)
    texts, statistics = generation.generate(
        found, prompts, temperature=temperature, max_new_tokens=max_new_tokens, table=table,
        tree=tree, drafter=drafter, control=control, seed=seed, top_k=top_k, top_p=top_p,
        min_p=min_p, eos=ids, stop=stop, emit=_emit(streamer, requests, input_ids),
        num_trajectories=num_trajectories, scope=scope,
    )  # fmt: skip
    if streamer is not None:
        streamer.end()
    rows = input_ids.repeat_interleave(num_trajectories, 0)
    lengths = torch.tensor([len(text) for text in texts], device=input_ids.device)
    return Generation(_sequences(rows, texts, filler), lengths, statistics)


def custom_generate(
    model: Any,
    input_ids: Tensor,
    logits_processor: Any,
    stopping_criteria: Any,
    generation_config: Any,
    *,
    table: NgramTable | None = None,
    tree: DraftTree | str = "auto",
    drafter: Drafter | None = None,
    control: tuple[ModulationState, Tensor] | None = None,
    seed: int | Tensor = 0,
    scope: int | Tensor | None = None,
    statistics: Statistics | None = None,
    **model_kwargs: Any,
) -> Any:
    """For ``model.generate(…, custom_generate=custom_generate, table=table, seed=1)``.

    transformers prepares prompts, options and stopping criteria and calls this. Its temperature,
    top-k, top-p and min-p are applied here instead of by its own processors, in the same order;
    ``do_sample`` and its default of top_k=50 hold. Trajectories are ``num_return_sequences``.
    transformers hands such a function no streamer, no tokenizer and no ``assistant_model``, and
    nothing that it does hand over tells of them, so they cannot be refused: a streamer shows the
    prompt alone, an assistant does nothing. Use `generate` for a streamer, a
    ``StopStringCriteria`` in ``stopping_criteria`` for ``stop_strings``, and ``table`` or
    ``drafter`` for drafts.

    Args:
        model: given by transformers, as are the next four.
        input_ids: (R, L).
        logits_processor: any processor but those four is refused. A model's own
            ``generation_config`` may ask for one: ``repetition_penalty=1.0`` takes Qwen2.5's away.
        stopping_criteria: maximal length and end-of-sequence ids are the loop's own matter; any
            other criterion is called after every token of a request.
        generation_config: sampling or greedy search.
        table: as in `generate`. None = no table.
        tree: as in `generate`.
        drafter: as in `generate`. None = no drafter.
        control: as in `generate`. None = no control.
        seed: as in `generate`; torch's generator is not used: the same seed gives the same text.
        scope: as in `generate`. None = one scope per distinct prompt.
        statistics: a `generation.Statistics` to add this call's to. None = nobody asks.
        model_kwargs: what else transformers prepared, the attention mask among it; a cache that
            holds something, positions that are not counted from 0, or inputs other than ids are
            refused.

    Returns:
        What transformers returns: (R, L) int64, or its output object with ``sequences``.
    """
    # Parameters of these names would be given twice. transformers takes a mask of ones away.
    mask, positions = (model_kwargs.pop(name, None) for name in ("attention_mask", "position_ids"))
    mask = torch.ones_like(input_ids) if mask is None else mask
    _prepared.check_config(generation_config)
    _prepared.check_inputs(model_kwargs)
    found = causal_model(model)
    prompts = _prompts(found, input_ids, mask)
    _prepared.check_positions(positions, mask)
    ids, longest, criteria = _prepared.ends(stopping_criteria, generation_config)
    new = longest - input_ids.shape[1]
    check_length(found, prompts, new)
    texts, _ = generation.generate(
        found, prompts, **_prepared.sampling(logits_processor, generation_config),
        max_new_tokens=new, table=table, tree=tree, drafter=drafter, control=control, seed=seed,
        eos=ids, stop=Criteria(criteria, input_ids.device) if criteria else None, scope=scope,
        statistics=statistics,
    )  # fmt: skip
    sequences = _sequences(input_ids, texts, _pad(model, generation_config.pad_token_id, ids))
    if generation_config.return_dict_in_generate:
        return _transformers.generation.GenerateDecoderOnlyOutput(sequences=sequences)
    return sequences


# ---- inputs


def _check_names(others: dict[str, Any]) -> None:
    for name, value in others.items():
        if name not in RENAMED:
            raise TypeError(f"generate() got an unexpected keyword argument {name!r}")
        _checks.fail(name, f"its name here, {RENAMED[name]}", repr(value))


def _prompts(found: Any, input_ids: Tensor, mask: Tensor | None) -> list[list[int]]:
    """Without their padding."""
    if not isinstance(input_ids, Tensor):
        expected = "a tensor (of what a tokenizer returns, its input_ids)"
        _checks.fail("input_ids", expected, type(input_ids).__name__)
    _checks.check_dtype("input_ids", input_ids, torch.int64, torch.int32)
    if input_ids.ndim != 2 or not input_ids.numel():
        _checks.fail("input_ids", "shape (batch, length), not empty", tuple(input_ids.shape))
    if input_ids.device != found.device:
        expected = f"the model's device, {found.device} (input_ids.to(model.device) moves them)"
        _checks.fail("input_ids", expected, input_ids.device)
    rows: list[list[int]] = input_ids.tolist()
    if mask is None:
        mask = _inferred_mask(found.model.generation_config, input_ids)
    _checks.check_shape("attention_mask", mask, input_ids.shape, "that of input_ids")
    used = (mask != 0).tolist()
    for index, row in enumerate(used):
        if not row[-1] or sorted(row) != row:
            expected = (
                "0 on the left alone, for padding, then 1 up to the end (a tokenizer with "
                'padding_side="left")'
            )
            _checks.fail(f"attention_mask[{index}]", expected, mask[index].tolist())
    return [row[keep.index(True) :] for row, keep in zip(rows, used, strict=True)]


def _inferred_mask(config: Any, input_ids: Tensor) -> Tensor:
    """Where a mask is forgotten, padding would be read as text without a word."""
    pad = config.pad_token_id
    if pad is None or pad in (config.bos_token_id, *as_list(config.eos_token_id)):
        return torch.ones_like(input_ids)
    return input_ids.ne(pad)


def _pad(model: Any, pad: int | None, eos: Sequence[int]) -> int:
    if pad is not None and not _checks.is_integer(pad):
        _checks.fail("pad", "an id or None", repr(pad))
    for choice in (pad, model.generation_config.pad_token_id, *eos[:1]):
        if choice is not None:
            return int(choice)
    return 0


def _stop(
    found: Any, prompts: list[list[int]], trajectories: int, strings: str | Sequence[str] | None,
    tokenizer: Any, criteria: Sequence[Callable[..., Any]],
) -> Stop | None:  # fmt: skip
    checks: list[Stop] = []
    if not isinstance(criteria, Sequence):
        _checks.fail("stopping_criteria", "a sequence of criteria", type(criteria).__name__)
    for criterion in criteria:
        if not callable(criterion):
            _checks.fail("stopping_criteria", "criteria that can be called", repr(criterion))
    if strings is not None:
        lengths = [len(prompt) for prompt in prompts for _ in range(trajectories)]
        checks.append(StopStrings(strings, tokenizer, lengths, found.vocab_size))
    if criteria:
        checks.append(Criteria(criteria, found.device))
    if not checks:
        return None
    # A list: every check hears of every token, also when an earlier one ends the request.
    return lambda request, text: any([check(request, text) for check in checks])


def _emit(streamer: Any, requests: int, input_ids: Tensor) -> Emit | None:
    if streamer is None:
        return None
    if not (hasattr(streamer, "put") and hasattr(streamer, "end")):
        _checks.fail("streamer", "an object with put and end", type(streamer).__name__)
    if requests != 1:
        _checks.fail("streamer", "a single request", f"{requests} requests")
    streamer.put(input_ids.cpu())
    return lambda _, tokens: streamer.put(torch.tensor(tokens, device="cpu"))


def _sequences(prompts: Tensor, texts: list[list[int]], pad: int) -> Tensor:
    longest = max(map(len, texts))
    padded = [text + [pad] * (longest - len(text)) for text in texts]
    new = torch.tensor(padded, device=prompts.device, dtype=prompts.dtype)
    return torch.cat((prompts, new), 1)
