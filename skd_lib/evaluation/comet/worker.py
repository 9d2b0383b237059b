"""Scores translations. Runs in COMET's environment, which has COMET and nothing of this library.

    python -I worker.py request.json > replies.jsonl

The request names the staged `checkpoint`, the `batch_size` and the `rows`, each with `src`, `mt` and `ref`. Replies are
JSON lines: first `{"version": "..."}`, COMET's; then `{"scores": [...]}` for some rows at a time, in order, as COMET
gives them; or `{"error": "..."}` at any time.
"""

import json
import os
import sys
from importlib.metadata import version
from pathlib import Path
from typing import Any, TextIO

BATCHES_PER_REPLY = 32


def main() -> None:
    """Answer the request in the file. Whatever libraries print goes to standard error."""
    replies = os.fdopen(os.dup(sys.stdout.fileno()), "w", encoding="utf-8")
    os.dup2(sys.stderr.fileno(), sys.stdout.fileno())
    try:
        score(json.loads(Path(sys.argv[1]).read_text(encoding="utf-8")), replies)
    except Exception as error:
        print(json.dumps({"error": f"{type(error).__name__}: {error}"}), file=replies, flush=True)
        raise


def score(request: dict[str, Any], replies: TextIO) -> None:
    """Load the model and score the rows, with COMET's own functions."""
    print(json.dumps({"version": version("unbabel-comet")}), file=replies, flush=True)
    import torch
    from comet import load_from_checkpoint

    model = load_from_checkpoint(request["checkpoint"], reload_hparams=True, local_files_only=True)
    rows, step = request["rows"], BATCHES_PER_REPLY * request["batch_size"]
    for start in range(0, len(rows), step):
        prediction = model.predict(
            rows[start : start + step],
            batch_size=request["batch_size"],
            gpus=int(torch.cuda.is_available()),
            progress_bar=False,
        )
        print(json.dumps({"scores": prediction.scores}), file=replies, flush=True)


if __name__ == "__main__":
    main()
