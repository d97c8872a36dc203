"""Decides, before the first step, how trajectories share a forward pass: packed if that is exact, else in padded rows
if that is exact, else not at all.

In: the adapted model, the lengths to train on. Out: a `Layout`, the attention implementation, and the reasons; or a
ModelError that says what is wrong. It costs a few forward passes as long as those of the training. It finds models with
a state that runs across packed trajectories (Mamba and its hybrids), models that ignore position_ids, models whose
position tables depend on the longest trajectory of a pass, and models that change the logits after their LM head.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from peft import PeftModel
from torch import Tensor
from transformers import PreTrainedConfig
from transformers.utils import is_flash_attn_2_available, is_flash_attn_3_available

from client.errors import ModelError, reason_of
from trainer.data.packing import Layout, Sharing, arrange
from trainer.training.lora import Head, decoder_of, hidden_states, own_dropout
from trainer.training.progress import is_out_of_memory

TOKENS = 24, 40
"""Lengths of two short sequences. Both are longer than the reach of common causal convolutions."""
ROWS = 64
"""Most rows of logits to compare in a sequence: half of them at its start, half at its end."""
LAST_ROWS = 8
"""Rows to compare in a sequence between two others, at its end. In half precision their median counts (`MOST_ODD`)."""
TOLERANCE = {torch.float32: 1e-3, torch.float64: 1e-3}
HALF_TOLERANCE = 0.1
"""Largest relative difference of a row of logits. Rounding in bfloat16 gives about 0.01; a leak gives about 1."""
MOST_ODD = 0.1
"""Share of the rows of long sequences that may differ by more in half precision: in a mixture of experts, rounding
alone can route a token to another expert."""
UNSUPPORTED = TypeError, ValueError, NotImplementedError, AttributeError, IndexError, RuntimeError


class PackingError(ModelError):
    """Trajectories cannot share a pass of this model."""


@dataclass(frozen=True)
class Choice:
    """How trajectories share passes of a model, and what computes its attention."""

    layout: Layout
    unpacked: str | None  # why they are not packed
    attention: str  # attn_implementation of transformers
    others: list[str]  # why better attention implementations are not used
    noise: float = 0.0  # as `training_noise` returns it

    def said(self, budget: int, lengths: Sequence[int], device: str) -> list[str]:
        """Lines to print about the choice, in a training with these lengths and this token budget."""
        lines = []
        if device == "cuda" or self.others:
            lines.append("; not ".join([f"attention: {self.attention}", *self.others]))
        if self.noise:
            lines.append(
                f"the model computes differently in training (logits differ by {self.noise:.2g} of their size), and "
                "--dropout 0 does not switch that off"
            )
        packed = max(1, budget * len(lengths) // max(1, sum(lengths)))
        if self.layout.sharing == Sharing.PADDED:
            padded = round(len(lengths) / sum(1 / max(1, budget // length) for length in lengths))
            lines.append(
                f"one trajectory a row, padded: {self.unpacked}. The adapter is the same; a pass holds about {padded},"
                f" and packed about {packed}"
            )
        if self.layout.sharing == Sharing.ALONE:
            lines.append(
                f"one trajectory a pass: {self.unpacked}. The adapter is the same; a packed pass would hold about"
                f" {packed}, so training takes longer, above all on a GPU"
            )
        return lines


def choose(
    adapted: PeftModel,
    name: str,
    lengths: Sequence[int],
    budget: int,
    packing: bool,
    attention: str | None,
    padding: bool = True,
) -> Choice:
    """How trajectories of these lengths share passes. Packs and pads only if allowed. A given `attention` stays.

    Raises ModelError if the model cannot be trained at all.
    """
    model: Any = adapted.get_base_model()
    loaded = _attention_of(model)
    names, others = attentions(model, model.device.type) if packing and not attention else ([], [])
    reference = _own_logits(model) if names else None
    for better in names:
        if reference is not None and (reason := _refusal(model, better, reference)):
            others.append(reason)
            continue
        try:
            found, why = layout_for(adapted, name, lengths, budget, packing, padding=False)
        except ModelError as error:
            others.append(f"{better}: {error}")
            continue
        if why is None:
            return Choice(found, why, better, others, training_noise(adapted))
        others.append(f"{better}: {why}")
    if names:
        model.set_attn_implementation(loaded)
    found, why = layout_for(adapted, name, lengths, budget, packing, padding)
    return Choice(found, why, loaded, others, training_noise(adapted))


def attentions(model: Any, device: str) -> tuple[list[str], list[str]]:
    """The attention implementations to prefer to sdpa on this device, best first, and why others are left out.

    With a mask, which packed sequences need, sdpa computes all pairs of tokens, even those of two trajectories.
    """
    if device != "cuda":
        return [], []
    names, others = [], []
    installed = {"flash_attention_3": is_flash_attn_3_available(), "flash_attention_2": is_flash_attn_2_available()}
    flash = next((name for name, there in installed.items() if there), None)
    if flash is None:
        others.append("flash_attention_2: flash-attn is not installed")
    elif model.dtype in TOLERANCE:
        others.append(f"{flash}: it needs --dtype bfloat16")
    else:
        names.append(flash)
    if own_dropout(model):
        others.append("flex_attention: it has no dropout, and the model has (--dropout 0 switches it off)")
    else:
        names.append("flex_attention")
    return names, others


def _refusal(model: Any, attention: str, reference: Tensor) -> str | None:
    """Set the model's attention. Returns why it cannot be used; None if it gives the same logits as `reference`."""
    try:
        model.set_attn_implementation(attention)
        if _attention_of(model) != attention:
            return f"{attention}: the model does not take it"
        found = float(_differences(_own_logits(model), reference).max())
    except (*UNSUPPORTED, ImportError) as error:
        if is_out_of_memory(error):
            raise
        return f"{attention}: {reason_of(error)}"
    return f"{attention}: logits differ by {found:.2g} of their size" if found > _tolerance(model) else None


