"""The fine-tune that ``fasttune demo`` runs: stock and patched, side by side.

Modules, in the order in which a run goes through them:

- ``options``: the settings and their validation; ``packaged``: the default model and data
- ``data``: file formats; ``encode``: chat template, masking, packing, split and batches
- ``model``: the packaged or the user's model, LoRA, device and dtype
- ``protocol``, ``worker``, ``gate``, ``memory``: one worker process
- ``handle``, ``interrupt``, ``turns``, ``runner``: the parent, which gives the turns
- ``display``: progress; ``record``: what was measured; ``output``: the output folder;
  ``report``: table, ``result.json`` and the plot

Precision: the base model is loaded in the chosen dtype and the adapters are fp32, PEFT's default.
There is no autocast: with a bf16 base the Trainer's own ``bf16`` stays off.
"""
