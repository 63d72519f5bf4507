"""Adapters that already exist: shrink one, compose several, extract one from a checkpoint, and see what a budget costs.

Read in this order:

1. ``truncation``: what all of them share: factors in, one choice over all layers within a budget, a folder out.
   ``checking`` stops before the folder: what an adapter is, and what less of it would keep.
2. ``shrinking``, ``composing`` (with ``compatible``, ``combining`` and ``interference``) and ``nested_cut``: where the
   factors come from, and how the result is cut. ``results`` holds the records that they return.
3. ``metric`` and ``calibration``: how the update of a layer is weighed.
   ``sensitivity`` and ``refining``: singular values weighed anew by gradients.
4. ``points``, ``frontier`` and ``smallest``: quality against budget, evaluated point by point.
5. ``extracting``, with ``checkpoints``, ``differences`` and ``dense``: an adapter out of a fully fine-tuned checkpoint.
6. ``mixing``: several adapters in one model, cut together and weighed for each input (``mixture``, put there by
   ``mixture_model``; ``mixed_heads``, ``gate_use``), and ``weighted``: the one adapter that it is at constant gates.

``side_by_side`` runs the work on layers in parallel. Only ``calibration``, ``sensitivity``, ``mixing`` and the user's
own evaluation need a model.
"""