def _attention_of(model: Any) -> str:
    return str(decoder_of(model).config._attn_implementation)


def _own_logits(model: Any, training: bool = False) -> Tensor:
    """Logits of two short sequences by the model's own forward pass, with gradients as in `check_alone`: [64, V]."""
    with _Evaluating(model):
        model.train(training)
        passes = [type(model).forward(model, input_ids=ids, use_cache=False) for ids, _ in _sequences(model, TOKENS)]
    return torch.cat([one.logits[0].detach() for one in passes])


def layout_for(
    adapted: PeftModel, name: str, lengths: Sequence[int], budget: int, packing: bool, padding: bool
) -> tuple[Layout, str | None]:
    """How trajectories of these lengths share passes, and why they are not packed (None if they are).

    Raises ModelError if the model cannot be trained at all.
    """
    model: Any = adapted.get_base_model()
    switch = position_switch(model.config)
    why = [] if packing else ["--no-packing asks for it"]
    for sharing in [Sharing.PACKED] * packing + [Sharing.PADDED] * padding:
        layout = Layout(sharing, switch)
        try:
            passes = [TOKENS, *neighbours(lengths, budget, layout), *fullest(lengths, budget, layout)]
            check_packing(adapted, name, list(dict.fromkeys(passes)), layout)
        except PackingError as error:
            why.append(str(error))
        else:
            return layout, "; ".join(why) or None
    check_alone(adapted, name)
    return Layout(Sharing.ALONE), "; ".join(why)


def training_noise(adapted: PeftModel) -> float:
    """Relative difference of logits between training and evaluation mode; 0 if rounding or known dropout explains it.

    LoRA's own dropout changes nothing yet, because B is still zero.
    """
    model: Any = adapted.get_base_model()
    if own_dropout(model):
        return 0.0
    try:
        calm, device = _own_logits(model), [model.device] if model.device.type == "cuda" else []
        with torch.random.fork_rng(device):
            found = _largest(_differences(_own_logits(model, training=True), calm), model)
    except UNSUPPORTED as error:
        if is_out_of_memory(error):
            raise
        return 0.0
    return found if found > _tolerance(model) else 0.0


def position_switch(config: PreTrainedConfig) -> int | None:
    """The longest trajectory to which a model with LongRoPE applies its short tables; None for other models."""
    found = getattr(config.get_text_config(), "rope_parameters", None) or {}
    kinds = [found, *(value for value in found.values() if isinstance(value, dict))]
    ends = [kind["original_max_position_embeddings"] for kind in kinds if kind.get("rope_type") == "longrope"]
    return min(ends, default=None)


