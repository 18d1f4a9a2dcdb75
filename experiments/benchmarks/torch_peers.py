"""What real_model.py compares with: transformers, plain torch and TRL on the same work.

Imported by it where torch is; nothing here uses jax.
"""

import os
import tempfile
from typing import Any

import numpy as np
import torch
import transformers
from real_model import Config, Measured, Products, Step, Used, random_rewards, rate


def load(c: Config) -> Any:
    """The model in float32, with a thread for each core."""
    torch.set_num_threads(len(os.sched_getaffinity(0)))
    return transformers.AutoModelForCausalLM.from_pretrained(
        c.model, dtype=torch.float32
    )


def with_transformers(c: Config) -> Measured:
    """`generate`, and one batch through torch's autograd and AdamW."""
    model = load(c)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-5, weight_decay=0.0)
    rng = np.random.default_rng(0)
    ids = torch.tensor(rng.integers(1000, 40000, (c.prompts, c.prompt_tokens)))
    steps = []
    for i in range(c.steps + 1):
        began = Used.now()
        with torch.no_grad():
            sequences = model.generate(
                ids,
                attention_mask=torch.ones_like(ids),
                do_sample=True,
                top_k=0,
                num_return_sequences=c.group_size,
                min_new_tokens=c.new_tokens,
                max_new_tokens=c.new_tokens,
            )
        sampled = Used.now()
        rewards = torch.tensor(random_rewards(c, i)).reshape(c.prompts, -1)
        centred = rewards - rewards.mean(1, keepdim=True)
        advantages = centred / (rewards.std(1, correction=0, keepdim=True) + 1e-6)
        logits = model(sequences, logits_to_keep=c.new_tokens + 1).logits[:, :-1]
        new = sequences[:, -c.new_tokens :, None]
        logprobs = logits.log_softmax(-1).gather(-1, new)[..., 0]
        ratio = torch.exp(logprobs - logprobs.detach())
        (-(advantages.reshape(-1, 1) * ratio).mean()).backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        steps.append(Step(sampled.since(began), Used.now().since(sampled)))
    del model, optimizer
    versions = {"torch": torch.__version__, "transformers": transformers.__version__}
    return measured(c, steps, versions)


def with_trl(c: Config) -> Measured:
    """`GRPOTrainer`; a step ends where the next one's sampling begins."""
    import trl
    from datasets import Dataset

    model = load(c)
    tokenizer = transformers.AutoTokenizer.from_pretrained(c.model)
    prompt = " the" * c.prompt_tokens
    if len(tokenizer(prompt)["input_ids"]) != c.prompt_tokens:
        raise ValueError("' the' must be one token.")
    marks: list[tuple[Used, Used]] = []  # of sampling: its begin, its end
    generate, seen = model.generate, iter(range(c.steps + 2))

    def timed(*arguments: Any, **options: Any) -> Any:
        began = Used.now()
        made = generate(*arguments, **options)
        marks.append((began, Used.now()))
        return made

    def reward(completions: list[str], **others: Any) -> list[float]:
        return random_rewards(c, next(seen)).tolist()

    model.generate = timed
    settings = trl.GRPOConfig(
        output_dir=tempfile.mkdtemp(),
        per_device_train_batch_size=c.completions,
        num_generations=c.group_size,
        max_completion_length=c.new_tokens,
        generation_kwargs={"min_new_tokens": c.new_tokens},
        max_steps=c.steps + 2,  # the last one is not counted
        beta=0.0,
        learning_rate=1e-5,
        loss_type="grpo",
        temperature=1.0,
        use_cpu=True,
        bf16=False,
        gradient_checkpointing=False,
        report_to=[],
        logging_steps=1000,
        save_strategy="no",
        disable_tqdm=True,
    )
    trainer = trl.GRPOTrainer(
        model=model,
        processing_class=tokenizer,
        reward_funcs=reward,
        args=settings,
        train_dataset=Dataset.from_dict(
            {"prompt": [prompt] * (c.prompts * (c.steps + 2))}
        ),
    )
    trainer.train()
    steps = [
        Step(end.since(began), following.since(end))
        for (began, end), (following, _) in zip(marks, marks[1:], strict=False)
    ]
    del trainer, model
    versions = {"torch": torch.__version__, "trl": trl.__version__}
    return measured(c, steps, versions)


def measured(c: Config, steps: list[Step], versions: dict[str, str]) -> Measured:
    """The steps but the first, beside products of their shapes: every completion has
    its prompt's rows too, and one more row of logits."""

    def multiply(xs: list, ws: list, backward: bool) -> None:
        for x, w in zip(xs, ws, strict=True):
            y = torch.nn.functional.linear(x, w.T)
            if backward:
                y.T @ x  # noqa: B018
                y @ w.T  # noqa: B018

    products = {
        "sample": Products(c.completions, c.completions, False),
        "update": Products(
            c.completions * (c.prompt_tokens + c.new_tokens),
            c.completions * (c.new_tokens + 1),
            True,
        ),
    }
    with torch.no_grad():
        rates = {
            phase: rate(c.model, shapes, multiply, torch.from_numpy)
            for phase, shapes in products.items()
        }
    return Measured(steps[1:], products, rates, versions)


PEERS = {"transformers": with_transformers, "trl": with_trl}
