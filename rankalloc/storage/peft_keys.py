"""The keys of PEFT's adapter_config.json: those that a plain low-rank adapter is read from, and those it needs not.

A method that PEFT builds on LoRA has a key of its own in the configuration of a LoRA, and its file is read as something
else without it. So a key that is not known here, and is set, is refused by its name.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from ..errors import AdapterFileError, did_you_mean

READ = frozenset({
    "peft_type", "r", "lora_alpha", "rank_pattern", "alpha_pattern", "use_rslora", "fan_in_fan_out", "bias",
    "modules_to_save", "target_modules", "target_parameters", "base_model_name_or_path", "task_type",
    "init_lora_weights", "init_r",
})
"""What rankalloc itself looks at."""

OF_TRAINING = frozenset({
    "auto_mapping", "peft_version", "revision", "inference_mode", "exclude_modules", "lora_dropout",
    "layers_to_transform", "layers_pattern", "megatron_core", "loftq_config", "eva_config", "corda_config",
    "lora_ga_config", "velora_config", "runtime_config", "qalora_group_size", "ensure_weight_tying",
    "target_r", "tinit", "tfinal", "deltaT", "beta1", "beta2", "orth_reg_weight", "total_step",
})
"""What says how an adapter was found, made or trained, and not what it computes."""

COMPUTES_OTHERWISE = {
    "use_dora": "DoRA", "trainable_token_indices": "trained tokens", "layer_replication": "replicated layers",
    "megatron_config": "Megatron's parallel layers", "alora_invocation_tokens": "activated LoRA",
    "use_qalora": "QALoRA", "monteclora_config": "MonteCLoRA", "lora_bias": "biases of lora_B",
    "use_bdlora": "block-diagonal LoRA", "arrow_config": "Arrow routing", "kasa_config": "KaSA",
}
"""{key that makes something else of a LoRA: what}."""


def require_plain(config: Mapping[str, Any], what: str) -> None:
    """Make sure that an adapter is no more than low-rank pairs, as far as its configuration tells.

    Raises:
        AdapterFileError: a key is set that makes something else of it, or that is not known.
    """
    for key, value in config.items():
        if key in READ or key in OF_TRAINING or not value:
            continue
        if key in COMPUTES_OTHERWISE:
            raise AdapterFileError(
                f"{what} uses {key} ({COMPUTES_OTHERWISE[key]}), which plain low-rank adapters cannot express"
            )
        raise AdapterFileError(
            f"{what}: {key} is set ({str(value)[:60]}), which this version does not know and which may change what the "
            f"adapter computes{did_you_mean(key, READ | OF_TRAINING)}; where it does not, take it out of the file"
        )
