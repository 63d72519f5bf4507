"""What must hold on a GPU as on the CPU: whole runs, their memory, files and checkpoints. Skipped without one."""

from __future__ import annotations

import copy
import os
import shutil

import pytest
import torch
from peft import PeftModel
from transformers import LlamaConfig, LlamaForCausalLM, MixtralConfig, MixtralForCausalLM

import rankalloc as ra
from tests.support.batches import mlp_batches
from tests.support.models import (
    assert_same,
    logits_of,
    make_bert,
    make_llama,
    make_mlp,
    randomize,
    tensors_of,
    token_data,
    token_ids,
)
from tests.support.training import make_trainer, train

pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")  # read once, when cuBLAS begins: its sums are repeatable
BUDGET = ra.RankBudget(ranks=20, every=2)
SETTINGS = {"use_cpu": False, "optim": "adamw_torch_fused", "full_determinism": True}


@pytest.fixture(autouse=True)
def _deterministic():
    yield
    torch.use_deterministic_algorithms(False)


def begin(seed=1, dropout=0.1):
    model = make_bert(dropout=dropout).cuda()
    torch.manual_seed(seed)
    adapters = ra.attach(model, rank=4, dropout=dropout)
    return model, adapters, ra.RankCallback(adapters, BUDGET, method="adalora")


@pytest.mark.parametrize("precision", [{}, {"bf16": True}, {"fp16": True}])
def test_a_run_meets_its_budget_twice_the_same(precision, tmp_path):
    found = []
    for attempt in range(2):
        model, adapters, callback = begin()
        make_trainer(model, tmp_path / str(attempt), [callback], **SETTINGS, **precision).train()
        assert sum(adapters.ranks().values()) == 20
        assert all(tensor.is_cuda for tensor in adapters.parameters())
        found.append((tensors_of(model), callback.trace.allocations, callback.trace.singular_values))
    assert_same(found[0][0], found[1][0])
    assert found[0][1:] == found[1][1:]


@pytest.mark.parametrize("cut", [1, 9, 17])
def test_an_interrupted_run_ends_with_the_bits_of_a_whole_one(cut, tmp_path):
    model, _, callback = begin()
    make_trainer(model, tmp_path / "whole", [callback], save_strategy="steps", save_steps=1, **SETTINGS).train()
    resumed, _, other = begin(seed=77)
    shutil.copytree(tmp_path / "whole" / f"checkpoint-{cut}", tmp_path / "cut" / f"checkpoint-{cut}")
    make_trainer(resumed, tmp_path / "cut", [other], **SETTINGS).train(
        resume_from_checkpoint=str(tmp_path / "cut" / f"checkpoint-{cut}")
    )
    assert_same(tensors_of(resumed), tensors_of(model))
    assert other.trace.allocations == callback.trace.allocations


