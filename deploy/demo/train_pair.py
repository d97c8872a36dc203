"""Trains the demo's expert and amateur from scratch, on generated problems, on the CPU.

In: `word_problems`. Out: two Hugging Face model folders, expert/ and amateur/, beside this file.
`python deploy/demo/train_pair.py [expert|amateur]` takes about 16 minutes for both on two cores.

The two models differ in size, and in how often their teacher skips working: after any step but the last,
a worked solution may jump straight to `The answer is …`. Both models learn to jump: the amateur
nearly always, the expert often. Most of the expert's errors come from it.
"""

from __future__ import annotations

import random
import sys
import time
from dataclasses import dataclass
from pathlib import Path

import torch
from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast
from word_problems import GAINS, GROWTHS, LOSSES, NAMES, THINGS, WordProblem, problems

HERE = Path(__file__).parent
SYSTEM_PROMPT = "Please reason step by step."
CONTEXT = 256
"""Positions; prompts take about 50 and solutions at most 40."""
SPECIAL = ("<|pad|>", "<|unk|>", "<|end|>", "<|system|>", "<|user|>", "<|assistant|>")
CHAT_TEMPLATE = (
    "{% for message in messages %}<|{{ message['role'] }}|>{{ message['content'] }}<|end|>{% endfor %}"
    "{% if add_generation_prompt %}<|assistant|>{% endif %}"
)


@dataclass(frozen=True)
class Student:
    """Shape, teacher's jump probability by number of steps, and length of training of one model."""

    name: str
    layers: int
    width: int
    heads: int
    inner: int
    jump: dict[int, float]
    optimizer_steps: int
    batch: int
    learning_rate: float


EXPERT = Student("expert", 4, 128, 4, 384, {2: 0.35, 3: 0.6}, 3000, 64, 3e-3)
AMATEUR = Student("amateur", 2, 64, 2, 192, {2: 0.95, 3: 0.95}, 3000, 64, 4e-3)


def build_tokenizer() -> PreTrainedTokenizerFast:
    """Word-level: a word carries its leading space, a digit or a sign is a token of its own."""
    pieces = pre_tokenizers.Split(Regex(r" ?[A-Za-z]+|[0-9]|[^A-Za-z0-9 ]| "), behavior="isolated")
    text = [SYSTEM_PROMPT, "The answer is How many does have now has more +-*=.? 0123456789"]
    text += [*NAMES, *NAMES.values(), *THINGS, *(p.format(n=0) for p in (*GAINS, *LOSSES)), *GROWTHS.values()]
    words = {piece for line in text for piece, _ in pieces.pre_tokenize_str(line)}
    words |= {f" {word}" for word in words if word.isalpha()}
    vocabulary = {token: index for index, token in enumerate((*SPECIAL, *sorted(words)))}
    tokenizer = Tokenizer(models.WordLevel(vocabulary, unk_token="<|unk|>"))
    tokenizer.pre_tokenizer = pieces
    tokenizer.decoder = decoders.Fuse()
    tokenizer.add_special_tokens(list(SPECIAL))
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        eos_token="<|end|>",
        pad_token="<|pad|>",
        unk_token="<|unk|>",
        chat_template=CHAT_TEMPLATE,
        model_max_length=CONTEXT,
        clean_up_tokenization_spaces=False,
    )


def worked_solution(problem: WordProblem, jump: dict[int, float], rng: random.Random) -> str:
    """The teacher's solution: before each further step it jumps to the answer with `jump[steps]`."""
    steps = len(problem.equations)
    shown = 1
    while shown < steps and rng.random() >= jump[steps]:
        shown += 1
    return problem.solution(shown)


def batches(student: Student, tokenizer: PreTrainedTokenizerFast, seed: int):
    """An endless stream of (input_ids, labels), both [batch, width]. Only the solution is labelled."""
    stream, rng = problems("pretrain", seed), random.Random(seed + 1)
    prompt = f"<|system|>{SYSTEM_PROMPT}<|end|><|user|>{{}}<|end|><|assistant|>"
    pad, ignore = tokenizer.pad_token_id, -100
    backend = tokenizer.backend_tokenizer
    while True:
        rows = []
        for problem in (next(stream) for _ in range(student.batch)):
            asked = backend.encode(prompt.format(problem.question)).ids
            told = backend.encode(worked_solution(problem, student.jump, rng) + "<|end|>").ids
            rows.append((asked + told, [ignore] * len(asked) + told))
        width = max(len(ids) for ids, _ in rows)
        yield (
            torch.tensor([ids + [pad] * (width - len(ids)) for ids, _ in rows]),
            torch.tensor([labels + [ignore] * (width - len(labels)) for _, labels in rows]),
        )


def train(student: Student, tokenizer: PreTrainedTokenizerFast) -> LlamaForCausalLM:
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=len(tokenizer),
        hidden_size=student.width,
        intermediate_size=student.inner,
        num_hidden_layers=student.layers,
        num_attention_heads=student.heads,
        num_key_value_heads=student.heads,
        max_position_embeddings=CONTEXT,
        bos_token_id=None,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
    )
    model = LlamaForCausalLM(config)
    optimizer = torch.optim.AdamW(model.parameters(), lr=student.learning_rate, betas=(0.9, 0.98), weight_decay=0.01)
    schedule = torch.optim.lr_scheduler.OneCycleLR(
        optimizer, student.learning_rate, total_steps=student.optimizer_steps, pct_start=0.05
    )
    print(f"{student.name}: {model.num_parameters():,} parameters, vocabulary {len(tokenizer)}")
    began = time.monotonic()
    for step, (ids, labels) in zip(range(student.optimizer_steps), batches(student, tokenizer, seed=7), strict=False):
        loss = model(input_ids=ids, labels=labels).loss
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        schedule.step()
        optimizer.zero_grad(set_to_none=True)
        if step % 100 == 0:
            print(f"{student.name} step {step} loss {loss.item():.4f} {time.monotonic() - began:.0f} s", flush=True)
    return model


def main() -> None:
    chosen = sys.argv[1:] or ["expert", "amateur"]
    tokenizer = build_tokenizer()
    for student in (EXPERT, AMATEUR):
        if student.name in chosen:
            folder = HERE / student.name
            train(student, tokenizer).save_pretrained(folder)
            tokenizer.save_pretrained(folder)


if __name__ == "__main__":
    main()