def neighbours(lengths: Sequence[int], budget: int, layout: Layout) -> list[tuple[int, int]]:
    """On each side of a switch, the shortest length and the longest that may share a pass with it."""
    found = []
    for side in layout.sides(lengths):
        if len(side) < 2:
            continue
        shortest, *others = sorted(lengths[index] for index in side)
        if beside := [length for length in others if layout.tokens((shortest, length)) <= budget]:
            found.append((shortest, beside[-1]))
    return found


def fullest(lengths: Sequence[int], budget: int, layout: Layout) -> list[tuple[int, ...]]:
    """On each side of a switch, the lengths of the pass that holds the most tokens.

    Some models take no pass longer than their context (GPT-Neo). In others, attention restarts at each multiple of a
    chunk length (Llama 4), which trajectories of one length, beginning at such multiples, would hide. So the shortest
    comes first, and if all lengths of the pass are equal, a second pass begins with the shortest of all.
    """
    found: list[tuple[int, ...]] = []
    for side in layout.sides(lengths):
        ordered = sorted((lengths[index] for index in side), reverse=True)
        full = _filled([], ordered, budget, layout)
        passes = [full]
        if layout.sharing == Sharing.PACKED and full and full[0] == full[-1] > ordered[-1]:
            passes.append(_filled(ordered[-1:], ordered[:-1], budget, layout))
        found += [(min(held), *sorted(held, reverse=True)[:-1]) for held in passes if len(held) > 1]
    return found


