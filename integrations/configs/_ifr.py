"""What all configurations of this folder share, beside mmdet's own; ../README.md says when to leave the warm-up out."""

custom_imports = dict(imports=["ifr_fast.integrations.mmdet"], allow_failed_imports=False)
custom_hooks = [dict(type="IFRHook", warmup_iters=2000)]
