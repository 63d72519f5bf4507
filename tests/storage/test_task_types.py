"""The task that a file names is one for which PEFT's class can call the model."""

from __future__ import annotations

import pytest

import rankalloc as ra
from tests.support.architectures import ARCHITECTURES
from tests.support.saved import read


@pytest.mark.parametrize(("name", "task"), [
    ("whisper", None),  # PEFT's classes pass input_ids, and these take input_features, input_values or pixel_values
    ("wav2vec2", None), ("vit", None), ("segformer", None),
    ("llava", "CAUSAL_LM"), ("paligemma", "CAUSAL_LM"), ("t5", "SEQ_2_SEQ_LM"), ("bart", "SEQ_2_SEQ_LM"),
    ("gpt2", "CAUSAL_LM"), ("bert", "SEQ_CLS"), ("bert_tokens", "TOKEN_CLS"),
])
@pytest.mark.filterwarnings("ignore")
def test_the_task_of_a_file(name, task, tmp_path):
    ra.save(ra.attach(ARCHITECTURES[name].build(), rank=2), tmp_path)
    assert read(tmp_path)[0]["task_type"] == task


def test_a_classifier_without_its_head_has_no_task(tmp_path):
    ra.save(ra.attach(ARCHITECTURES["bert"].build(), rank=2, modules_to_save=()), tmp_path)
    assert read(tmp_path)[0]["task_type"] is None