def lengths_to_come(longest: int, budget: int) -> list[int]:
    """Stand-ins for lengths that are not known yet: a short one, and as many of the longest as fill a pass."""
    longest = min(longest, max(1, budget - TOKENS[0]))
    left = budget % longest
    return [TOKENS[0], *[longest] * (budget // longest), *[left] * (left > 0)]


def _filled(held: list[int], lengths: Sequence[int], budget: int, layout: Layout) -> list[int]:
    """The lengths in `held`, then in order each of `lengths` for which the pass still has room."""
    held = list(held)
    for length in lengths:
        if layout.tokens([*held, length]) <= budget and layout.alike(length, max([*held, length])):
            held.append(length)
    return held


def check_alone(adapted: PeftModel, name: str) -> None:
    """Raises ModelError if a pass with one trajectory gives other logits than the model's own forward pass, if a token
    changes logits before it, or if the adapter's gradient cannot be computed.
    """
    model: Any = adapted.get_base_model()
    try:
        with _Evaluating(model):
            head, parts = Head(model), _sequences(model, TOKENS)
            # With gradients: some kinds of attention do not support them everywhere, and raise an error here.
            states = [hidden_states(decoder_of(model), ids, positions)[0] for ids, positions in parts]
            trained = [weight for weight in adapted.parameters() if weight.requires_grad]
            if trained:
                square = torch.cat([head(state) for state in states]).float().square().mean()
                torch.autograd.grad(square, trained, allow_unused=True)
            with torch.no_grad():
                (ids, positions), last = parts[-1], states[-1]
                shorter = hidden_states(decoder_of(model), ids[:, :-1], positions[:, :-1])[0]
                ahead = _largest(_differences(head(shorter), head(last[:-1])), model)
                own = [type(model).forward(model, input_ids=ids, use_cache=False).logits[0] for ids, _ in parts]
                found = _differences(torch.cat([head(state) for state in states]), torch.cat(own)).max()
    except UNSUPPORTED as error:
        if is_out_of_memory(error):
            raise
        raise ModelError(f"{name} cannot be trained: {reason_of(error)}") from error
    if found > _tolerance(model):
        raise ModelError(
            f"{name}: the model's logits are not its LM head's, or not only (they differ by {found:.2g} of their "
            "size); this architecture is not supported"
        )
    if ahead > _tolerance(model):
        raise ModelError(
            f"{name}: a token changes the logits before it (they differ by {ahead:.2g} of their size), so training "
            "would see what sampling does not; this architecture is not supported"
        )


def check_packing(
    adapted: PeftModel, name: str, passes: Sequence[tuple[int, ...]] = (TOKENS,), layout: Layout | None = None
) -> None:
    """Raises PackingError if a row of logits differs between a shared pass and a pass of one trajectory, and ModelError
    like `check_alone`.

    `passes`: for each pass to try, the lengths of its trajectories. `layout`: how they share it; None: packed.
    """
    check_alone(adapted, name)
    layout = layout or Layout()
    model: Any = adapted.get_base_model()
    how = "packed into one sequence" if layout.sharing == Sharing.PACKED else "padded into rows"
    with _Evaluating(model):
        for held in passes:
            try:
                found = _difference_of(model, held, layout)
            except UNSUPPORTED as error:
                if is_out_of_memory(error):
                    raise
                raise PackingError(f"{name} does not take trajectories {how}: {reason_of(error)}") from error
            if found > _tolerance(model):
                raise PackingError(
                    f"{name}: trajectories {how} disturb each other ({_lengths_told(held)} tokens;"
                    f" logits differ by {found:.2g} of their size)"
                )


def _lengths_told(lengths: tuple[int, ...]) -> str:
    shortest, longest = min(lengths), max(lengths)
    if len(lengths) == 2:
        return f"of {shortest} and {longest}"
    return f"{len(lengths)} of {shortest} to {longest}" if shortest < longest else f"{len(lengths)} of {shortest}"


def _difference_of(model: Any, lengths: tuple[int, ...], layout: Layout) -> float:
    """The largest relative difference of a row of logits between a shared pass and passes of one trajectory.

    Compares `ROWS` rows of the first and of the last trajectory, and the last `LAST_ROWS` of those between: whatever
    disturbs a token also disturbs the tokens after it.
    """
    decoder, head, parts = decoder_of(model), Head(model), _sequences(model, lengths)
    padded = layout.sharing == Sharing.PADDED
    ids, positions, starts = arrange([part[0].cpu().numpy() for part, _ in parts], padded)
    with torch.set_grad_enabled(lengths == TOKENS):  # as in check_alone; for long passes it would take much memory
        shared = hidden_states(decoder, ids.to(model.device), positions.to(model.device)).flatten(0, 1)
    outer, between = [], [0.0]
    with torch.no_grad():
        for at, (start, length) in enumerate(zip(starts, lengths, strict=True)):
            rows, inner = np.arange(length), 0 < at < len(lengths) - 1
            rows = rows[-LAST_ROWS:] if inner else np.unique(np.append(rows[: ROWS // 2], rows[-ROWS // 2 :]))
            own = hidden_states(decoder, *parts[at])[0]
            found = _differences(head(shared[start + rows]), head(own[rows]))
            if inner:
                between.append(float(found.max() if model.dtype in TOLERANCE else found.median()))
            else:
                outer.append(found)
    found = torch.cat(outer)
    return max(*between, float(found.max()) if lengths == TOKENS else _largest(found, model))


def _largest(differences: Tensor, model: Any) -> float:
    """The largest difference of a row. In half precision without the largest `MOST_ODD` of the rows."""
    return float(differences.max() if model.dtype in TOLERANCE else differences.quantile(1 - MOST_ODD))


class _Evaluating:
    """A context in which the model is in evaluation mode, without dropout."""

    def __init__(self, model: Any) -> None:
        self._model, self._training = model, model.training

    def __enter__(self) -> None:
        self._model.eval()

    def __exit__(self, *_: object) -> None:
        self._model.train(self._training)


def _sequences(model: Any, lengths: Sequence[int]) -> list[tuple[Tensor, Tensor]]:
    """Random ids and their positions, both [1, L], for each length."""
    generator = torch.Generator().manual_seed(0)
    ids = torch.randint(Head(model).vocab_size, (1, sum(lengths)), generator=generator, device="cpu").to(model.device)
    return [(part, torch.arange(part.shape[1], device=model.device)[None]) for part in ids.split(list(lengths), dim=1)]


def _tolerance(model: Any) -> float:
    return TOLERANCE.get(model.dtype, HALF_TOLERANCE)


def _differences(one: Tensor, other: Tensor) -> Tensor:
    """The relative difference of each row, ||a - b|| / ||b - mean b||."""
    one, other = one.float(), other.float()
    spread = (other - other.mean(dim=-1, keepdim=True)).norm(dim=-1)
    return (one - other).norm(dim=-1) / spread.clamp_min(1e-6)
