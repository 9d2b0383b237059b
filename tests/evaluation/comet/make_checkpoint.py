"""Makes a tiny COMET model with random weights in COMET's own layout. Runs in COMET's environment.

python -I make_checkpoint.py FOLDER [poison]
"""

import os
import sys
from pathlib import Path

import pytorch_lightning as lightning
import sentencepiece
import torch
from comet.models import RegressionMetric
from pytorch_lightning.core.saving import save_hparams_to_yaml
from transformers import XLMRobertaConfig, XLMRobertaTokenizerFast

CORPUS = ["open the file", "ouvrir le fichier", "close the door", "fermer la porte", "save and print the page"]


class Poison:
    """Runs code when it is unpickled."""

    def __reduce__(self):
        return os.mkdir, ("poisoned",)


def main(folder: Path, poison: bool) -> None:
    encoder = folder / "encoder"
    encoder.mkdir(parents=True)
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter(CORPUS * 20),
        model_prefix=str(encoder / "sentencepiece.bpe"),
        vocab_size=64,
        model_type="unigram",
        hard_vocab_limit=False,
        minloglevel=2,
    )
    tokenizer = XLMRobertaTokenizerFast(vocab_file=str(encoder / "sentencepiece.bpe.model"))
    tokenizer.save_pretrained(encoder)
    XLMRobertaConfig(
        vocab_size=len(tokenizer),
        hidden_size=32,
        num_hidden_layers=2,
        num_attention_heads=4,
        intermediate_size=64,
        max_position_embeddings=130,
        pad_token_id=tokenizer.pad_token_id,
        bos_token_id=tokenizer.bos_token_id,
        eos_token_id=tokenizer.eos_token_id,
        type_vocab_size=1,
        initializer_range=0.5,
    ).save_pretrained(encoder)

    torch.manual_seed(0)
    model = RegressionMetric(
        encoder_model="XLM-RoBERTa",
        pretrained_model=str(encoder),
        load_pretrained_weights=False,
        hidden_sizes=[16],
        layer_transformation="softmax",
        train_data=["train.csv"],
        validation_data=["validation.csv"],
    )
    model.save_hyperparameters({"class_identifier": "regression_metric", "pretrained_model": "no/such-encoder"})
    trainer = lightning.Trainer(accelerator="cpu", logger=False, enable_checkpointing=False)
    trainer.strategy.connect(model)
    checkpoint = folder / "checkpoints" / "model.ckpt"
    trainer.save_checkpoint(checkpoint)
    save_hparams_to_yaml(folder / "hparams.yaml", model.hparams)
    if poison:
        content = torch.load(checkpoint, weights_only=True)
        torch.save({**content, "poison": Poison()}, checkpoint)


if __name__ == "__main__":
    main(Path(sys.argv[1]), poison="poison" in sys.argv)
