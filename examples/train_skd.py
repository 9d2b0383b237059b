"""Speculative Knowledge Distillation with the loop on the page: no Trainer, no pipeline, no tracking server.

    python examples/train_skd.py TEACHER STUDENT train.jsonl --output student

TEACHER and STUDENT are names or folders of causal language models with one tokenizer. Each line of the data has
`messages`, or `prompt` and `completion`, or `prompt` alone: SKD needs no answers. Runs on a GPU where there is one.
"""

import argparse
from pathlib import Path

import torch
from transformers import AutoModelForCausalLM, AutoTokenizer, get_cosine_schedule_with_warmup

from skd_lib import InterleavedSampler, SkdError, divergence, top_k
from skd_lib.data.formats import tokenize_row
from skd_lib.data.readers import read_rows
from skd_lib.models.references import parse_reference


def options() -> argparse.Namespace:
    """Read the command line."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("teacher")
    parser.add_argument("student")
    parser.add_argument("data", type=Path)
    parser.add_argument("--output", type=Path, default=Path("student"))
    parser.add_argument("--steps", type=int, default=100)
    parser.add_argument("--batch-size", type=int, default=8)
    parser.add_argument("--learning-rate", type=float, default=1e-5)
    parser.add_argument("--top-k", type=int, default=25, help="a draft stands if the teacher ranks it among these")
    parser.add_argument("--gamma", type=int, default=5, help="tokens drafted for each teacher call")
    parser.add_argument("--max-new-tokens", type=int, default=128)
    parser.add_argument("--temperature", type=float, default=0.5)
    parser.add_argument("--seed", type=int, default=0)
    return parser.parse_args()


def main() -> None:
    """Train, and save the student."""
    args = options()
    for name in (args.teacher, args.student):
        parse_reference(name)  # a folder that does not exist is an error now, not after requests to the hub
    rows = read_rows(args.data)
    device = "cuda" if torch.cuda.is_available() else "cpu"
    torch.manual_seed(args.seed)
    tokenizer = AutoTokenizer.from_pretrained(args.teacher)
    teacher = AutoModelForCausalLM.from_pretrained(args.teacher).to(device).eval().requires_grad_(False)
    student = AutoModelForCausalLM.from_pretrained(args.student, dtype=torch.float32).to(device)

    eos_id, pad_id = tokenizer.eos_token_id, tokenizer.pad_token_id or 0
    prompts = [
        tokenize_row(tokenizer, row, [eos_id], where=f"{args.data}, example {number}").prompt_ids
        for number, row in enumerate(rows, start=1)
    ]

    sampler = InterleavedSampler(student, teacher, top_k(args.top_k), gamma=args.gamma)
    forward_kl = divergence("forward_kl")
    optimizer = torch.optim.AdamW(student.parameters(), lr=args.learning_rate)
    schedule = get_cosine_schedule_with_warmup(optimizer, args.steps // 10, args.steps)

    for step in range(args.steps):
        # 1. The student drafts; the teacher replaces drafts outside its top K (algorithm 1 of the paper).
        batch = [prompts[int(i)] for i in torch.randint(len(prompts), (args.batch_size,))]
        longest = max(map(len, batch))
        input_ids = torch.tensor([[pad_id] * (longest - len(row)) + row for row in batch], device=device)
        mask = torch.tensor([[0] * (longest - len(row)) + [1] * len(row) for row in batch], device=device)
        out = sampler.generate(
            input_ids,
            mask,
            max_new_tokens=args.max_new_tokens,
            do_sample=True,
            temperature=args.temperature,
            eos_token_id=eos_id,
            pad_token_id=pad_id,
        )
        # 2. Both models read the interleaved sequences.
        written = torch.cat([mask, out.response_mask.long()], dim=1)
        inputs = {"input_ids": out.sequences, "attention_mask": written}
        predicts = written.new_zeros(written.shape).bool()  # positions whose output predicts a response token
        predicts[:, longest - 1 : -1] = out.response_mask
        with torch.no_grad():
            log_p = teacher(**inputs).logits[predicts].log_softmax(-1)
        log_q = student(**inputs).logits[predicts].log_softmax(-1)
        # 3. The divergence from the teacher, averaged over response tokens.
        loss = forward_kl(log_p, log_q).mean()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(student.parameters(), 1.0)
        optimizer.step()
        schedule.step()
        optimizer.zero_grad()
        figures = out.statistics
        print(f"step {step + 1}: loss {loss.item():.4f}, {figures.rejection_rate:.0%} of the drafts replaced, ", end="")
        print(f"{figures.tokens_per_teacher_call:.1f} tokens a teacher call", flush=True)

    student.save_pretrained(args.output)
    tokenizer.save_pretrained(args.output)
    print(f"the student is in {args.output}")


if __name__ == "__main__":
    try:
        main()
    except SkdError as error:
        raise SystemExit(f"error: {error}") from None
