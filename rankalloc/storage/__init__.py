"""Adapters on disk.

An adapter is a folder with two files, in PEFT's format:

    adapter_config.json            r, lora_alpha, target_modules, patterns of ranks; the base model's name
    adapter_model.safetensors      lora_A = Q and lora_B = P·(Λ·s) of each layer, and the task heads that were trained;
                                   in its metadata the base's fingerprint, a hash of the configuration, whether the
                                   adapter is nested, and the layers without ranks (``left_out``)

The life of these files, and the module for each step:

1. ``model_saving`` attaches adapters so that a transformers model's own ``save_pretrained`` writes such a folder, and
   beside it in a Trainer's checkpoint ``trained_state``, from which a run goes on exactly.
2. ``saving`` turns the adapters of a model into factors, and ``folder`` writes them in a ``layout``, tensor by tensor,
   through ``tensors``, the only module that opens safetensors files. ``fingerprint`` marks the base they belong to.
3. ``reading`` opens a folder without a model and reads factors on request; ``triplets`` finds the zero padding,
   ``peft_keys`` and ``patterns`` say what a configuration may hold, and ``experts`` how stacked experts lie in a file.
   ``plain_lora`` holds a whole adapter in memory, for changing and writing it again.
4. ``loading`` attaches an adapter to a model, after ``fitting`` has checked its factors against the layers, and
   ``fingerprint`` the base.
5. ``readers`` is the table of tools that read adapters, and ``reader_facts`` what it says of a folder that is there.
   ``exporting`` writes one of the ``export_formats``, and ``importing`` reads the files of other tools, whose names
   ``key_names`` knows. ``skeletons`` builds a model without weights, to read the names and shapes of its layers.
6. ``mixture_folder`` and ``bottleneck_folder`` have formats of their own, for what is not one plain LoRA;
   ``bottleneck_loading`` is what ``loading`` does with the second.
7. ``library`` serves many adapters on one model, which ``library_index`` finds in a folder.
"""
