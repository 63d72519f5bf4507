"""A step has one loss and one gradient, into however many batches it is cut, whether or not the model counts labels."""

from __future__ import annotations

from functools import partial

import pytest
import torch
from transformers import (
    BertConfig,
    BertForSequenceClassification,
    GPT2LMHeadModel,
    T5Config,
    T5ForConditionalGeneration,
    Trainer,
)

from rankalloc.experiments.plain_trainer import PlainTrainer
from tests.support.models import LENGTH, VOCAB, make_bert, make_gpt2, token_data, token_ids
from tests.support.training import make_trainer


def sequence_classifier(problem):
    torch.manual_seed(0)
    return BertForSequenceClassification(BertConfig(
        vocab_size=VOCAB, hidden_size=32, num_hidden_layers=1, num_attention_heads=2, intermediate_size=32,
        num_labels=1 if problem == "regression" else 3, problem_type=problem, hidden_dropout_prob=0,
        attention_probs_dropout_prob=0,
    ))


def t5():
    torch.manual_seed(0)
    return T5ForConditionalGeneration(T5Config(
        vocab_size=VOCAB, d_model=32, d_kv=8, d_ff=32, num_layers=1, num_heads=2, dropout_rate=0,
        decoder_start_token_id=0, pad_token_id=0,
    ))


class Forgetful(GPT2LMHeadModel):
    """A decoder of the user's own, whose forward pass does not hand the number of labels on."""

    def forward(self, input_ids, attention_mask=None, labels=None, num_items_in_batch=None, **named):
        return super().forward(input_ids=input_ids, attention_mask=attention_mask, labels=labels, **named)


def forgetful():
    model = make_gpt2()
    model.__class__ = Forgetful
    return model


def examples(labels):
    """Eight rows; ``labels(row, ids)`` gives each its labels."""
    ids, mask = token_ids(rows=8), torch.ones(LENGTH, dtype=torch.long)
    return [
        {"input_ids": one, "attention_mask": mask, "labels": labels(row, one)} for row, one in enumerate(ids)
    ]


def some(row, ids):
    """Row ``row`` learns its last ``row`` tokens: the first none at all."""
    return torch.where(torch.arange(LENGTH) < LENGTH - row, -100, ids)


CASES = {  # the model, its labels, and whether its loss is the mean over its batch whatever it is told
    "text classification": (lambda: sequence_classifier("single_label_classification"),
                            lambda row, ids: torch.tensor(row % 3), True),
    "several labels": (lambda: sequence_classifier("multi_label_classification"),
                       lambda row, ids: torch.tensor([row % 2, 1, 0.0]), False),
    "regression": (lambda: sequence_classifier("regression"), lambda row, ids: torch.tensor(row / 8), False),
    "token classification": (make_bert, lambda row, ids: some(row, ids % 5), True),
    "seq2seq": (t5, some, True),
    "a decoder that counts": (make_gpt2, some, False),
    "a decoder that does not": (forgetful, some, True),
}


@pytest.mark.parametrize("case", CASES)
def test_a_step_is_the_same_in_one_batch_and_in_several(case, tmp_path):
    make, labels, weighs = CASES[case]
    data, seen = examples(labels), {}
    for size in (8, 4, 1) if weighs else (8, 4):
        model = make()
        trainer = make_trainer(
            model, tmp_path, data=data, steps=1, trainer_class=partial(PlainTrainer, example=batch(data)),
            per_device_train_batch_size=size, gradient_accumulation_steps=8 // size, max_grad_norm=0, optim="sgd",
            train_sampling_strategy="sequential",
        )
        assert trainer.weighs_batches == weighs
        before = torch.cat([p.detach().flatten().clone() for p in model.parameters()])
        loss = trainer.train().training_loss
        step = torch.cat([p.detach().flatten() for p in model.parameters()]) - before
        seen[size] = (loss, step)
    whole, moved = seen.pop(8)
    expected = make()(**batch(data)).loss.item()
    assert whole == pytest.approx(expected, rel=1e-5) and moved.abs().max() > 1e-5
    for loss, step in seen.values():
        assert loss == pytest.approx(whole, rel=1e-5)
        torch.testing.assert_close(step, moved, rtol=1e-3, atol=1e-7)


def batch(data):
    return {key: torch.stack([row[key] for row in data]) for key in data[0]}


def test_one_batch_a_step_has_the_bits_of_the_trainer(tmp_path):
    data, ends = token_data(8), []
    for kind in (Trainer, partial(PlainTrainer, example=batch(data))):
        model = make_bert()
        make_trainer(model, tmp_path, data=data, steps=2, trainer_class=kind).train()
        ends.append(model.state_dict())
    assert all(torch.equal(tensor, ends[1][name]) for name, tensor in ends[0].items())
