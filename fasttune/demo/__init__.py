"""The fine-tune that ``fasttune demo`` runs: stock and patched, side by side, on the user's own machine.

Modules, in the order in which a run goes through them:

- ``options``: the settings and their validation
- ``data``: file formats; ``encode``: chat template, masking, packing, split and batches
- ``model``: the packaged or the user's model, LoRA, device and dtype
- ``protocol``, ``worker``, ``gate``, ``memory``: one worker process
- ``handle``, ``runner``, ``interrupt``: the parent, which lets the two workers take turns
- ``output``: the output folder; ``report``: table, ``result.json`` and the plot
"""
