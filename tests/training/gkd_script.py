"""A script as TRL's documentation has it; the test gives it the models' folders."""

import sys

from datasets import Dataset
from transformers import AutoModelForCausalLM, AutoTokenizer
from trl.experimental.gkd import GKDConfig, GKDTrainer

teacher, student, output = sys.argv[1:]
tokenizer = AutoTokenizer.from_pretrained(student)
model = AutoModelForCausalLM.from_pretrained(student)
teacher_model = AutoModelForCausalLM.from_pretrained(teacher)
conversation = [{"role": "user", "content": "Hi, how are you?"}, {"role": "assistant", "content": "I'm great thanks"}]
dataset = Dataset.from_dict({"messages": [conversation] * 8})
training_args = GKDConfig(
    output_dir=output,
    per_device_train_batch_size=2,
    max_steps=2,
    learning_rate=1e-3,
    temperature=0.9,
    lmbda=0.5,
    beta=0.5,
    max_new_tokens=8,
    max_length=128,
    logging_steps=1,
    report_to="none",
    use_cpu=True,
    bf16=False,
    gradient_checkpointing=False,
)
trainer = GKDTrainer(
    model=model,
    teacher_model=teacher_model,
    args=training_args,
    processing_class=tokenizer,
    train_dataset=dataset,
    eval_dataset=dataset,
)
trainer.train()
print("steps", trainer.state.global_step, "eval_loss" in trainer.evaluate())
trainer.save_model(output)
