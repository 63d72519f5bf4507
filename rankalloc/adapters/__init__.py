"""The P·Λ·Q adapter, the set of them in a model, and everything that is done to it without choosing ranks.

The life of an adapter, with the module that does each step:

    model = Block(proj=Linear(8, 4))
    adapters = attach(model, rank=4)          attaching    Block(proj=Adapter(base_layer=Linear, P, lam, Q))
    loss.backward(); optimizer.step()         adapter      y = base(x) + s · P Λ Q x
    canonicalize_all(adapters, optimizer)     canonical    the same ΔW with orthonormal P, Q and true singular values
    adapter.drop(kept)                        adapter      lam of the others is zero, and they may come back
    shrink(adapters, optimizer)               memory       P, lam, Q and the optimizer's state lose them for good
    merge(adapters)  or  detach(adapters)     merging      Block(proj=Linear(8, 4)), with ΔW in its weight or without

:mod:`~rankalloc.adapters.adapter_set` holds all adapters of a model. Which triplets are kept is decided in
:mod:`rankalloc.methods` and :mod:`rankalloc.training`.
"""