@pytest.mark.parametrize("init", ["svd", "lora"])
def test_a_reader_gets_the_same_model(init, tmp_path):
    model = make_llama().cuda().train()
    base = copy.deepcopy(model)
    adapters = ra.attach(model, rank=6, init=init)
    controller = ra.RankController(adapters, ra.RankBudget(fraction=0.5, every=2), 12)
    optimizer = torch.optim.AdamW(adapters.parameters(), lr=1e-2, fused=True)
    train(controller, optimizer, 12, lambda step: model(ids := token_ids(step).cuda(), labels=ids).loss)
    want = logits_of(model, token_ids().cuda())
    ra.save(adapters, tmp_path / "adapter")
    read = PeftModel.from_pretrained(copy.deepcopy(base), tmp_path / "adapter")
    torch.testing.assert_close(logits_of(read, token_ids().cuda()), want, rtol=1e-4, atol=1e-4)
    ra.load(base, tmp_path / "adapter")
    torch.testing.assert_close(logits_of(base, token_ids().cuda()), want, rtol=1e-4, atol=1e-4)
    ra.merge(adapters)
    torch.testing.assert_close(logits_of(model, token_ids().cuda()), want, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("method", [name for name, one in ra.METHODS.items() if one.when == "during"])
def test_every_method_chooses_on_the_gpu_what_it_chooses_on_the_cpu(method):
    found = []
    for device in ("cpu", "cuda"):
        model = make_mlp()
        torch.manual_seed(1)
        adapters = ra.attach(model, rank=4, init=ra.METHODS[method].init)
        randomize(adapters)
        model.to(device)
        controller = ra.RankController(adapters, ra.RankBudget(ranks=5, every=2), 12, method)
        x = torch.randn(12, 16, generator=torch.Generator().manual_seed(3)).to(device)
        optimizer = torch.optim.SGD(adapters.parameters(), lr=1e-3)
        train(controller, optimizer, 12, lambda step, model=model, x=x: model(x).square().mean())
        found.append(controller.finish().final_ranks)
    assert found[0] == found[1]


@pytest.mark.parametrize("method", [name for name, one in ra.METHODS.items() if one.when == "before" and one.lora])
def test_every_planner_plans_on_the_gpu(method):
    from torch.nn import functional as F

    model = make_mlp().cuda()
    options = {"rank_pattern": {"0": 2, "2": 2, "4": 1}} if method == "manual" else {}
    batches = [tuple(part.cuda() for part in batch) for batch in mlp_batches()]
    plan = ra.plan_ranks(model, batches, ra.RankBudget(ranks=5), method, rank=4, loss_fn=F.mse_loss, **options)
    assert sum(dict(plan).values()) == 5


def test_cutting_gives_memory_back():
    model = LlamaForCausalLM(LlamaConfig(
        vocab_size=64, hidden_size=1024, intermediate_size=2048, num_hidden_layers=2, num_attention_heads=8,
        num_key_value_heads=8,
    )).cuda().train()  # fmt: skip
    adapters = ra.attach(model, rank=64, modules_to_save=())
    optimizer = torch.optim.AdamW(adapters.parameters(), lr=1e-4, fused=True)
    controller = ra.RankController(adapters, ra.RankBudget(fraction=0.25, warmup=0.5, every=4), 12)
    used = []

    def loss(step):
        torch.cuda.synchronize()
        used.append(torch.cuda.memory_allocated())
        return model(ids := token_ids(step).cuda(), labels=ids).loss

    train(controller, optimizer, 12, loss)
    torch.cuda.synchronize()
    whole = 3 * 4 * sum(shape.params_per_rank for shape in adapters.shapes()) * 64  # weights and Adam's two moments
    assert used[2] - torch.cuda.memory_allocated() > 0.6 * whole


def test_experts():
    model = MixtralForCausalLM(MixtralConfig(
        vocab_size=50, hidden_size=32, intermediate_size=48, num_hidden_layers=2, num_attention_heads=4,
        num_key_value_heads=2, num_local_experts=4, num_experts_per_tok=2,
    )).eval()  # fmt: skip
    other = copy.deepcopy(model).cuda()
    found = []
    for one, device in ((model, "cpu"), (other, "cuda")):
        randomize(ra.attach(one, rank=2))
        one.to(device)
        found.append(logits_of(one, token_ids().to(device)).cpu())
    torch.testing.assert_close(found[0], found[1], rtol=1e-3, atol=1e-3)


def test_four_bits_train_and_are_saved(tmp_path):
    pytest.importorskip("bitsandbytes")
    from transformers import BitsAndBytesConfig

    LlamaForCausalLM(LlamaConfig(
        vocab_size=64, hidden_size=128, intermediate_size=256, num_hidden_layers=2, num_attention_heads=4,
        num_key_value_heads=4,
    )).save_pretrained(tmp_path / "base")  # fmt: skip
    quantised = BitsAndBytesConfig(
        load_in_4bit=True, bnb_4bit_quant_type="nf4", bnb_4bit_use_double_quant=True,
        bnb_4bit_compute_dtype=torch.bfloat16,
    )

    def base():
        return LlamaForCausalLM.from_pretrained(
            tmp_path / "base", quantization_config=quantised, dtype=torch.bfloat16, device_map={"": 0}
        )

    model = base()
    adapters = ra.attach(model, rank=4, modules_to_save=())
    callback = ra.RankCallback(adapters, BUDGET, method="adalora")
    data = [{"input_ids": row["input_ids"], "labels": row["input_ids"]} for row in token_data()]
    make_trainer(model, tmp_path / "run", [callback], data=data, bf16=True, use_cpu=False, learning_rate=1e-3).train()
    assert sum(adapters.ranks().values()) == 20
    ra.save(adapters, tmp_path / "adapter")
    read = PeftModel.from_pretrained(base(), tmp_path / "adapter")
    got, want = (logits_of(one, token_ids().cuda()).float() for one in (read, model))
    torch.testing.assert_close(got, want, rtol=0.05, atol=0.05)
