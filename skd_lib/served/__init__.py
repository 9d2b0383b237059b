"""A teacher on an OpenAI-compatible server: its responses, and its log-probabilities along given ones."""
