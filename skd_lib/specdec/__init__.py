"""The speculative-decoding benchmark: speed, acceptance, proof of equal output, the command for vLLM."""
