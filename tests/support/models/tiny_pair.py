"""Tiny real models and RUNs for the trainer's tests: Llama with random weights, a word-level tokenizer."""

from dataclasses import replace
from pathlib import Path

import numpy as np
import torch
from peft import LoraConfig, get_peft_model
from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers
from transformers import AutoModelForCausalLM, LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

from client.models.fingerprints import chat_template_digest, model_fingerprint, tokenizer_fingerprint
from client.problems.problem_set import ProblemSetIdentity
from client.protocol.requests import Decoding, FinishReason, ModelCard, Trajectory
from client.runs.manifest import RunManifest
from client.runs.run import Run

SPECIAL = ("<|pad|>", "<|unk|>", "<|end|>", "<|system|>", "<|user|>", "<|assistant|>")
WORDS = (
    "Ann",
    "The",
    " has",
    " apples",
    " How",
    " many",
    " The",
    " answer",
    " is",
    " ",
    ".",
    "+",
    "=",
    "?",
    *"0123456789",
)
VOCABULARY = len(SPECIAL) + len(WORDS)
IDS = {token: index for index, token in enumerate((*SPECIAL, *WORDS))}
TEMPLATE = (
    "{% for message in messages %}<|{{ message['role'] }}|>{{ message['content'] }}<|end|>{% endfor %}"
    "{% if add_generation_prompt %}<|assistant|>{% endif %}"
)


def save_tokenizer(folder: Path, template: str = TEMPLATE, words: tuple[str, ...] = WORDS) -> None:
    vocabulary = {token: index for index, token in enumerate((*SPECIAL, *words))}
    tokenizer = Tokenizer(models.WordLevel(vocabulary, unk_token="<|unk|>"))
    tokenizer.pre_tokenizer = pre_tokenizers.Split(Regex(r" ?[A-Za-z]+|[0-9]|[^A-Za-z0-9 ]| "), behavior="isolated")
    tokenizer.decoder = decoders.Fuse()
    tokenizer.add_special_tokens(list(SPECIAL))
    PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, eos_token="<|end|>", pad_token="<|pad|>", unk_token="<|unk|>",
        chat_template=template, clean_up_tokenization_spaces=False,
    ).save_pretrained(folder)  # fmt: skip


def save_model(folder: Path, seed: int = 0, context: int = 96, dtype: torch.dtype = torch.float32) -> Path:
    """Save a Llama of 2 layers, 64 wide, head size 32 (the smallest that vLLM supports on a CPU)."""
    torch.manual_seed(seed)
    config = LlamaConfig(
        vocab_size=VOCABULARY, hidden_size=64, intermediate_size=96, num_hidden_layers=2, num_attention_heads=2,
        num_key_value_heads=2, max_position_embeddings=context, bos_token_id=None, eos_token_id=2, pad_token_id=0,
        initializer_range=0.2,
    )  # fmt: skip
    LlamaForCausalLM(config).to(dtype).save_pretrained(folder)
    save_tokenizer(folder)
    return folder


def save_adapter(folder: Path, base: Path, size: float = 0.3, seed: int = 1, **variant) -> Path:
    """Save an adapter that changes the model: B, which starts at zero, is drawn from a normal distribution."""
    config = LoraConfig(r=8, lora_alpha=16, target_modules=["q_proj", "v_proj"], **variant)
    adapted = randomised(get_peft_model(load(base), config), size, seed)
    adapted.save_pretrained(folder)
    return folder


def load(folder: Path):
    return AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)


def randomised(adapted, size: float = 0.3, seed: int = 1):
    torch.manual_seed(seed)
    for name, parameter in adapted.named_parameters():
        if "lora_B" in name or "trainable_tokens_delta" in name:
            torch.nn.init.normal_(parameter, std=size)
    return adapted


def saying(name, answer, index=0, finish_reason: FinishReason = "stop"):
    """A trajectory that ends 'The answer is ANSWER.'"""
    made = trajectory(name, seed=sum(map(ord, name)) + index)
    words = [" The", " answer", " is", " ", *answer, "."]
    tokens = np.array([*made.token_ids[: len(made.token_ids) // 2], *(IDS[word] for word in words), IDS["<|end|>"]])
    rows = np.arange(len(tokens)) % len(made.token_ids)
    arrays = {name: getattr(made, name)[rows] for name in ("top_ids", "expert_logprobs", "amateur_logprobs")}
    return replace(made, sample_index=index, token_ids=tokens.astype(np.int32), finish_reason=finish_reason, **arrays)


def manifest_for(folder: Path, **contrast) -> RunManifest:
    def card(role: str) -> ModelCard:
        return ModelCard(
            id=str(folder), created=0, role=role, vocab_size=VOCABULARY, max_model_len=96, max_logprobs=128,
            dtype="float32", model_fingerprint=model_fingerprint(folder),
            tokenizer_fingerprint=tokenizer_fingerprint(folder), chat_template_digest=chat_template_digest(folder),
        )  # fmt: skip

    return RunManifest(
        created_at=0, expert=card("expert"), amateur=card("amateur"), system_prompt=None, chat_template_kwargs={},
        decoding=Decoding(), top_k=12, **contrast,
        problems=ProblemSetIdentity(count=1, digest="0"), versions={},
    )  # fmt: skip


def log_softmax(logits):
    return logits - np.log(np.exp(logits).sum(axis=1, keepdims=True))


def trajectory(name: str, seed: int, k: int = 12) -> Trajectory:
    """A trajectory of random ids, of random length, with random log-probabilities."""
    rng = np.random.default_rng(seed)
    steps = int(rng.integers(4, 20))
    expert = log_softmax(rng.normal(0, 3, (steps, VOCABULARY)))
    amateur = log_softmax(expert + rng.normal(0, 1.5, expert.shape))
    top = np.argsort(-expert, axis=1)[:, :k]
    return Trajectory(
        problem_id=name, sample_index=0, finish_reason="stop",
        prompt_token_ids=rng.integers(6, VOCABULARY, int(rng.integers(3, 9))).astype(np.int32),
        token_ids=rng.integers(6, VOCABULARY, steps).astype(np.int32), top_ids=top.astype(np.int32),
        expert_logprobs=np.take_along_axis(expert, top, 1).astype(np.float32),
        amateur_logprobs=np.take_along_axis(amateur, top, 1).astype(np.float32),
    )  # fmt: skip


def write_run(folder: Path, expert: Path, count: int = 6, sealed: bool = True, trajectories=None, **contrast) -> Run:
    run, manifest = Run(str(folder)), manifest_for(expert, **contrast)
    run.claim(manifest, (expert / "tokenizer.json").read_bytes())
    rows = [trajectory(f"p{index}", index) for index in range(count)] if trajectories is None else trajectories
    if rows:
        run.write(rows, {}, manifest)
    if sealed:
        run.seal(run.totals(manifest))
    return run
