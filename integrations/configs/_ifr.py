"""What all configurations of this folder share; each inherits it beside mmdet's own."""

custom_imports = dict(imports=["ifr_fast.integrations.mmdet"], allow_failed_imports=False)
custom_hooks = [dict(type="IFRHook", warmup_iters=2000)]
