"""Adapters, the set of them in a model, and everything that is done to them without choosing ranks.

What methods know of an adapter is :mod:`~rankalloc.adapters.triplets`: P, Λ and Q beside one layer. There are two
kinds, our own layer (adapter) and a view of a LoRA layer of PEFT's (driven), which adopting takes over and peft_files
keeps true in what PEFT writes and reads.

The life of an adapter, with the module that does each step:

    model = Block(proj=Linear(8, 4))
    adapters = attach(model, rank=4)          attaching    Block(proj=Adapter(base_layer=Linear, P, lam, Q))
      or  adopt(get_peft_model(model, ...))   adopting     PEFT's model as it is; P is lora_B, Q is lora_A
    loss.backward(); optimizer.step()         adapter      y = base(x) + s · P Λ Q x
    canonicalize_all(adapters, optimizer)     canonical    the same ΔW with orthonormal P, Q and true singular values
    adapter.drop(kept)                        adapter      lam of the others is zero, and they may come back
    shrink(adapters, optimizer)               memory       P, lam, Q and the optimizer's state lose them for good
    merge(adapters)  or  detach(adapters)     merging      Block(proj=Linear(8, 4)), with ΔW in its weight or without

A mixture has layers of another kind: a frozen layer and the updates of several finished adapters (mixed), which gates
weigh for each input. Bottlenecks (bottleneck) are no updates of weights, and are what LoRA is compared with.

:mod:`~rankalloc.adapters.adapter_set` holds all adapters of a model. Which triplets are kept is decided in
:mod:`rankalloc.methods` and :mod:`rankalloc.training`.
"""
