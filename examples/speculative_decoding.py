"""Speculative decoding with a distilled student: the teacher's own greedy answer, with fewer calls of the teacher.

    python examples/speculative_decoding.py TEACHER STUDENT "Add 12 and 30."

TEACHER and STUDENT are names or folders of models that share a tokenizer.
"""

import argparse

from transformers import AutoModelForCausalLM, AutoTokenizer

from skd_lib import InterleavedSampler, SkdError, lossless
from skd_lib.models.references import parse_reference


def main() -> None:
    """Answer one prompt."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("teacher")
    parser.add_argument("student")
    parser.add_argument("prompt")
    parser.add_argument("--gamma", type=int, default=5, help="tokens drafted for each teacher call")
    parser.add_argument("--max-new-tokens", type=int, default=64)
    options = parser.parse_args()

    for name in (options.teacher, options.student):
        parse_reference(name)  # a folder that does not exist is an error now, not after requests to the hub
    tokenizer = AutoTokenizer.from_pretrained(options.teacher)
    teacher = AutoModelForCausalLM.from_pretrained(options.teacher).eval()
    student = AutoModelForCausalLM.from_pretrained(options.student).eval()
    text = options.prompt
    if tokenizer.chat_template:
        chat = [{"role": "user", "content": text}]
        text = tokenizer.apply_chat_template(chat, tokenize=False, add_generation_prompt=True)
    inputs = tokenizer(text, return_tensors="pt", add_special_tokens=not tokenizer.chat_template)

    sampler = InterleavedSampler(student, teacher, lossless(), gamma=options.gamma)
    out = sampler.generate(
        inputs["input_ids"], eos_token_id=tokenizer.eos_token_id, max_new_tokens=options.max_new_tokens
    )
    response = out.sequences[0, inputs["input_ids"].shape[1] :]
    print(tokenizer.decode(response, skip_special_tokens=True))
    figures = out.statistics
    print(f"{figures.tokens} tokens in {figures.teacher_calls} teacher calls; ", end="")
    print(f"{figures.acceptance_rate:.0%} of the drafted tokens stand")


if __name__ == "__main__":
    try:
        main()
    except SkdError as error:
        raise SystemExit(f"error: {error}") from None
