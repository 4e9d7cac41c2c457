import pytest
import torch
from transformers import Trainer, TrainingArguments

from decoder_cases import tokens_of
from hf_cases import make

ROWS = tokens_of(16, 8, seed=3)


class Rows(torch.utils.data.Dataset):
    def __len__(self):
        return len(ROWS)

    def __getitem__(self, index):
        return {
            "input_ids": ROWS[index],
            "labels": ROWS[index],
            "attention_mask": torch.ones(8, dtype=torch.long),
        }


def trainer(model, folder, **options):
    arguments = TrainingArguments(
        output_dir=str(folder),
        per_device_train_batch_size=2,
        gradient_accumulation_steps=2,
        max_steps=4,
        learning_rate=1e-2,
        logging_steps=1,
        save_steps=2,
        use_cpu=True,
        report_to=[],
        disable_tqdm=True,
        dataloader_pin_memory=False,
        **options,
    )
    return Trainer(model=model, args=arguments, train_dataset=Rows(), eval_dataset=Rows())


def losses(run):
    return [entry["loss"] for entry in run.state.log_history if "loss" in entry]


@pytest.mark.parametrize("name", ["free", "mamba-hopfield-slots-untied"])
def test_training_resumed_is_training_to_the_bit(name, tmp_path):
    whole = trainer(make(name), tmp_path)
    whole.train()
    assert len(losses(whole)) == 4
    resumed = trainer(make(name), tmp_path)
    resumed.train(resume_from_checkpoint=str(tmp_path / "checkpoint-2"))
    assert losses(resumed) == losses(whole)
    ours, theirs = whole.model.state_dict(), resumed.model.state_dict()
    assert all(torch.equal(ours[key], theirs[key]) for key in ours)


def test_training_lowers_the_loss_and_evaluates(tmp_path):
    run = trainer(make("fem-gla"), tmp_path, num_train_epochs=1)
    before = run.evaluate()["eval_loss"]
    run.train()
    assert run.evaluate()["eval_loss"] < before - 0.05
    predicted = run.predict(Rows())
    assert predicted.predictions.shape == (16, 8, 37)
