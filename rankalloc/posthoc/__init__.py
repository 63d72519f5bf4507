"""Adapters that already exist: shrink one, compose several, and see what a budget costs.

``truncation`` is what all of them share: factors in, one global choice over all layers, a folder out. ``shrinking``,
``composing`` and ``frontier`` say what goes in and what comes back; ``metric`` and ``calibration`` are how a layer's
update is weighed; ``results`` what is told. Nothing here needs a model but ``calibration`` and who evaluates.
"""
