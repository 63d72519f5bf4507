"""Frozen layers: which can be adapted, as which matrix, and how layer and update are computed fast.

To rankalloc a layer is a frozen matrix W (d_out, d_in). An adapter adds a low-rank update to it:

    y = W x + b + s · P Λ Q x        Q (r, d_in), Λ = diag(lam), P (d_out, r), s a constant

          x ──────────── W ───────────┐
          │ (…, d_in)                 +── y (…, d_out)
          └── Q ── Λ ── P ── · s ─────┘
             (…, r)

Four questions about a layer are answered here, from its class and weight alone; nothing here knows adapters.

- *Can it be adapted, and if not, why?* :mod:`.adaptable` asks the registries of :mod:`.kinds` (nn.Linear, Conv1D,
  embeddings, convolutions) and :mod:`.quantized` (4-bit, 8-bit, torchao). :mod:`.targets` finds such layers in a model.
- *As which matrix?* A :class:`~rankalloc.layers.kinds.Kind` maps the stored weight to W and back, and defines what P Q
  adds to the layer's output; ΔW is never formed.
- *How is a training step computed?* A plain call of the frozen layer and three small products would spend most of their
  extra time in passes over activations. :mod:`.fused` computes layer and update as one autograd.Function that adds in
  place and keeps only x and z = Q x; :mod:`.families` computes layers that read the same tensor together;
  :mod:`.products` chooses the library for the products with W; :mod:`.native` is the same function in C++. Layers or
  calls that this path does not cover (hooks, other dtypes, evaluation) use the plain formula.
- *Where do its weights and inputs live?* :mod:`.sharding` recognises weights that are split over processes,
  :mod:`.replicas` the copies of DataParallel, and :mod:`.batches` runs a model on data and leaves its mode unchanged.

Evaluation always uses the plain formula, whose numbers equal those of an exported adapter to the bit.
"""
