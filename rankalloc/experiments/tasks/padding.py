"""The padding token: one for the tokenizer that pads and the model that looks for it.

A decoder with a classifier on top reads the last token that is not padding. Where its configuration names another
padding token than the tokenizer's, it reads the padding of a short text, so that a text's loss depends on what it is
batched with.
"""

from __future__ import annotations

from typing import Any

from transformers import PreTrainedConfig, PreTrainedModel

from ...errors import ConfigError


def choose_padding(tokenizer: Any, config: PreTrainedConfig, name: str) -> list[str]:
    """Give ``tokenizer`` a padding token, on the right; what is to be said of it, one sentence each.

    A tokenizer without one takes the configuration's where that is one of its special tokens, or else its end token.

    Raises:
        ConfigError: it has none of the three.
    """
    held = getattr(config.get_text_config(), "pad_token_id", None)
    if tokenizer.pad_token is None:
        if held is not None and held in tokenizer.all_special_ids:
            tokenizer.pad_token = tokenizer.convert_ids_to_tokens(held)
        elif tokenizer.eos_token is not None:
            tokenizer.pad_token = tokenizer.eos_token
        else:
            raise ConfigError(f"the tokenizer of model {name!r} has neither a padding nor an end token; add one")
    # Positions are counted from the left, padding included; only XLNet's classifier reads a text's very end.
    if getattr(config, "model_type", None) != "xlnet":
        tokenizer.padding_side = "right"
    if held is None or held == tokenizer.pad_token_id or config.is_encoder_decoder:
        return []
    return [
        f"the padding token of the tokenizer is {tokenizer.pad_token!r} ({tokenizer.pad_token_id}) and that of the "
        f"model's configuration {held}: the model is given the tokenizer's, so give it that too where you use it"
    ]


def pad_alike(model: PreTrainedModel, tokenizer: Any) -> None:
    """Let ``model`` and its generation take the padding token of ``tokenizer`` for padding.

    After loading: a model that is built with another padding token may count its positions from another number. An
    encoder-decoder keeps its own, which is what its decoder begins with.
    """
    if model.config.is_encoder_decoder:
        return
    for config in (model.config, model.config.get_text_config(), getattr(model, "generation_config", None)):
        if config is not None:
            config.pad_token_id = tokenizer.pad_token_id
